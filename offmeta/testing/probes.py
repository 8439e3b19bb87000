"""Tiny families with known answers, and random batches."""

from typing import Any

import jax
import jax.numpy as jnp

from offmeta.types import (
  Array,
  BatchSpec,
  DataSpec,
  EnvFamily,
  EnvSpec,
  EnvState,
  Exploration,
  Key,
  MetaBatch,
  Sequences,
  Task,
  Trajectory,
  Transition,
  Windows,
)

# Training tasks of the problems that contracts make and batches are of.
NUM_TASKS = 3


class CountingFamily:
  """Step t (1, 2, ...) of an episode has the reward `value` * t.

  The observation is (t, start) with start ~ U(0, 1) drawn at the reset, the
  feature is t, actions do nothing. With `terminates` the episode ends at step
  `lifetime`, and whatever is stepped further is NaN.

  Task: {'value': [], 'lifetime': []}, both float32.
  """

  def __init__(self, *, episode_length: int = 5, terminates: bool = False):
    self.spec = EnvSpec(
      name='counting',
      observation_shape=(2,),
      action_size=1,
      feature_size=1,
      episode_length=episode_length,
      terminates=terminates,
      options={'episode_length': episode_length, 'terminates': terminates},
    )

  def sample_tasks(self, key: Key, num_tasks: int) -> Task:
    """Values ~ N(0, 1), lifetimes uniform in 1 to the time limit."""
    k_value, k_lifetime = jax.random.split(key)
    lifetime = jax.random.randint(
      k_lifetime, (num_tasks,), 1, self.spec.episode_length + 1
    )
    return {
      'value': jax.random.normal(k_value, (num_tasks,)),
      'lifetime': lifetime.astype(jnp.float32),
    }

  def task_list(self, name: str) -> tuple[Task, Task]:
    """There is none."""
    raise ValueError(f'unknown task list {name!r}; known: none')

  def reset(self, key: Key, task: Task) -> EnvState:
    """At t = 0 with a random start."""
    del task
    zero = jnp.zeros(())
    observation = jnp.stack([zero, jax.random.uniform(key)])
    return EnvState(zero, observation, zero, zero, zero[None])

  def step(self, state: EnvState, action: Array, task: Task) -> EnvState:
    """Counts."""
    time = state.physics + 1.0
    terminal = jnp.zeros(())
    if self.spec.terminates:
      terminal = (time == task['lifetime']).astype(jnp.float32)
      time = jnp.where(time > task['lifetime'], jnp.nan, time)
    return EnvState(
      physics=time,
      observation=jnp.stack([time, state.observation[1] + 0.0 * time]),
      reward=self.reward(time[None], action, task),
      terminal=terminal,
      features=time[None],
    )

  def reward(self, features: Array, action: Array, task: Task) -> Array:
    """The reward [...] of features [..., 1]."""
    del action
    return task['value'] * features[..., 0]


class BlowsUp(CountingFamily):
  """Diverges in the third step of every episode; as a simulator, stays put.

  With `terminates` that is a termination.
  """

  def step(self, state: EnvState, action: Array, task: Task) -> EnvState:
    """Counts to two."""
    after = super().step(state, action, task)
    diverged = (after.physics == 3.0).astype(jnp.float32)
    stay = lambda new, old: jnp.where(diverged > 0.5, old, new)
    return after._replace(
      physics=stay(after.physics, state.physics),
      observation=stay(after.observation, state.observation),
      terminal=jnp.maximum(after.terminal, diverged * self.spec.terminates),
      diverged=diverged,
    )


