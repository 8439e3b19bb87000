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
  """Training tasks [num_tasks] of one update, uniform with replacement."""
  key = jax.random.fold_in(
      jax.random.fold_in(key, _TASKS), step - step % spec.task_repeat)
  return jax.random.randint(key, (spec.num_tasks,), 0, num_train)


def uniform_rows(key: Key, size: Array, count: int) -> Array:
  """`count` row numbers, uniform with replacement in [0, size)."""
  return jax.random.randint(key, (count,), 0, jnp.maximum(size, 1))


def draw_context(
    key: Key, buffer: Buffer, task_id: Array, count: int, offline: bool
) -> tuple[Transition, Array]:
  """`count` transitions of one task, uniform with replacement.

  Args:
    key: random key.
    buffer: encoder buffer.
    task_id: [].
    count: N.
    offline: draw from the frozen offline prefix only.

  Returns:
    Context leaves [N, ...], mask [N] (all 0 when the task has no data).
  """
  size = (buffer.offline_size if offline else buffer.size)[task_id]
  rows = uniform_rows(key, size, count)
  mask = jnp.full((count,), (size > 0).astype(jnp.float32))
  return buffers.take(buffer, task_id, rows), mask


def _sequence_rows(
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
  start = buffer.sequence_start[task_id, sequence]
  in_sequence = position < jnp.minimum(
      buffer.sequence_length[task_id, sequence], spec.sequence_size)
  offline_size = buffer.offline_size[task_id]
  offline_rows = uniform_rows(k_rows, offline_size, length)
  from_offline = (
      jax.random.uniform(k_kind) < spec.offline_share) | (known == 0)
  rows = jnp.where(
      from_offline, offline_rows, jnp.where(in_sequence, start + position, 0))
  in_offline = (position < spec.context_size) & (offline_size > 0)
  mask = jnp.where(from_offline, in_offline, in_sequence)
  return rows, mask.astype(jnp.float32)


def sample_batch(
    key: Key, step: Array, slots: Array, spec: BatchSpec, replay: Replay
) -> MetaBatch:
  """The batch of one update for the given task slots.

  Context and query are independent draws with replacement (spec smac 2.2).

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
    rows = uniform_rows(k, replay.rl.size[task], spec.query_size)
    return buffers.take(replay.rl, task, rows)

  def context(k, task):
    if spec.context == 'episodes':
      rows, mask = _sequence_rows(k, contexts, task, spec)
      return buffers.take(contexts, task, rows), mask
    return draw_context(
        k, contexts, task, spec.context_size, spec.context == 'offline')

  context_data, mask = jax.vmap(context)(stream(_CONTEXT), tasks)
  return MetaBatch(
      task_id=tasks,
      slot=slots,
      context=context_data,
      context_mask=mask,
      query=jax.vmap(query)(stream(_QUERY), tasks),
  )
