"""The worked example of the README, run as a user would."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import mujoco
import numpy as np

from examples import reacher
from offmeta import testing
from offmeta.data import dataset as datasets

_ROOT = pathlib.Path(__file__).resolve().parent.parent


def test_the_family_keeps_the_contract():
  testing.check_env_family(
      reacher.Reacher(), num_steps=10, task_lists=('default',))


def test_the_fingertip_is_where_the_simulator_has_it():
  family = reacher.Reacher()
  data = mujoco.MjData(family.simulator.model)
  data.qpos[:] = [0.4, -1.3]
  mujoco.mj_kinematics(family.simulator.model, data)
  lower = data.body('lower')
  tip = lower.xpos + lower.xmat.reshape(3, 3) @ [0.1, 0.0, 0.0]
  np.testing.assert_allclose(
      reacher._fingertip(jnp.asarray(data.qpos)), tip[:2], atol=1e-6)


def test_goals_are_within_reach():
  goal = reacher.Reacher().sample_tasks(jax.random.key(0), 500)['goal']
  radius = np.linalg.norm(goal, axis=1)
  assert 0.1 <= radius.min() < 0.11 and 0.19 < radius.max() <= 0.2


def test_its_config_runs_from_the_command_line(
    tmp_path, compilation_cache_dir):
  """Data collection; the later phases see no family that is new to them."""
  result = subprocess.run(
      [sys.executable, '-m', 'experiments.run',
       '--config=examples/reacher.py', '--profile=smoke', '--phases=collect',
       f'--workdir={tmp_path / "run"}', '--seeds=1'],
      cwd=_ROOT, capture_output=True, text=True, timeout=600, check=False,
      env={**os.environ, 'JAX_COMPILATION_CACHE_DIR': compilation_cache_dir})
  assert result.returncode == 0, result.stderr
  run = json.loads((tmp_path / 'run/run.json').read_text())
  assert run['config_file'] == 'examples/reacher.py'
  data = datasets.load(tmp_path / 'run/dataset', reacher.Reacher().spec)
  assert data.tasks['goal'].shape == (4, 2)
  assert np.all(data.episode_return < 0.0)
