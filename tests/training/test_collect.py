"""Datasets from a scripted policy."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from offmeta import envs, rollout
from offmeta.data import dataset as datasets
from offmeta.envs import point_robot
from offmeta.results import records
from offmeta.testing import probes
from offmeta.training import collect, phases, restore
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


class _Fragile(probes.BlowsUp):
  """Blows up once in each episode of five steps."""

  def scripted_policy(self):
    return rollout.uniform_policy(1)


def test_steps_that_blew_up_are_counted(tmp_path):
  setup = dataclasses.replace(
      tiny_run.make_setup(tmp_path, {
          'collect': {'source': 'script', 'script_episodes': _EPISODES}}),
      family=_Fragile(),
      train_tasks={'value': jnp.ones(3), 'lifetime': jnp.ones(3)},
      test_tasks={'value': jnp.ones(2), 'lifetime': jnp.ones(2)})
  collect.collect(setup)
  scores = records.load_evaluation(tmp_path / 'evaluations' / 'collect.npz')
  np.testing.assert_array_equal(scores['dataset_diverged'], [3 * _EPISODES])
  # Per seed 2 tasks, 2 repetitions, 8 episodes.
  np.testing.assert_array_equal(scores['random_diverged'], [32, 32])


def test_rows_that_blew_up_count_where_they_are_held():
  flags = np.array([[1, 0, 1, 1], [0, 1, 1, 1]], np.float32)
  part = Transition(*[None] * 5, {'diverged': flags})
  data = datasets.MetaDataset(
      part, np.array([4, 2]), None, None, {}, np.zeros(2))
  assert collect.num_diverged(data) == 3 + 1
  both = data._replace(context=part, context_size=np.array([0, 3]))
  assert collect.num_diverged(both) == 4 + 2
  silent = part._replace(extras={})
  assert collect.num_diverged(both._replace(context=silent)) == 4


def test_without_a_script(tmp_path):
  setup = tiny_run.make_setup(tmp_path, {'collect': {'source': 'script'}})
  with pytest.raises(ConfigError, match='point_robot.*no scripted policy'):
    phases.run(setup, ('collect',))
  with pytest.raises(ConfigError, match='point_robot.*no scripted policy'):
    restore.meta_test(setup, 'collect', 0, 0, record=lambda state: {})


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
