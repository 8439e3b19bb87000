"""From a replay to batches over tasks, inside jit.

Every random number is a function of (key, update, slot): a task slot draws
the same batch on one device and on many.
"""

import jax
import jax.numpy as jnp

from offmeta.data import buffer as buffers
from offmeta.data.buffer import Buffer, Replay
from offmeta.types import Array, BatchSpec, Key, MetaBatch, Transition

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
  key: Key,
  buffer: Buffer,
  task_id: Array,
  count: int,
  offline: bool,
  replacement: bool = True,
) -> tuple[Transition, Array]:
  """`count` transitions of one task, uniform.

  Args:
    key: random key.
    buffer: encoder buffer.
    task_id: [].
    count: N.
    offline: draw from the frozen offline prefix only.
    replacement: whether a row can be drawn twice.

  Returns:
    Context leaves [N, ...], mask [N] (all 0 when the task has no data).
  """
  size = (buffer.offline_size if offline else buffer.size)[task_id]
  rows = _rows(key, buffer, size, count, replacement)
  mask = jnp.full((count,), (size > 0).astype(jnp.float32))
  return buffers.take(buffer, task_id, rows), mask


def draw_sequence(
  key: Key, buffer: Buffer, task_id: Array, num_episodes: int, length: int
) -> tuple[Transition, Array]:
  """The first episodes of a recorded sequence of one task.

  Args:
    key: random key.
    buffer: with a table of sequences, and 'time' among the extras.
    task_id: [].
    num_episodes: how many; what follows is left out.
    length: N; what is shorter is padded.

  Returns:
    Context leaves [N, ...], mask [N] (all 0 when the task has no sequence).
  """
  rows, mask = _sequences(key, buffer, task_id, 1, length)
  steps = buffers.take(buffer, task_id, rows)
  begins = (steps.extras['time'] == 0) & (jnp.arange(length) > 0)
  return steps, mask * (jnp.cumsum(begins) < num_episodes)


def _rows(key, buffer, size, count, replacement):
  if replacement:
    return uniform_rows(key, size, count)
  return distinct_rows(key, size, count, buffer.data.reward.shape[1])


def _shared_rows(
  key: Key, buffer: Buffer, task_id: Array, spec: BatchSpec
) -> Array:
  """Query rows, `spec.online_share` of them from what came after the start."""
  offline = buffer.offline_size[task_id]
  new = buffer.size[task_id] - offline
  k_offline, k_new = jax.random.split(key)
  count = round(spec.online_share * spec.query_size)
  from_new = (jnp.arange(spec.query_size) < count) & (new > 0)
  return jnp.where(
    from_new,
    offline + uniform_rows(k_new, new, spec.query_size),
    uniform_rows(k_offline, offline, spec.query_size),
  )


def slice_rows(
  key: Key, buffer: Buffer, task_id: Array, count: int
) -> tuple[Array, Array]:
  """Rows [count] in a row from a random start, and their mask.

  Spec macaw 2.5: the last possible start is never drawn. A log that is not
  longer is taken whole; what is missing counts not.
  """
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


def _exploration_rows(
  key: Key, buffer: Buffer, task_id: Array, spec: BatchSpec
) -> tuple[Array, Array]:
  """Rows [N'] and mask [N'] of a context composed as at meta-test.

  With probability 1 - offline_share all steps of one exploration sequence of
  the task, else `context_size` uniform draws from its offline data.
  """
  length = max(spec.sequence_size, spec.context_size)
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
  in_offline = (position < spec.context_size) & (offline_size > 0)
  mask = jnp.where(from_offline, in_offline, in_sequence)
  return rows, mask.astype(jnp.float32)


def sample_batch(
  key: Key, step: Array, slots: Array, spec: BatchSpec, replay: Replay
) -> MetaBatch:
  """The batch of one update for the given task slots.

  Context and query are independent draws (specs smac 2.2, macaw 2.5).

  Args:
    key: root key of the batches.
    step: [] update number.
    slots: [M_local] positions in the meta-batch that this device serves.
    spec: composition.
    replay: buffers of all training tasks.

  Returns:
    MetaBatch with M_local tasks.
  """
  tasks = draw_tasks(key, step, spec, replay.rl.size.shape[0])[slots]
  contexts = replay.contexts()

  def stream(number):
    base = jax.random.fold_in(jax.random.fold_in(key, number), step)
    return jax.vmap(lambda slot: jax.random.fold_in(base, slot))(slots)

  def query(k, task):
    if spec.online_share < 0:
      rows = _rows(
        k, replay.rl, replay.rl.size[task], spec.query_size, spec.replacement
      )
    else:
      rows = _shared_rows(k, replay.rl, task, spec)
    return buffers.take(replay.rl, task, rows)

  def context(k, task):
    if spec.context in ('transitions', 'offline'):
      return draw_context(
        k,
        contexts,
        task,
        spec.context_size,
        spec.context == 'offline',
        spec.replacement,
      )
    if spec.context == 'slice':
      rows, mask = slice_rows(k, contexts, task, spec.context_size)
    elif spec.context == 'sequences':
      rows, mask = _sequences(
        k, contexts, task, spec.num_sequences, spec.sequence_size
      )
    elif spec.context == 'episodes':
      rows, mask = _exploration_rows(k, contexts, task, spec)
    else:
      raise ValueError(f'BatchSpec.context: unknown {spec.context!r}')
    return buffers.take(contexts, task, rows), mask

  context_data, mask = jax.vmap(context)(stream(_CONTEXT), tasks)
  return MetaBatch(
    task_id=tasks,
    slot=slots,
    context=context_data,
    context_mask=mask,
    query=jax.vmap(query)(stream(_QUERY), tasks),
  )
