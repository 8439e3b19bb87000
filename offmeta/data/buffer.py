"""Per-task replay on the device, in insertion order.

Nothing is evicted: capacities are computed from the schedule before a run
(`data/capacity.py`), so "the first 1200 transitions" and "what was there
at the phase switch" are prefixes.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from offmeta.types import Array, Trajectory, Transition


class Buffer(NamedTuple):
  """Transitions of M tasks.

  Attributes:
    data: leaves [M, C, ...]. Without `next_observation` every frame is stored
      once (`data/frames.py`), and the table below knows which rows are steps.
    size: [M] int32, valid leading entries.
    offline_size: [M] int32, entries that were there when the buffer was made
      from a dataset: the frozen offline data are this prefix.
    sequence_start: [M, Q] int32, where each exploration sequence begins.
    sequence_length: [M, Q] int32, its length in steps.
    num_sequences: [M] int32.
  """

  data: Transition
  size: Array
  offline_size: Array
  sequence_start: Array
  sequence_length: Array
  num_sequences: Array

  @property
  def capacity(self) -> int:
    """C."""
    return self.data.reward.shape[1]

  @property
  def num_steps(self) -> Array:
    """How many of the valid rows are steps, [M]."""
    if self.data.next_observation is None:
      return jnp.sum(self.sequence_length, axis=-1)
    return self.size

  def tables(self) -> 'Buffer':
    """The same with empty data, leaves [M, C, 0]: enough to draw rows from."""
    empty = lambda x: np.zeros((*x.shape[:2], 0), bool)
    return self._replace(data=jax.tree.map(empty, self.data))


class Replay(NamedTuple):
  """The two roles of data.

  Attributes:
    query: what the losses are taken on.
    context: what adaptation may look at; None when one buffer serves both.
  """

  query: Buffer
  context: Buffer | None

  def contexts(self) -> Buffer:
    """The buffer that contexts are drawn from."""
    return self.query if self.context is None else self.context

  def tables(self) -> 'Replay':
    """`Buffer.tables` of both."""
    return Replay(
      self.query.tables(),
      None if self.context is None else self.context.tables(),
    )

  def new_steps(self) -> Array:
    """Transitions in all tasks since the start, [...]."""
    return jnp.sum(self.query.size - self.query.offline_size, axis=-1)

  def with_extras(self, extras: Mapping[str, Array]) -> 'Replay':
    """The same with further extras of the queries, leaves [M, C, ...].

    Contexts keep what they have.
    """
    if not extras:
      return self
    data = self.query.data
    query = self.query._replace(
      data=data._replace(extras={**data.extras, **extras})
    )
    return Replay(query, self.contexts())


def make(
  data: Transition, size: Array, capacity: int, max_sequences: int = 0
) -> Buffer:
  """A buffer that starts with the given data.

  Args:
    data: leaves [M, C0, ...]; kept as they are, numpy's too, if C is C0.
    size: [M], valid leading entries.
    capacity: C >= C0.
    max_sequences: Q; 0 keeps no table.

  Raises:
    ValueError: capacity below C0.
  """
  num_tasks, old = data.reward.shape
  if capacity < old:
    raise ValueError(f'buffer capacity {capacity} below the {old} rows given')

  def pad(x):
    if capacity == old:
      return x
    widths = [(0, 0), (0, capacity - old)] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, widths)

  size = jnp.asarray(size, jnp.int32)
  table = jnp.zeros((num_tasks, max_sequences), jnp.int32)
  return Buffer(
    data=jax.tree.map(pad, data),
    size=size,
    offline_size=size,
    sequence_start=table,
    sequence_length=table,
    num_sequences=jnp.zeros((num_tasks,), jnp.int32),
  )


def empty(
  example: Transition, num_tasks: int, capacity: int, max_sequences: int = 0
) -> Buffer:
  """A buffer without data, for transitions like `example` (leaves [...])."""
  data = jax.tree.map(
    lambda x: jnp.zeros((num_tasks, 0) + x.shape, x.dtype), example
  )
  return make(data, jnp.zeros((num_tasks,), jnp.int32), capacity, max_sequences)


def append(
  buffer: Buffer, task_id: Array, data: Transition, count: Array
) -> Buffer:
  """Appends the first `count` rows of `data` [T, ...] to one task.

  All T rows are written; those past `count` lie beyond `size` and the next
  append overwrites them. So the capacity must hold T rows more than the data:
  the caller guarantees it (`data/capacity.py`).

  Raises:
    ValueError: the buffer stores frames once.
  """
  if buffer.data.next_observation is None:
    raise ValueError('nothing is appended to data that store frames once')
  start = buffer.size[task_id]

  def write(old, new):
    index = (task_id, start) + (0,) * (old.ndim - 2)
    return jax.lax.dynamic_update_slice(old, new[None].astype(old.dtype), index)

  return buffer._replace(
    data=jax.tree.map(write, buffer.data, data),
    size=buffer.size.at[task_id].add(count.astype(jnp.int32)),
  )


def clear(buffer: Buffer, task_id: Array) -> Buffer:
  """Forgets one task's data (PEARL's context buffer)."""
  return buffer._replace(
    size=buffer.size.at[task_id].set(0),
    offline_size=buffer.offline_size.at[task_id].set(0),
    num_sequences=buffer.num_sequences.at[task_id].set(0),
  )


def record_sequence(
  buffer: Buffer, task_id: Array, start: Array, length: Array
) -> Buffer:
  """Notes that rows [start, start + length) are one exploration sequence."""
  slot = buffer.num_sequences[task_id]
  return buffer._replace(
    sequence_start=buffer.sequence_start.at[task_id, slot].set(start),
    sequence_length=buffer.sequence_length.at[task_id, slot].set(length),
    num_sequences=buffer.num_sequences.at[task_id].add(1),
  )


def take(buffer: Buffer, task_id: Array, index: Array) -> Transition:
  """Steps of tasks: task_id and index broadcast to [...] -> leaves [...].

  Frames that are stored once come back as whole transitions.
  """
  data = buffer.data
  steps = jax.tree.map(lambda x: _pick(x, task_id, index), data)
  if data.next_observation is None:
    steps = steps._replace(
      next_observation=_pick(data.observation, task_id, index + 1)
    )
  return steps


def take_windows(
  buffer: Buffer, task_id: Array, index: Array, mask: Array
) -> Trajectory:
  """Consecutive steps: index and mask [..., T], task_id broadcasts to them."""
  data = buffer.data
  first = index[..., :1]
  join = np if isinstance(index, np.ndarray) else jnp
  if data.next_observation is None:
    frames = join.concatenate([first, index + 1], axis=-1)
    observation = _pick(data.observation, task_id, frames)
  else:
    observation = join.concatenate(
      [
        _pick(data.observation, task_id, first),
        _pick(data.next_observation, task_id, index),
      ],
      axis=index.ndim - 1,
    )
  others = data._replace(observation=None, next_observation=None)
  steps = jax.tree.map(lambda x: _pick(x, task_id, index), others)
  return Trajectory(
    observation, steps.action, steps.reward, steps.discount, mask, steps.extras
  )


def _pick(leaf: Array, task_id: Array, index: Array) -> Array:
  """leaf[task_id, index]; by numpy where all are numpy's (memory maps)."""
  if not (isinstance(leaf, np.ndarray) and isinstance(index, np.ndarray)):
    return jnp.asarray(leaf)[task_id, index]
  rows = leaf.reshape((-1, *leaf.shape[2:]))  # of a memory map still a view
  number = np.asarray(task_id, np.int64) * leaf.shape[1] + index
  return np.take(rows, np.minimum(number, len(rows) - 1), axis=0)
