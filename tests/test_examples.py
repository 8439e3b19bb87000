"""The worked examples of the README, run as a user would."""

import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest

from examples import cloning, reacher
from offmeta import envs, testing
from offmeta.data import dataset as datasets
from offmeta.data.meta_dataset import MetaDataset
from offmeta.types import Transition

_ROOT = pathlib.Path(__file__).resolve().parent.parent


def test_the_family_keeps_the_contract():
  testing.check_env_family(
    reacher.Reacher(), num_steps=10, task_lists=('default',)
  )


def test_the_fingertip_is_where_the_simulator_has_it():
  family = reacher.Reacher()
  data = mujoco.MjData(family.simulator.model)
  data.qpos[:] = [0.4, -1.3]
  mujoco.mj_kinematics(family.simulator.model, data)
  lower = data.body('lower')
  tip = lower.xpos + lower.xmat.reshape(3, 3) @ [0.1, 0.0, 0.0]
  np.testing.assert_allclose(
    reacher._fingertip(jnp.asarray(data.qpos)), tip[:2], atol=1e-6
  )


def test_goals_are_within_reach():
  goal = reacher.Reacher().sample_tasks(jax.random.key(0), 500)['goal']
  radius = np.linalg.norm(goal, axis=1)
  assert 0.1 <= radius.min() < 0.11 and 0.19 < radius.max() <= 0.2


@pytest.fixture(name='run_config')
def _run_config():
  """The command on a config file."""

  def run(*flags):
    result = subprocess.run(
      [
        sys.executable,
        '-m',
        'experiments.run',
        '--profile=smoke',
        '--seeds=1',
        *flags,
      ],
      cwd=_ROOT,
      capture_output=True,
      text=True,
      timeout=600,
      check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout

  return run


def test_its_config_runs_from_the_command_line(tmp_path, run_config):
  """Data collection; the later phases see no family that is new to them.

  From the source that compiles fastest.
  """
  run_config(
    '--config=examples/reacher.py',
    '--config.collect.source=sac',
    '--phases=collect',
    f'--workdir={tmp_path / "run"}',
  )
  run = json.loads((tmp_path / 'run/run.json').read_text())
  assert run['config_file'] == 'examples/reacher.py'
  data = datasets.load(tmp_path / 'run/dataset', reacher.Reacher().spec)
  assert data.tasks['goal'].shape == (4, 2)
  assert np.all(data.episode_return < 0.0)


# The algorithm.


def test_the_algorithm_keeps_the_contract():
  testing.check_algorithm(
    cloning.make,
    cloning.Config(
      latent_size=2, hidden=(4,), num_tasks=3, query_size=4, context_size=5
    ),
    reacher.Reacher().spec,
    quick=True,
  )


def test_the_algorithm_runs_from_the_command_line(tmp_path, run_config):
  """On a dataset that is there, from a setting to a table of scores."""
  family = envs.make('point_robot', goals='semicircle')
  tasks = jax.tree.map(lambda x: x[:4], family.task_list('default')[0])
  shape = (4, 20)
  rng = np.random.default_rng(0)
  observation = rng.normal(size=(*shape, 2)).astype(np.float32)
  data = MetaDataset(
    Transition(
      observation,
      rng.uniform(-1, 1, (*shape, 2)).astype(np.float32),
      rng.normal(size=shape).astype(np.float32),
      np.ones(shape, np.float32),
      observation,
      {'features': np.zeros((*shape, family.spec.feature_size), np.float32)},
    ),
    np.full(4, 20, np.int32),
    None,
    None,
    jax.tree.map(np.asarray, tasks),
    np.zeros(4, np.float32),
  )
  datasets.save(tmp_path / 'data', data, family.spec, {})
  printed = run_config(
    '--config=examples/cloning.py',
    '--config.cloning.num_updates=3',
    f'--config.collect.dataset={tmp_path / "data"}',
    f'--workdir={tmp_path / "run"}',
  )
  assert 'offline phase, self-collected context' in printed
  run = json.loads((tmp_path / 'run/run.json').read_text())
  assert run['algorithm'] == 'cloning'
  assert run['config']['cloning']['num_updates'] == 3
  assert not (tmp_path / 'run/online').exists()
