"""From a replay to batches over tasks, inside jit.

Every random number is a function of (key, update, slot): a task slot draws
the same batch on one device and on many.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from offmeta.data import buffer as buffers
from offmeta.data.buffer import Buffer, Replay
from offmeta.types import (
  Array,
  BatchSpec,
  Exploration,
  Key,
  MetaBatch,
  Rows,
  Sequences,
  Slice,
  Transition,
  Windows,
)

_TASKS, _QUERY, _CONTEXT = range(3)  # random streams


def draw_tasks(key: Key, step: Array, spec: BatchSpec, num_train: int) -> Array:
  """Training tasks [num_tasks] of one update, uniform.

  Raises:
    ValueError: without replacement more than there are.
  """
  key = jax.random.fold_in(
    jax.random.fold_in(key, _TASKS), step - step % spec.task_repeat
  )
  if spec.replacement:
    return jax.random.randint(key, (spec.num_tasks,), 0, num_train)
  if spec.num_tasks > num_train:
    raise ValueError(
      f'a meta-batch of {spec.num_tasks} tasks, drawn without replacement,'
      f' from {num_train} training tasks; make num_tasks smaller'
    )
  return jax.random.permutation(key, num_train)[: spec.num_tasks]


def uniform_rows(key: Key, size: Array, count: int) -> Array:
  """`count` row numbers, uniform with replacement in [0, size)."""
  return jax.random.randint(key, (count,), 0, jnp.maximum(size, 1))


def distinct_rows(key: Key, size: Array, count: int, capacity: int) -> Array:
  """`count` row numbers, uniform without replacement in [0, size).

  If there are fewer, all of them and further ones with replacement.

  Args:
    key: random key.
    size: [], at most `capacity`.
    count: how many.
    capacity: rows of the buffer.
  """
  k_order, k_more = jax.random.split(key)
  order = jax.random.uniform(k_order, (capacity,))
  order = jnp.where(jnp.arange(capacity) < size, order, -1.0)
  _, rows = jax.lax.top_k(order, min(count, capacity))
  rows = jnp.pad(rows, (0, count - rows.shape[0]))
  return jnp.where(
    jnp.arange(count) < size, rows, uniform_rows(k_more, size, count)
  )


def draw_context(
  key: Key, buffer: Buffer, task_id: Array, count: int, offline: bool
) -> tuple[Transition, Array]:
  """`count` transitions of one task, uniform.

  Args:
    key: random key.
    buffer: context buffer.
    task_id: [].
    count: N.
    offline: draw from the frozen offline prefix only.

  Returns:
    Context leaves [N, ...], mask [N] (all 0 when the task has no data).
  """
  spec = Rows(count, 'offline' if offline else 'all')
  rows, mask = draw_rows(key, buffer, task_id, spec)
  return buffers.take(buffer, task_id, rows), mask


def draw_rows(
  key: Key, buffer: Buffer, task_id: Array, spec: Rows
) -> tuple[Array, Array]:
  """Rows [size] of one task, and their mask (all 0 when it has none).

  Raises:
    ValueError: a part that is not known, or that contradicts the share.
  """
  if spec.part not in ('all', 'offline'):
    raise ValueError(f'Rows.part: unknown {spec.part!r}; known: all, offline')
  if spec.online_share >= 0:
    if spec.part == 'offline' or not spec.replacement:
      raise ValueError(
        'Rows.online_share: shares are drawn from all rows, with replacement'
      )
    rows = _shared_rows(key, buffer, task_id, spec)
    known = buffer.size[task_id]
  else:
    known = (buffer.size if spec.part == 'all' else buffer.offline_size)[
      task_id
    ]
    rows = _uniform(key, buffer, task_id, known, spec)
  mask = jnp.full((spec.size,), (known > 0).astype(jnp.float32))
  return rows, mask


def _uniform(key, buffer, task_id, size, spec: Rows) -> Array:
  if buffer.data.next_observation is None:
    # Nothing is appended to such data, and the table knows all its steps.
    ends = jnp.cumsum(buffer.sequence_length[task_id])
    number = _of_first(key, ends[-1], spec, buffer.capacity)
    sequence = jnp.searchsorted(ends, number, side='right')
    before = ends[sequence] - buffer.sequence_length[task_id, sequence]
    return buffer.sequence_start[task_id, sequence] + number - before
  return _of_first(key, size, spec, buffer.capacity)


def _of_first(key, size, spec: Rows, capacity: int) -> Array:
  if spec.replacement:
    return uniform_rows(key, size, spec.size)
  return distinct_rows(key, size, spec.size, capacity)


def _shared_rows(key: Key, buffer: Buffer, task_id: Array, spec: Rows) -> Array:
  """Rows, `spec.online_share` of them from what came after the start."""
  _require_appended(buffer, spec)
  offline = buffer.offline_size[task_id]
  new = buffer.size[task_id] - offline
  k_offline, k_new = jax.random.split(key)
  count = round(spec.online_share * spec.size)
  from_new = (jnp.arange(spec.size) < count) & (new > 0)
  return jnp.where(
    from_new,
    offline + uniform_rows(k_new, new, spec.size),
    uniform_rows(k_offline, offline, spec.size),
  )


def _require_appended(buffer: Buffer, spec):
  """Refuses what cannot be drawn where rows are not all steps."""
  if buffer.data.next_observation is None:
    raise ValueError(
      f'{spec}: not of data that store frames once, where the last row of an'
      ' episode is no step; use Windows, Sequences, or Rows of everything'
    )


def slice_rows(
  key: Key, buffer: Buffer, task_id: Array, spec: Slice
) -> tuple[Array, Array]:
  """Rows [size] in a row from a random start, and their mask.

  As in MACAW's release, the last possible start is never drawn. A log that is
  not longer is taken whole; what is missing does not count.
  """
  _require_appended(buffer, spec)
  count = spec.size
  size = buffer.size[task_id]
  start = jax.random.randint(key, (), 0, jnp.maximum(size - count, 1))
  position = jnp.arange(count)
  mask = position < size
  return jnp.where(mask, start + position, 0), mask.astype(jnp.float32)


def sequence_rows(
  buffer: Buffer, task_id: Array, sequence: Array, length: int
) -> tuple[Array, Array]:
  """Rows [length] of one recorded sequence of a task, and their mask.

  Args:
    buffer: with a table of sequences.
    task_id: [].
    sequence: [], which.
    length: rows to pad to; a longer sequence is cut.
  """
  position = jnp.arange(length)
  mask = position < buffer.sequence_length[task_id, sequence]
  start = buffer.sequence_start[task_id, sequence]
  return jnp.where(mask, start + position, 0), mask.astype(jnp.float32)


def _sequences(
  key: Key, buffer: Buffer, task_id: Array, number: int, length: int
) -> tuple[Array, Array]:
  """Rows and mask [number * length]; all 0 without sequences."""
  known = buffer.num_sequences[task_id]
  chosen = uniform_rows(key, known, number)
  rows, mask = jax.vmap(
    lambda sequence: sequence_rows(buffer, task_id, sequence, length)
  )(chosen)
  return rows.reshape(-1), mask.reshape(-1) * (known > 0)


def exploration_rows(
  key: Key, buffer: Buffer, task_id: Array, spec: Exploration
) -> tuple[Array, Array]:
  """Rows [N'] and mask [N'] of a context composed as at meta-test.

  With probability 1 - offline_share all steps of one exploration sequence of
  the task, else `size` uniform draws from its offline data.
  """
  _require_appended(buffer, spec)
  length = max(spec.sequence_size, spec.size)
  k_kind, k_sequence, k_rows = jax.random.split(key, 3)
  known = buffer.num_sequences[task_id]
  sequence = jax.random.randint(k_sequence, (), 0, jnp.maximum(known, 1))
  position = jnp.arange(length)
  sequence_row, in_sequence = sequence_rows(buffer, task_id, sequence, length)
  in_sequence *= position < spec.sequence_size
  offline_size = buffer.offline_size[task_id]
  offline_rows = uniform_rows(k_rows, offline_size, length)
  from_offline = (jax.random.uniform(k_kind) < spec.offline_share) | (
    known == 0
  )
  rows = jnp.where(from_offline, offline_rows, sequence_row)
  in_offline = (position < spec.size) & (offline_size > 0)
  mask = jnp.where(from_offline, in_offline, in_sequence)
  return rows, mask.astype(jnp.float32)


def window_rows(
  key: Key, buffer: Buffer, task_id: Array, spec: Windows
) -> tuple[Array, Array]:
  """Rows [count, length] and their mask; all 0 without sequences.

  After the end of a sequence its last step is repeated.

  Raises:
    ValueError: the buffer keeps no table of sequences.
  """
  if not buffer.sequence_start.shape[-1]:
    raise ValueError(
      f'{spec}: windows are cut from recorded sequences, and this buffer keeps'
      ' no table of them; set sequence_episodes=1 in the DataSpec'
    )
  k_sequence, k_start = jax.random.split(key)
  known = buffer.num_sequences[task_id]
  sequence = uniform_rows(k_sequence, known, spec.count)
  steps = buffer.sequence_length[task_id, sequence][:, None]
  latest = jnp.maximum(steps - spec.length, 0)
  start = jax.random.randint(k_start, latest.shape, 0, latest + 1)
  position = start + jnp.arange(spec.length)
  mask = (position < steps) & (known > 0)
  first = buffer.sequence_start[task_id, sequence][:, None]
  rows = first + jnp.minimum(position, jnp.maximum(steps - 1, 0))
  return rows, mask.astype(jnp.float32)


# By type of the specification: (key, buffer, task, specification) -> (rows,
# mask), of one task.
_DRAWS = {
  Rows: draw_rows,
  Slice: slice_rows,
  Sequences: lambda key, buffer, task_id, spec: _sequences(
    key, buffer, task_id, spec.count, spec.length
  ),
  Exploration: exploration_rows,
  Windows: window_rows,
}


def rows_of(
  key: Key, buffer: Buffer, task_id: Array, spec: Any
) -> tuple[Array, Array]:
  """Draws rows of one task, by the type of the specification.

  Args:
    key: random key.
    buffer: of all tasks; of its data only shapes are looked at.
    task_id: [].
    spec: Rows, Slice, Sequences, Exploration or Windows.

  Returns:
    Rows and mask, [N]; of Windows [count, length].

  Raises:
    TypeError: something else.
  """
  if type(spec) not in _DRAWS:
    raise TypeError(f'BatchSpec: {spec!r} is not drawn from a replay')
  return _DRAWS[type(spec)](key, buffer, task_id, spec)


class Draw(NamedTuple):
  """A batch before its data are looked up: which rows of which tasks.

  Attributes:
    task_id, slot: [M], see `MetaBatch`.
    query, query_mask: [M, ...], rows of the query buffer.
    context, context_mask: [M, N], rows of the context buffer; or None.
  """

  task_id: Array
  slot: Array
  query: Array
  query_mask: Array
  context: Array | None
  context_mask: Array | None


def draw(
  key: Key, step: Array, slots: Array, spec: BatchSpec, replay: Replay
) -> Draw:
  """Draws the rows of one update for the given task slots.

  Context and query are independent draws, as in the releases of SMAC and
  MACAW. Of the data only shapes are looked at, so `Replay.tables` will do.

  Args:
    key: root key of the batches.
    step: [] update number.
    slots: [M_local] positions in the meta-batch that this device serves.
    spec: composition.
    replay: buffers of all training tasks.

  Raises:
    TypeError: what is not drawn from a replay (`Rollout`).
  """
  tasks = draw_tasks(key, step, spec, replay.query.size.shape[0])[slots]

  def rows(number, buffer, part):
    base = jax.random.fold_in(jax.random.fold_in(key, number), step)
    keys = jax.vmap(lambda slot: jax.random.fold_in(base, slot))(slots)
    return jax.vmap(lambda k, task: rows_of(k, buffer, task, part))(keys, tasks)

  context = None, None
  if spec.context is not None:
    context = rows(_CONTEXT, replay.contexts(), spec.context)
  return Draw(tasks, slots, *rows(_QUERY, replay.query, spec.query), *context)


def collect(replay: Replay, drawn: Draw, spec: BatchSpec) -> MetaBatch:
  """Looks up what was drawn, leaves [..., M, N, ...] for `drawn` [..., M, N].

  By numpy if both are numpy's: a memory map is read where it is needed.
  """

  def task(rows):  # [..., M] -> [..., M, 1, ...]
    shape = drawn.task_id.shape
    return drawn.task_id.reshape(shape + (1,) * (rows.ndim - len(shape)))

  rows = drawn.query
  if isinstance(spec.query, Windows):
    query = buffers.take_windows(
      replay.query, task(rows), rows, drawn.query_mask
    )
  else:
    query = buffers.take(replay.query, task(rows), rows)
  context = None
  if drawn.context is not None:
    context = buffers.take(
      replay.contexts(), task(drawn.context), drawn.context
    )
  return MetaBatch(
    task_id=drawn.task_id,
    slot=drawn.slot,
    context=context,
    context_mask=drawn.context_mask,
    query=query,
  )


def sample_batch(
  key: Key, step: Array, slots: Array, spec: BatchSpec, replay: Replay
) -> MetaBatch:
  """The batch of one update: `draw`, then `collect`."""
  return collect(replay, draw(key, step, slots, spec, replay), spec)
