"""The contract that any family must meet, for our tests and for users.

Every check raises AssertionError with a message that says what failed.
"""

from collections.abc import Callable
import json

import jax
import jax.numpy as jnp
import numpy as np

from offmeta.testing.arrays import numbers
from offmeta.types import (
  Array,
  EnvFamily,
  EnvState,
  Task,
)


def check_env_family(
  family: EnvFamily,
  num_steps: int = 25,
  num_tasks: int = 3,
  task_lists: tuple[str, ...] = (),
  tolerance: float = 1e-4,
  quick: bool = False,
) -> None:
  """Checks a family against the `EnvFamily` protocol.

  Specs match arrays; `reset` and `step` are traced once for different tasks
  and give states of the same structure; episodes of random actions (up to
  their termination) are finite, with terminal in {0, 1}; `reward(features,
  action, task)` equals the reward of `step`, also for clipped and for stacked
  actions; vmap over tasks equals one by one; the same key gives the same
  episode; task lists have the leaves of sampled tasks; `position`, where there
  is one, gives finite points on a plane.

  Args:
    family: what to check.
    num_steps: steps per episode.
    num_tasks: at least 2 sampled tasks, one episode each.
    task_lists: published lists to check.
    tolerance: absolute and relative, between vmapped and single steps and
      between recomputed rewards; batched physics rounds differently.
    quick: leave out what takes most of the time, the comparison with vmap over
      tasks (for a further family on the same body).

  Raises:
    AssertionError: says what failed.
  """
  _check_spec(family)
  tasks = family.sample_tasks(jax.random.key(0), num_tasks)
  _check_tasks(family, tasks, num_tasks, task_lists)
  # Actions beyond 1 show whether all parts clip alike.
  actions, keys = jax.jit(
    lambda: (
      jax.random.uniform(
        jax.random.key(1),
        (num_tasks, num_steps, family.spec.action_size),
        minval=-1.2,
        maxval=1.2,
      ),
      jax.random.split(jax.random.key(2), num_tasks),
    )
  )()
  actions = np.asarray(actions)
  # Cut in numpy: jax would compile a program for every shape.
  take = lambda tree, i: jax.tree.map(lambda leaf: np.asarray(leaf)[i], tree)

  traces = {'reset': 0, 'step': 0}

  def counted(name):
    def call(*args):
      traces[name] += 1
      return getattr(family, name)(*args)

    call.__name__ = name  # so that profiles and compilation caches name it
    return jax.jit(call)

  reset, step = counted('reset'), counted('step')

  def episode(i):
    states = [reset(keys[i], take(tasks, i))]
    _check_state(family, states[0], 'reset')
    for action in actions[i]:
      if float(states[-1].terminal) > 0.5:
        break
      states.append(step(states[-1], action, take(tasks, i)))
      _check_state(family, states[-1], f'step {len(states) - 1}')
    return states

  single = [episode(i) for i in range(num_tasks)]
  assert traces == {'reset': 1, 'step': 1}, (
    f'new tasks or states retrace: {traces} traces, expected 1 of each'
  )
  for first, again in zip(single[0], episode(0), strict=True):
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again)):
      assert np.array_equal(numbers(a), numbers(b)), (
        'the same key, task and actions gave another episode'
      )
  assert any(
    not np.array_equal(numbers(x), numbers(y))
    for x, y in zip(
      jax.tree.leaves((single[0][-1].observation, take(tasks, 0))),
      jax.tree.leaves((single[1][-1].observation, take(tasks, 1))),
    )
  ), 'different keys gave the same task and the same episode'
  reward = jax.jit(family.reward)
  for i, states in enumerate(single):
    _check_reward(reward, states, actions[i], take(tasks, i), tolerance)
    _check_position(family, states)
  if not quick:
    _check_vmap(family, single, keys, actions, tasks, tolerance)


def _check_spec(family: EnvFamily) -> None:
  spec = family.spec
  for name in (
    'action_size',
    'feature_size',
    'episode_length',
  ):
    value = getattr(spec, name)
    assert isinstance(value, int) and value >= 1, (
      f'spec.{name} must be a positive int, not {value!r}'
    )
  assert (
    isinstance(spec.observation_shape, tuple)
    and len(spec.observation_shape) in (1, 3)
    and all(isinstance(n, int) and n >= 1 for n in spec.observation_shape)
  ), (
    'spec.observation_shape must be (size,) or (height, width, channels), not'
    f' {spec.observation_shape!r}'
  )
  known = ('float32', 'uint8')
  assert spec.observation_dtype in known, (
    f'spec.observation_dtype must be one of {known}, not'
    f' {spec.observation_dtype!r}'
  )
  assert isinstance(spec.name, str) and spec.name, 'spec.name is empty'
  assert isinstance(spec.terminates, bool), 'spec.terminates must be a bool'
  try:
    copy = json.loads(json.dumps(dict(spec.options)))
  except (TypeError, ValueError) as error:
    raise AssertionError(f'spec.options is not JSON: {error}') from error
  assert copy == dict(spec.options), (
    'spec.options changes in a JSON round trip (a tuple or non-string key?)'
  )


