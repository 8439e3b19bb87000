"""The registry, and silence of third parties."""

import os
import subprocess
import sys
from xml.etree import ElementTree

import pytest

from offmeta import envs
from offmeta.envs import point_robot, simulator


def test_unknown_family_names_the_known():
  with pytest.raises(ValueError, match="'cheetah'.*ant_dir.*point_robot"):
    envs.make('cheetah')


@pytest.mark.parametrize(
  'name, options, message',
  [
    ('point_robot', {'goal': 'circle'}, "'goal'.*known: .*goals"),
    ('point_robot', {'backend': 'mjx'}, "'backend' of family 'point_robot'"),
    ('point_robot', {'goals': 'disc'}, 'semicircle, circle, square'),
    ('point_robot', {'reward': 'shaped'}, 'dense, sparse'),
    ('point_robot', {'episode_length': 0}, 'episode_length'),
    ('point_robot', {'episode_length': 2.0}, 'episode_length'),
    ('cheetah_vel', {'backend': 'bullet'}, 'spring, positional, generalized'),
    ('cheetah_vel', {'observation': 'pixels'}, 'paper, gym'),
    ('cheetah_vel', {'timestep': 0.1}, "'timestep'.*known: .*n_frames"),
    ('cheetah_vel', {'n_frames': 0}, 'n_frames'),
    ('cheetah_vel', {'ls_iterations': 4}, 'only with backend mjx'),
    ('ant_dir', {'reward': 'sparse'}, 'full, forward'),
    ('ant_dir', {'backend': 'mjx', 'solver_iterations': 0}, 'solver_iter'),
    ('ant_dir', {'terminate': 'False'}, "'terminate' must be True or False"),
    ('cheetah_vel', {'control_weight': 'x'}, "'control_weight' .* number"),
    ('cheetah_vel', {'control_weight': True}, "'control_weight' .* number"),
    ('walker_params', {'log_scale_limit': '2'}, "'log_scale_limit' .* number"),
  ],
)
def test_bad_options_name_the_known(name, options, message):
  with pytest.raises(ValueError, match=message):
    envs.make(name, **options)


def test_a_model_without_options():
  xml = ElementTree.fromstring(
    '<mujoco><worldbody><body><joint/><geom size="1"/></body></worldbody>'
    '</mujoco>'
  )
  made = simulator.make_simulator(xml, 'mjx', 4, 0.04)
  assert made.model.opt.timestep == 0.01


def test_register():
  envs.register('mine', lambda size=1, **rest: (size, rest))
  try:
    assert envs.make('mine', size=3, other=4) == (3, {'other': 4})
    with pytest.raises(ValueError, match='already registered'):
      envs.register('mine', point_robot.PointRobot)
  finally:
    del envs.FAMILIES['mine']


_QUIET_SCRIPT = """
import sys
from offmeta import envs
import jax
envs.make('point_robot')
heavy = [m for m in ('brax', 'mujoco') if m in sys.modules]
assert not heavy, f'importing offmeta.envs imported {heavy}'
for name, backend in (('cheetah_vel', 'mjx'), ('ant_dir', 'spring')):
  family = envs.make(name, backend=backend)
  task = envs.take_tasks(family.task_list('smac')[0], 0)
  state = jax.eval_shape(family.reset, jax.random.key(0), task)
  action = jax.numpy.zeros(family.spec.action_size)
  jax.eval_shape(family.step, state, action, task)
"""


def test_nothing_is_printed_or_left_behind(tmp_path):
  result = subprocess.run(
    [sys.executable, '-c', _QUIET_SCRIPT],
    cwd=tmp_path,
    check=False,
    capture_output=True,
    text=True,
    timeout=300,
    env=_environment(),
  )
  assert (result.returncode, result.stdout, result.stderr) == (0, '', '')
  assert not list(tmp_path.iterdir()), 'a log file was left behind'


def _environment() -> dict[str, str]:
  """CPU only, every warning shown, and this checkout's package."""
  root = os.path.dirname(os.path.dirname(envs.__path__[0]))
  return {
    **os.environ,
    'JAX_PLATFORMS': 'cpu',
    'PYTHONPATH': root,
    'PYTHONWARNINGS': 'always',
  }
