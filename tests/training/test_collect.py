"""Datasets from a scripted policy."""

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from offmeta import envs, rollout
from offmeta.data import dataset as datasets
from offmeta.envs import point_robot
from offmeta.training import collect, phases
from offmeta.training.config import ConfigError
from offmeta.types import Transition

_EPISODES = 3


class _Scripted(point_robot.PointRobot):
  """Knows its task: walks straight to the goal."""

  name = 'scripted'

  def scripted_policy(self):
    def act(task, state, observation, key):
      return jnp.clip(10.0 * (task['goal'] - observation), -1, 1), {}
    return rollout.uniform_policy(2)._replace(act=act)


@pytest.fixture
def scripted_family():
  envs.register('scripted', _Scripted)
  yield {
      'family': {'name': 'scripted'},
      'collect': {'source': 'script', 'script_episodes': _EPISODES},
  }
  del envs.FAMILIES['scripted']


def test_a_script_makes_the_dataset(tmp_path, scripted_family):
  setup = tiny_run.make_setup(tmp_path, scripted_family)
  phases.run(setup, ('collect',))
  data = datasets.load(tmp_path / 'dataset', setup.family.spec)
  num_train, horizon = setup.config.family.num_train, 20
  np.testing.assert_array_equal(
      data.size, np.full(num_train, _EPISODES * horizon))
  position = data.transitions.observation.reshape(
      num_train, _EPISODES, horizon, 2)
  np.testing.assert_array_equal(position[:, :, 0], 0.0)
  goal = np.asarray(setup.train_tasks['goal'])
  last = data.transitions.next_observation[:, -1]
  np.testing.assert_allclose(last, goal, atol=1e-5)
  np.testing.assert_allclose(
      data.episode_return,
      data.transitions.reward.sum(axis=1) / _EPISODES, rtol=1e-5)
  manifest = datasets.load_manifest(tmp_path / 'dataset')
  assert manifest['source']['algorithm'] == 'script'
  assert setup.is_done('collect')


def test_without_a_script(tmp_path):
  setup = tiny_run.make_setup(tmp_path, {'collect': {'source': 'script'}})
  with pytest.raises(ConfigError, match='point_robot.*no scripted policy'):
    phases.run(setup, ('collect',))


def test_packing_keeps_the_order_of_what_took_place(tmp_path):
  setup = tiny_run.make_setup(tmp_path, {'family': {'num_train': 2}})
  # Two episodes of 3 steps; task 0 terminates after 1 and 2 steps.
  valid = np.array([[1, 0, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1]], bool)
  count = np.arange(12.0, dtype=np.float32).reshape(2, 6)
  zeros = jnp.zeros((2, 6, 2))
  data = collect._packed(setup, Transition(
      zeros, zeros, count, np.ones((2, 6), np.float32), zeros,
      {'time': np.tile(np.arange(3.0), (2, 2))}), valid)
  np.testing.assert_array_equal(data.size, [3, 6])
  np.testing.assert_array_equal(data.transitions.reward[0, :3], [0, 3, 4])
  np.testing.assert_array_equal(data.transitions.reward[1], count[1])
