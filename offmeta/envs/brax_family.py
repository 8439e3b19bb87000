"""Families on a simulated body: reset and step once for all of them.

What a family is made of (tasks, observation, features, reward, health) stays
in its own file; `cheetah.py` is the shortest example.
"""

import abc
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from offmeta.envs import base, simulator as simulators
from offmeta.types import Array, EnvSpec, EnvState, Key, Task


def noisy_start(
  simulator: simulators.Simulator, key: Key, scale: float
) -> tuple[Array, Array]:
  """Gym's start: q + scale * U(-1, 1) and qd = scale * N(0, 1).

  Returns:
    q [Q] and qd [V]. A quaternion in q is left unnormalised, as in gym.
  """
  k_q, k_qd = jax.random.split(key)
  noise = jax.random.uniform(
    k_q, simulator.start.shape, minval=-scale, maxval=scale
  )
  velocity = scale * jax.random.normal(k_qd, (simulator.num_velocities,))
  return simulator.start + noise, velocity


def uniform_start(
  simulator: simulators.Simulator, key: Key, scale: float
) -> tuple[Array, Array]:
  """Like `noisy_start`, but qd = scale * U(-1, 1) too, as gym's walkers."""
  k_q, k_qd = jax.random.split(key)
  noise = lambda key, size: jax.random.uniform(
    key, (size,), minval=-scale, maxval=scale
  )
  q = simulator.start + noise(k_q, simulator.start.size)
  return q, noise(k_qd, simulator.num_velocities)


def with_unit_quaternion(q: Array) -> Array:
  """Normalises the rotation q[3:7] of a free root; q [Q]."""
  rotation = q[3:7] / jnp.linalg.norm(q[3:7])
  return jnp.concatenate([q[:3], rotation, q[7:]])


class BraxFamily(abc.ABC):
  """Reset and step of a family on a simulated body.

  A subclass sets `name`, makes its simulator, and defines `_observe`,
  `_features`, `reward`, `sample_tasks` and `_task_lists`. It may override
  `_start`, `_control`, `_healthy` (with `terminates=True`) and
  `system_changes` (tasks that differ in dynamics).

  Args:
    simulator: of the body.
    observation_size, feature_size: O, F.
    episode_length: time limit in control steps.
    terminates: whether an unhealthy or diverged state is terminal.
    reset_noise: scale of `noisy_start`.
    options: what else changes the data; those of the simulator, the time
      limit and the reset noise are added.
  """

  name: ClassVar[str]

  def __init__(
    self,
    simulator: simulators.Simulator,
    *,
    observation_size: int,
    feature_size: int,
    episode_length: int,
    terminates: bool,
    reset_noise: float,
    options: Mapping[str, Any],
  ):
    base.require_count('episode_length', episode_length)
    self.simulator = simulator
    self._reset_noise = reset_noise
    self.spec = EnvSpec(
      name=self.name,
      observation_shape=(observation_size,),
      action_size=int(simulator.model.nu),
      feature_size=feature_size,
      episode_length=episode_length,
      terminates=terminates,
      options={
        **simulator.options,
        **options,
        'episode_length': episode_length,
        'reset_noise': reset_noise,
      },
    )

  @abc.abstractmethod
  def sample_tasks(self, key: Key, num_tasks: int) -> Task:
    """Fresh tasks, leaves [num_tasks, ...]."""

  @abc.abstractmethod
  def reward(self, features: Array, action: Array, task: Task) -> Array:
    """The reward [...] of features [..., F], action [..., A]."""

  @abc.abstractmethod
  def _task_lists(self) -> base.TaskLists:
    """Published lists by name."""

  def _observe(self, physics: simulators.Physics, action: Array) -> Array:
    """The observation [O] after `action` (zeros at a reset).

    Not abstract: a body with `reset` and `step` of its own never asks for it.
    """
    raise NotImplementedError(
      f'{type(self).__name__} must define _observe, or reset and step'
    )

  def _features(
    self, before: simulators.Physics, after: simulators.Physics
  ) -> Array:
    """What the reward needs beyond the action, [F]; like `_observe`."""
    raise NotImplementedError(
      f'{type(self).__name__} must define _features, or reset and step'
    )

  def _start(self, key: Key) -> tuple[Array, Array]:
    """A random start, q [Q] and qd [V]."""
    return noisy_start(self.simulator, key, self._reset_noise)

  def _control(self, action: Array) -> Array:
    """What the actuators get for an action in [-1, 1], both [A]."""
    return action

  def _healthy(self, physics: simulators.Physics) -> Array:
    """Whether the episode may go on, []; asked only if `terminates`."""
    del physics
    return jnp.ones((), bool)

  def system_changes(self, task: Task) -> simulators.Changes:
    """What one task changes in the simulated system."""
    del task
    return {}

  def task_list(self, name: str) -> tuple[Task, Task]:
    """A (train, test) list by name; ValueError names the known ones."""
    return base.select_list(self.name, self._task_lists(), name)

  def reset(self, key: Key, task: Task) -> EnvState:
    """A random start, see `_start`."""
    physics = self.simulator.init(*self._start(key), self.system_changes(task))
    zero = jnp.zeros(())
    return EnvState(
      physics=physics,
      observation=self._observe(physics, jnp.zeros((self.spec.action_size,))),
      reward=zero,
      terminal=zero,
      features=self._features(physics, physics),
      diverged=zero,
    )

  def step(self, state: EnvState, action: Array, task: Task) -> EnvState:
    """One control step; action [A] is clipped to [-1, 1]."""
    action = base.clip_action(action)
    physics, finite = self.simulator.step(
      state.physics, self._control(action), self.system_changes(task)
    )
    features = self._features(state.physics, physics)
    terminal = jnp.zeros(())
    if self.spec.terminates:
      ended = jnp.logical_not(finite & self._healthy(physics))
      terminal = ended.astype(jnp.float32)
    return EnvState(
      physics=physics,
      observation=self._observe(physics, action),
      reward=self.reward(features, action, task),
      terminal=terminal,
      features=features,
      diverged=jnp.logical_not(finite).astype(jnp.float32),
    )
