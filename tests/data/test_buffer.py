"""Buffers: what is where after append, clear and record_sequence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from offmeta.data import buffer as buffers
from offmeta.types import Transition


def _rows(first, count, tasks=None):
  """Transitions whose every leaf carries the number of its row."""
  number = np.arange(first, first + count, dtype=np.float32)
  if tasks is not None:
    number = np.float32(number + 100.0 * np.arange(tasks)[:, None])
  wide = lambda size: np.repeat(number[..., None], size, axis=-1)
  return Transition(
    wide(2), wide(1), number, number, wide(2), {'features': wide(3)}
  )


# One program each; outside jit, jax compiles one per operation and shape.
_make = jax.jit(buffers.make, static_argnums=(2, 3))
_append = jax.jit(buffers.append)
_record_sequence = jax.jit(buffers.record_sequence)


def _numbers(buffer, task):
  size = np.asarray(buffer.size)[task]
  return np.asarray(buffer.data.reward)[task, :size]


def test_make_keeps_the_data_as_a_frozen_prefix():
  buffer = _make(_rows(1, 3, tasks=2), np.array([3, 2]), 10, 4)
  assert buffer.data.observation.shape == (2, 10, 2)
  assert buffer.data.extras['features'].shape == (2, 10, 3)
  assert buffer.sequence_start.shape == (2, 4)
  np.testing.assert_array_equal(_numbers(buffer, 0), [1, 2, 3])
  np.testing.assert_array_equal(_numbers(buffer, 1), [101, 102])
  np.testing.assert_array_equal(buffer.offline_size, [3, 2])
  assert buffer.size.dtype == buffer.offline_size.dtype == jnp.int32
  with pytest.raises(ValueError, match='capacity 2 below the 3 rows'):
    buffers.make(_rows(1, 3, tasks=2), np.array([3, 2]), 2)


def test_append_takes_the_first_count_rows_of_one_task():
  buffer = _make(_rows(1, 2, tasks=2), np.array([2, 2]), 12)
  buffer = _append(buffer, 1, _rows(10, 4), np.int32(3))
  np.testing.assert_array_equal(_numbers(buffer, 1), [101, 102, 10, 11, 12])
  # The row past the count is overwritten.
  buffer = _append(buffer, 1, _rows(20, 4), np.int32(2))
  np.testing.assert_array_equal(
    _numbers(buffer, 1), [101, 102, 10, 11, 12, 20, 21]
  )
  # Nothing, and the other task, stay as they are.
  buffer = _append(buffer, 1, _rows(30, 4), np.int32(0))
  np.testing.assert_array_equal(buffer.size, [2, 7])
  np.testing.assert_array_equal(_numbers(buffer, 0), [1, 2])
  np.testing.assert_array_equal(buffer.offline_size, [2, 2])
  # Every leaf is written.
  buffer = jax.device_get(buffer)
  np.testing.assert_array_equal(buffer.data.observation[1, 5], [20, 20])
  np.testing.assert_array_equal(buffer.data.action[1, 5], [20])
  np.testing.assert_array_equal(buffer.data.discount[1, 5], 20)
  np.testing.assert_array_equal(buffer.data.next_observation[1, 5], [20, 20])
  np.testing.assert_array_equal(
    buffer.data.extras['features'][1, 5], [20, 20, 20]
  )


def test_empty_then_append():
  example = jax.tree.map(lambda x: x[0], _rows(0, 1))
  buffer = buffers.empty(example, 2, 5)
  np.testing.assert_array_equal(buffer.size, [0, 0])
  buffer = _append(buffer, 0, _rows(7, 2), np.int32(2))
  np.testing.assert_array_equal(_numbers(buffer, 0), [7, 8])
  np.testing.assert_array_equal(buffer.offline_size, [0, 0])


def test_clear_forgets_one_task():
  buffer = _make(_rows(1, 2, tasks=2), np.array([2, 2]), 8, 2)
  buffer = _record_sequence(buffer, 0, np.int32(0), np.int32(2))
  buffer = jax.jit(buffers.clear)(buffer, 0)
  np.testing.assert_array_equal(buffer.size, [0, 2])
  np.testing.assert_array_equal(buffer.offline_size, [0, 2])
  np.testing.assert_array_equal(buffer.num_sequences, [0, 0])
  buffer = _append(buffer, 0, _rows(50, 2), np.int32(2))
  np.testing.assert_array_equal(_numbers(buffer, 0), [50, 51])


def test_record_sequence_and_take():
  buffer = _make(_rows(0, 6, tasks=2), np.array([6, 6]), 6, 3)
  for start, length in ((0, 4), (4, 2)):
    buffer = _record_sequence(buffer, 1, np.int32(start), np.int32(length))
  buffer = jax.device_get(buffer)
  np.testing.assert_array_equal(buffer.num_sequences, [0, 2])
  np.testing.assert_array_equal(buffer.sequence_start[1, :2], [0, 4])
  np.testing.assert_array_equal(buffer.sequence_length[1, :2], [4, 2])
  taken = jax.jit(buffers.take)(buffer, 1, np.array([5, 0, 5]))
  np.testing.assert_array_equal(taken.reward, [105, 100, 105])
  np.testing.assert_array_equal(
    taken.observation, [[105, 105], [100, 100], [105, 105]]
  )


def test_replay_contexts():
  buffer = _make(_rows(0, 2, tasks=1), np.array([2]), 2)
  other = _make(_rows(5, 2, tasks=1), np.array([2]), 2)
  assert buffers.Replay(buffer, None).contexts() is buffer
  assert buffers.Replay(buffer, other).contexts() is other
