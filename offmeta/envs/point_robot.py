"""Point robots: reach a hidden goal on the plane; pure JAX, no simulator.

Source: PEARL's code (oyster), `point_robot.py`; the dense semicircle with the
start at the origin is CSRO's. State and observation are the position (x, y),
one step moves by 0.1 * action, and there is no termination.

Task: {'goal': [2]}. Features: the position after the move, [2].
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from offmeta.envs import base, render
from offmeta.types import Array, EnvSpec, EnvState, Key, Task

_STEP_SIZE = 0.1  # length units per unit of action
_GOAL_RADIUS = 0.2  # reach of the sparse reward, length units
_ARCS = {'semicircle': np.pi, 'circle': 2.0 * np.pi}  # radians, radius 1
_NUM_TRAIN, _NUM_TEST = 32, 20  # of our own lists on the arcs
_OOD_SQUARE = 0.7  # training goals of 'ood' lie in [-0.7, 0.7]^2


def dense_reward(position: Array, goal: Array) -> Array:
  """Minus the distance: position [..., 2], goal [..., 2] -> [...]."""
  return -jnp.sqrt(jnp.sum(jnp.square(position - goal), axis=-1))


def sparse_reward(position: Array, goal: Array) -> Array:
  """1 minus the distance within 0.2 of the goal, else 0; shapes as dense."""
  dense = dense_reward(position, goal)
  return jnp.where(dense >= -_GOAL_RADIUS, dense + 1.0, 0.0)


_REWARDS = {'dense': dense_reward, 'sparse': sparse_reward}


class PointRobot:
  """The dense family.

  Task lists: 'pearl' (100 goals, 80/20; on the square oyster's point-robot,
  on the semicircle oyster's sparse-point-robot), 'default' (on the arcs our
  own 32/20, on the square the same as 'pearl') and our own 'ood': on the arcs
  train in the first three quarters of the angles, test in the last one
  (32/20), on the square train in [-0.7, 0.7]^2, test outside it (80/20).
  """

  name: ClassVar[str] = 'point_robot'

  def __init__(
    self,
    *,
    goals: str = 'semicircle',
    reward: str = 'dense',
    episode_length: int = 20,
  ):
    """Makes the family.

    Args:
      goals: 'semicircle' (angle ~ U(0, pi), radius 1), 'circle' (angle ~
        U(0, 2 pi), radius 1) or 'square' (oyster: goal and start ~
        U[-1, 1]^2). On both arcs the start is the origin.
      reward: 'dense' or 'sparse', see the functions of this module.
      episode_length: time limit in steps.

    Raises:
      ValueError: an unknown value; the message names the known ones.
    """
    base.require_choice('goals', goals, (*_ARCS, 'square'))
    base.require_choice('reward', reward, tuple(_REWARDS))
    base.require_count('episode_length', episode_length)
    self._goals = goals
    self._reward = _REWARDS[reward]
    self.spec = EnvSpec(
      name=self.name,
      observation_shape=(2,),
      action_size=2,
      feature_size=2,
      episode_length=episode_length,
      terminates=False,
      options={
        'goals': goals,
        'reward': reward,
        'episode_length': episode_length,
      },
    )

  def sample_tasks(self, key: Key, num_tasks: int) -> Task:
    """Fresh goals {'goal': [num_tasks, 2]}."""
    if self._goals == 'square':
      return {'goal': jax.random.uniform(key, (num_tasks, 2), minval=-1.0)}
    angle = jax.random.uniform(key, (num_tasks,), maxval=_ARCS[self._goals])
    return {'goal': jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=-1)}

  def task_list(self, name: str) -> tuple[Task, Task]:
    """A (train, test) list by name; ValueError names the known ones."""
    lists = {'default': self._default_list, 'ood': self._ood_list}
    if self._goals == 'square':
      lists = {
        'default': _pearl_square,
        'pearl': _pearl_square,
        'ood': _ood_square,
      }
    elif self._goals == 'semicircle':
      lists['pearl'] = _pearl_semicircle
    return base.select_list(f'{self.name}(goals={self._goals})', lists, name)

  def reset(self, key: Key, task: Task) -> EnvState:
    """At the origin; on the square uniformly at random."""
    del task
    if self._goals == 'square':
      position = jax.random.uniform(key, (2,), minval=-1.0)
    else:
      position = jnp.zeros((2,))
    zero = jnp.zeros(())
    return EnvState(position, position, zero, zero, position)

  def step(self, state: EnvState, action: Array, task: Task) -> EnvState:
    """Moves by 0.1 * action; action [2] is clipped to [-1, 1]."""
    position = state.physics + _STEP_SIZE * base.clip_action(action)
    return EnvState(
      physics=position,
      observation=position,
      reward=self.reward(position, action, task),
      terminal=jnp.zeros(()),
      features=position,
    )

  def reward(self, features: Array, action: Array, task: Task) -> Array:
    """The reward [...] of positions [..., 2]; the action plays no part."""
    del action
    return self._reward(features, task['goal'])

  def position(self, observation: Array) -> Array:
    """Where the robot is: [..., 2] -> [..., 2]."""
    return observation

  def geometry(self, physics: np.ndarray, task: Task) -> list[render.Geom]:
    """The robot on its plane, the goal, and faintly other held-out goals."""
    reach = _GOAL_RADIUS if self._reward is sparse_reward else _GOAL_RADIUS / 3
    others = np.asarray(self.task_list('default')[1]['goal'])
    return [
      render.solid('sphere', (0.05,), (*physics, 0.05), render.TRUNK),
      render.solid('plane', (), (), render.TRUNK),
      render.goal(task['goal'], reach),
      *(
        render.solid('cylinder', (0.03, 0.001), other, (0.6, 0.65, 0.6, 1.0))
        for other in others
      ),
    ]

  def _default_list(self) -> tuple[Task, Task]:
    """Our own: 32 seeded training angles, 20 held-out ones between them.

    Test angles are uniform between the smallest and the largest training
    angle, so a test task asks for interpolation, never extrapolation.
    """
    random = base.published_random()
    train = random.uniform(0.0, _ARCS[self._goals], _NUM_TRAIN)
    test = random.uniform(train.min(), train.max(), _NUM_TEST)
    goals = _on_circle(np.concatenate([train, test]))
    return base.split_first('goal', goals, _NUM_TRAIN)

  def _ood_list(self) -> tuple[Task, Task]:
    end = _ARCS[self._goals]
    angle = base.ood_draws(
      base.published_random(),
      (0.0, 0.75 * end),
      (0.75 * end, end),
      _NUM_TRAIN,
      _NUM_TEST,
    )
    return base.split_first('goal', _on_circle(angle), _NUM_TRAIN)


class SparsePointRobot(PointRobot):
  """oyster's sparse-point-robot: `reward` is the sparse one by default.

  PEARL trains its actor and critic on the dense reward here, and infers
  contexts and scores from the sparse one. A family has one reward, so that
  two-reward setting is not covered by the option alone: a caller who wants it
  recomputes the other one with `dense_reward(features, goal)`.
  """

  name: ClassVar[str] = 'sparse_point_robot'

  def __init__(
    self,
    *,
    goals: str = 'semicircle',
    reward: str = 'sparse',
    episode_length: int = 20,
  ):
    super().__init__(goals=goals, reward=reward, episode_length=episode_length)


def _on_circle(angle: np.ndarray) -> np.ndarray:
  return np.stack([np.cos(angle), np.sin(angle)], axis=-1)


def _pearl_square() -> tuple[Task, Task]:
  goals = base.published_random().uniform(-1.0, 1.0, (100, 2))
  return base.split_first('goal', goals, 80)


def _pearl_semicircle() -> tuple[Task, Task]:
  """100 equally spaced angles; numpy's shuffle, seed 1337, orders the goals."""
  goals = _on_circle(np.linspace(0.0, np.pi, 100))
  base.published_random().shuffle(goals)
  return base.split_first('goal', goals, 80)


def _ood_square() -> tuple[Task, Task]:
  random = base.published_random()
  inside = random.uniform(-_OOD_SQUARE, _OOD_SQUARE, (80, 2))
  anywhere = random.uniform(-1.0, 1.0, (200, 2))  # about half of it outside
  outside = anywhere[np.abs(anywhere).max(axis=1) > _OOD_SQUARE][:20]
  return base.split_first('goal', np.concatenate([inside, outside]), 80)