class BanditFamily:
  """A contextual bandit: the reward is action . direction (task: unit [2]).

  One transition tells one coordinate of the task; nothing but the reward
  tells it. The observation is constant, so the best return is the episode
  length times |direction|_1 and that of a policy without belief is 0.
  """

  def __init__(self, *, episode_length: int = 4):
    self.spec = EnvSpec(
      name='bandit',
      observation_shape=(1,),
      action_size=2,
      feature_size=1,
      episode_length=episode_length,
      terminates=False,
      options={'episode_length': episode_length},
    )

  def sample_tasks(self, key: Key, num_tasks: int) -> Task:
    """Directions uniform on the circle."""
    angle = jax.random.uniform(key, (num_tasks,), maxval=2.0 * jnp.pi)
    return {'direction': jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1)}

  def task_list(self, name: str) -> tuple[Task, Task]:
    """There is none."""
    raise ValueError(f'unknown task list {name!r}; known: none')

  def reset(self, key: Key, task: Task) -> EnvState:
    """The only state; a random feature keeps episodes apart."""
    del task
    zero = jnp.zeros(())
    feature = jax.random.uniform(key, (1,))
    return EnvState((), jnp.ones((1,)), zero, zero, feature)

  def step(self, state: EnvState, action: Array, task: Task) -> EnvState:
    """Pays."""
    return state._replace(reward=self.reward(state.features, action, task))

  def reward(self, features: Array, action: Array, task: Task) -> Array:
    """The reward [...] of actions [..., 2]."""
    del features
    return jnp.sum(jnp.clip(action, -1.0, 1.0) * task['direction'], axis=-1)


class AimFamily:
  """The reward is 1 - (action - slope * mark)^2; the mark is seen.

  The observation is (mark, share of the time that is over), the mark drawn from
  U(-0.8, 0.8) at the reset, the feature the mark. The best action is
  slope * mark, and then all steps pay 1. At the time limit the episode is cut,
  or with `terminates` over: V of the best policy before step t of T is
  1 / (1 - gamma), or (1 - gamma^(T - t)) / (1 - gamma).

  Task: {'slope': []}, in [-1, 1].
  """

  def __init__(self, *, episode_length: int = 5, terminates: bool = False):
    self.spec = EnvSpec(
      name='aim',
      observation_shape=(2,),
      action_size=1,
      feature_size=1,
      episode_length=episode_length,
      terminates=terminates,
      options={'episode_length': episode_length, 'terminates': terminates},
    )

  def sample_tasks(self, key: Key, num_tasks: int) -> Task:
    """Slopes uniform in [-1, 1]."""
    return {'slope': jax.random.uniform(key, (num_tasks,), minval=-1.0)}

  def task_list(self, name: str) -> tuple[Task, Task]:
    """There is none."""
    raise ValueError(f'unknown task list {name!r}; known: none')

  def reset(self, key: Key, task: Task) -> EnvState:
    """At the first step with a random mark."""
    del task
    zero = jnp.zeros(())
    mark = jax.random.uniform(key, (), minval=-0.8, maxval=0.8)
    return EnvState(zero, jnp.stack([mark, zero]), zero, zero, mark[None])

  def step(self, state: EnvState, action: Array, task: Task) -> EnvState:
    """Pays, and counts."""
    time = state.physics + 1.0
    limit = self.spec.episode_length
    over = (time >= limit).astype(jnp.float32)
    return state._replace(
      physics=time,
      observation=jnp.stack([state.features[0], time / limit]),
      reward=self.reward(state.features, action, task),
      terminal=over if self.spec.terminates else jnp.zeros(()),
    )

  def reward(self, features: Array, action: Array, task: Task) -> Array:
    """The reward [...] of features [..., 1], action [..., 1]."""
    error = jnp.clip(action, -1.0, 1.0) - task['slope'] * features
    return 1.0 - jnp.sum(jnp.square(error), axis=-1)


class PoisonedReward:
  """A family whose steps reveal `value` instead of rewards and features.

  What must not read the reward gives the same result with and without it.
  """

  def __init__(self, family: EnvFamily, value: float = float('nan')):
    self._family = family
    self._value = value
    self.spec = family.spec

  def __getattr__(self, name: str) -> Any:
    return getattr(self._family, name)

  def step(self, state: EnvState, action: Array, task: Task) -> EnvState:
    """The step of the family, with reward and features overwritten."""
    after = self._family.step(state, action, task)
    return after._replace(
      reward=jnp.full_like(after.reward, self._value),
      features=jnp.full_like(after.features, self._value),
    )


