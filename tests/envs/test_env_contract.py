"""The contract must reject what breaks it."""

import jax.numpy as jnp
import pytest

from offmeta import testing
from offmeta.envs import point_robot


class _OtherReward(point_robot.PointRobot):
  def reward(self, features, action, task):
    return super().reward(features, action, task) - 0.1 * (
      jnp.abs(action).max(axis=-1) > 1.0
    )


class _WrongSize(point_robot.PointRobot):
  def __init__(self):
    super().__init__()
    self.spec = self.spec._replace(feature_size=3)


class _Nan(point_robot.PointRobot):
  def step(self, state, action, task):
    after = super().step(state, action, task)
    return after._replace(observation=after.observation / 0.0 * 0.0)


class _Terminates(point_robot.PointRobot):
  def step(self, state, action, task):
    return super().step(state, action, task)._replace(terminal=jnp.ones(()))


class _Retraces(point_robot.PointRobot):
  def reset(self, key, task):
    state = super().reset(key, task)
    return state._replace(physics=state.physics[None])

  def step(self, state, action, task):
    return super().step(
      state._replace(physics=state.physics.reshape(2)), action, task
    )


class _Remembers(point_robot.PointRobot):
  """Its trace depends on how often it was called."""

  calls = 0

  def reset(self, key, task):
    self.calls += 1
    state = super().reset(key, task)
    return state._replace(observation=state.observation + self.calls)


class _NotJson(point_robot.PointRobot):
  def __init__(self):
    super().__init__()
    self.spec = self.spec._replace(options={'goal': jnp.zeros(2)})


class _OneTask(point_robot.PointRobot):
  def sample_tasks(self, key, num_tasks):
    return super().sample_tasks(key, 1)


class _OddList(point_robot.PointRobot):
  def task_list(self, name):
    train, test = super().task_list(name)
    return train, {'goal': test['goal'][:, :1]}


class _InSpace(point_robot.PointRobot):
  def position(self, observation):
    return jnp.concatenate([observation, observation[..., :1]], axis=-1)


@pytest.mark.parametrize(
  'family, message',
  [
    (_OtherReward, 'is not the reward'),
    (_WrongSize, 'features has shape'),
    (_Nan, 'observation is not finite'),
    (_Terminates, 'spec.terminates is False'),
    (_Retraces, 'retrace'),
    (_Remembers, 'vmap over tasks'),
    (_NotJson, 'not JSON'),
    (_OneTask, 'leaf of shape'),
    (_InSpace, r'expected finite \[4, 2\]'),
    (_OddList, "test tasks of list 'default'"),
  ],
)
def test_broken_families_are_rejected(family, message):
  with pytest.raises(AssertionError, match=message):
    testing.check_env_family(family(), num_steps=3, task_lists=('default',))