def _check_tasks(
  family: EnvFamily, tasks: Task, num_tasks: int, names: tuple[str, ...]
) -> None:
  described = lambda task: jax.tree.map(lambda x: (x.shape[1:], x.dtype), task)
  for leaf in jax.tree.leaves(tasks):
    assert leaf.shape[:1] == (num_tasks,), (
      f'sample_tasks(key, {num_tasks}) gave a leaf of shape {leaf.shape}'
    )
    assert np.all(np.isfinite(leaf)), 'sampled tasks are not finite'
  for name in names:
    for part, listed in zip(('train', 'test'), family.task_list(name)):
      assert described(listed) == described(tasks), (
        f'{part} tasks of list {name!r} are {described(listed)}, sampled '
        f'ones {described(tasks)}'
      )
      sizes = {leaf.shape[0] for leaf in jax.tree.leaves(listed)}
      assert len(sizes) == 1 and sizes != {0}, (
        f'{part} tasks of list {name!r} have sizes {sizes}'
      )
  unknown = 'no such list'
  try:
    family.task_list(unknown)
  except ValueError as error:
    for name in names:
      assert name in str(error), (
        f'the error for an unknown task list does not name {name!r}'
      )
  else:
    raise AssertionError('an unknown task list must raise ValueError')


def _check_state(family: EnvFamily, state: EnvState, where: str) -> None:
  spec = family.spec
  shapes = {
    'observation': spec.observation_shape,
    'reward': (),
    'terminal': (),
    'features': (spec.feature_size,),
    'diverged': (),
  }
  for name, shape in shapes.items():
    value = getattr(state, name)
    assert value.shape == shape, (
      f'{where}: {name} has shape {value.shape}, spec says {shape}'
    )
    dtype = spec.observation_dtype if name == 'observation' else 'float32'
    assert value.dtype == dtype, (
      f'{where}: {name} is {value.dtype}, not {dtype}'
    )
    assert np.all(np.isfinite(value)), f'{where}: {name} is not finite'
  for name in ('terminal', 'diverged'):
    value = float(getattr(state, name))
    assert value in (0.0, 1.0), f'{where}: {name} is {value}, not 0 or 1'
  assert not (
    spec.terminates
    and float(state.diverged) > 0.5
    and float(state.terminal) < 0.5
  ), f'{where}: diverged without being terminal'
  if where == 'reset':
    for name in ('reward', 'terminal', 'diverged'):
      assert float(getattr(state, name)) == 0.0, (
        f'{name} must be 0 after a reset'
      )
  if not spec.terminates:
    assert float(state.terminal) == 0.0, (
      f'{where}: terminal is 1 but spec.terminates is False'
    )


def _check_reward(
  reward: Callable[..., Array],
  states: list[EnvState],
  actions: np.ndarray,
  task: Task,
  tolerance: float,
) -> None:
  stepped = np.array([state.reward for state in states[1:]])
  features = np.stack([state.features for state in states[1:]])
  taken = actions[: len(features)]
  for what, given in (('raw', taken), ('clipped', np.clip(taken, -1, 1))):
    rewards = reward(features, given, task)
    assert rewards.shape == stepped.shape, (
      f'reward of features {features.shape} has shape {rewards.shape}, '
      f'expected {stepped.shape}'
    )
    np.testing.assert_allclose(
      rewards,
      stepped,
      rtol=tolerance,
      atol=tolerance,
      err_msg=f'reward(features, {what} action, task) is not the reward '
      'that step gave',
    )


def _check_position(family: EnvFamily, states: list[EnvState]) -> None:
  if not hasattr(family, 'position'):
    return
  observations = jnp.asarray(np.stack([state.observation for state in states]))
  places = np.asarray(family.position(observations))
  assert places.shape == (len(states), 2) and np.all(np.isfinite(places)), (
    f'position(observation) of observations {observations.shape} has shape'
    f' {places.shape} or is not finite, expected finite [{len(states)}, 2]'
  )
  assert np.array_equal(
    places[0], np.asarray(family.position(observations[0]))
  ), 'position of stacked observations is not that of one'


def _check_vmap(
  family: EnvFamily,
  single: list[list[EnvState]],
  keys: Array,
  actions: np.ndarray,
  tasks: Task,
  tolerance: float,
) -> None:
  """One batched reset and step, in one program, against the single ones."""

  def begin(key, action, task):
    start = family.reset(key, task)
    return start, family.step(start, action, task)

  batched = jax.jit(jax.vmap(begin))(keys, actions[:, 0], tasks)
  for t, state in enumerate(batched):
    batch = jax.tree.map(np.asarray, state._replace(physics=()))
    for i, states in enumerate(single):
      for name in ('observation', 'reward', 'terminal', 'features'):
        # A pixel is cut off to a whole number: rounding may make it the next.
        pixels = name == 'observation' and (
          family.spec.observation_dtype != 'float32'
        )
        np.testing.assert_allclose(
          np.asarray(getattr(batch, name)[i], np.float32),
          np.asarray(getattr(states[t], name), np.float32),
          rtol=tolerance,
          atol=1.0 if pixels else tolerance,
          err_msg=f'vmap over tasks and one by one differ in {name} after '
          f'{t} steps of task {i}',
        )