def random_observations(key: Key, spec: EnvSpec, shape: tuple[int, ...]):
  """Standard normal numbers or uniform pixels, [*shape, *observation]."""
  shape += spec.observation_shape
  if spec.observation_dtype == 'float32':
    return jax.random.normal(key, shape)
  return jax.random.bits(key, shape, spec.observation_dtype)


def random_transitions(
  key: Key,
  spec: EnvSpec,
  shape: tuple[int, ...],
  data: DataSpec = DataSpec(),
  sequence_size: int = 0,
) -> Transition:
  """Random transitions; actions in [-1, 1], one in eight terminal.

  Args:
    key: random key.
    spec: sizes.
    shape: leading axes.
    data: what the extras hold: returns that fit to nothing, and for sequences
      'time', counted along the last of the axes.
    sequence_size: steps after which another sequence begins; 0: never.
  """
  keys = jax.random.split(key, 5)
  extras = {}
  if data.returns_discount is not None:
    k_return, k_last, k_power = jax.random.split(keys[0], 3)
    extras |= {
      'return_to_go': jax.random.normal(k_return, shape),
      'last_observation': random_observations(k_last, spec, shape),
      'bootstrap': jax.random.uniform(k_power, shape),
      'last_discount': jnp.ones(shape),
    }
  if data.sequence_episodes:
    steps = jnp.arange(shape[-1]) % (sequence_size or shape[-1])
    extras['time'] = jnp.broadcast_to(
      (steps % spec.episode_length).astype(jnp.float32), shape
    )
  return Transition(
    observation=random_observations(keys[0], spec, shape),
    action=jax.random.uniform(
      keys[1], shape + (spec.action_size,), minval=-1.0
    ),
    reward=jax.random.normal(keys[2], shape),
    discount=jax.random.bernoulli(keys[3], 0.875, shape).astype(jnp.float32),
    next_observation=random_observations(keys[4], spec, shape),
    extras=extras,
  )


def random_batch(
  key: Key, spec: EnvSpec, batch: BatchSpec, data: DataSpec = DataSpec()
) -> MetaBatch:
  """A batch of the given composition without any meaning."""
  k_context, k_query, k_mask = jax.random.split(key, 3)
  tasks, asked = batch.num_tasks, batch.context
  length = 0
  if isinstance(asked, Sequences):  # prefixes of each
    length = asked.length
    valid = jax.random.randint(k_mask, (tasks, asked.count, 1), 1, length + 1)
    mask = (jnp.arange(length) < valid).reshape(tasks, -1)
  elif asked is not None:
    size = asked.size
    if isinstance(asked, Exploration):
      length = asked.sequence_size
      size = max(size, length)
    # Every task has an entry that counts, most have some that do not.
    mask = jax.random.bernoulli(k_mask, 0.75, (tasks, size)).at[:, 0].set(True)
  context = None, None
  if asked is not None:
    context = (
      random_transitions(k_context, spec, mask.shape, data, length),
      mask.astype(jnp.float32),
    )
  if isinstance(batch.query, Windows):
    query = _random_windows(k_query, spec, tasks, batch.query, data)
  else:
    query = random_transitions(
      k_query, spec, (tasks, batch.query.size), data, length
    )
  slots = jnp.arange(tasks)
  return MetaBatch(slots % NUM_TASKS, slots, *context, query)


def _random_windows(key, spec, tasks: int, asked: Windows, data) -> Trajectory:
  """The first window is whole, others may end early."""
  shape = (tasks, asked.count, asked.length)
  steps = random_transitions(key, spec, shape, data)
  valid = jax.random.randint(key, (*shape[:2], 1), 1, asked.length + 1)
  valid = valid.at[:, 0].set(asked.length)
  last = jax.random.fold_in(key, 0)
  frames = random_observations(last, spec, (*shape[:2], 1))
  return Trajectory(
    observation=jnp.concatenate([steps.observation, frames], axis=2),
    action=steps.action,
    reward=steps.reward,
    discount=steps.discount,
    mask=(jnp.arange(asked.length) < valid).astype(jnp.float32),
    extras=steps.extras,
  )
