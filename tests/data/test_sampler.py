"""Batches: composition, independence, uniformity, slots."""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from offmeta.data import buffer as buffers, sampler
from offmeta.data.buffer import Replay
from offmeta.types import (
  BatchSpec,
  Exploration,
  Rollout,
  Rows,
  Sequences,
  Slice,
  Transition,
  Windows,
)

_TASKS, _OFFLINE, _CAPACITY = 3, 6, 20
_SIZES = np.array([20, 14, 6])
# Of task 0: rows 6 to 9, 10 to 16; of task 1: rows 6 to 11; none of task 2.
_SEQUENCES = {0: [(6, 4), (10, 7)], 1: [(6, 6)], 2: []}
_KEY = jax.random.key(0)


@pytest.fixture(name='replay', scope='module')
def _replay():
  """Rewards are 100 * task + row in the queries, 1000 more in contexts."""
  return _make_replay()


@jax.jit
def _make_replay():
  number = jnp.arange(_CAPACITY) + 100.0 * jnp.arange(_TASKS)[:, None]
  wide = number[..., None]

  def make(number, wide):
    buffer = buffers.make(
      Transition(wide, wide, number, jnp.ones_like(number), wide),
      jnp.full(_TASKS, _OFFLINE),
      _CAPACITY,
      2,
    )
    buffer = buffer._replace(size=jnp.array(_SIZES, jnp.int32))
    for task, sequences in _SEQUENCES.items():
      for start, length in sequences:
        buffer = buffers.record_sequence(
          buffer, task, jnp.int32(start), jnp.int32(length)
        )
    return buffer

  return Replay(make(number, wide), make(number + 1000, wide + 1000))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _draw(replay, spec, steps, slots):
  return jax.vmap(
    lambda step: sampler.sample_batch(_KEY, step, slots, spec, replay)
  )(jnp.arange(steps))


def _sample(replay, spec, steps=500, slots=None):
  """MetaBatch with leaves [steps, M, ...] as numpy."""
  slots = np.arange(spec.num_tasks) if slots is None else slots
  return jax.device_get(_draw(replay, spec, steps, slots))


def _split(batch):
  """(task of each row, row number) of query and context rewards."""
  task = batch.task_id[..., None]
  return (
    batch.query.reward - 100 * task,
    batch.context.reward - 1000 - 100 * task,
  )


def test_transitions_batch(replay):
  spec = BatchSpec(4, Rows(7), Rows(5))
  batch = _sample(replay, spec)
  assert batch.query.reward.shape == (500, 4, 7)
  assert batch.context.observation.shape == (500, 4, 5, 1)
  np.testing.assert_array_equal(batch.context_mask, np.ones((500, 4, 5)))
  np.testing.assert_array_equal(batch.slot, np.tile(np.arange(4), (500, 1)))
  # Leaves belong together.
  for part in (batch.query, batch.context):
    np.testing.assert_array_equal(part.observation[..., 0], part.reward)
  query, context = _split(batch)
  for task in range(_TASKS):
    at = batch.task_id == task
    # All valid rows of the task are drawn, no other ones.
    for rows in (query[at], context[at]):
      assert set(rows.ravel()) == set(range(_SIZES[task]))


def test_draws_are_uniform(replay):
  spec = BatchSpec(4, Rows(7), Rows(5))
  batch = _sample(replay, spec)
  tasks = np.bincount(batch.task_id.ravel(), minlength=_TASKS)
  assert stats.chisquare(tasks).pvalue > 1e-3
  query, context = _split(batch)
  for task in range(_TASKS):
    at = batch.task_id == task
    for rows in (query[at], context[at]):
      counts = np.bincount(rows.ravel().astype(int))
      assert stats.chisquare(counts).pvalue > 1e-3
  # Context and query are independent: equal rows in the first place as often
  # as chance has it, 1 / size.
  at = batch.task_id == 0
  equal = np.mean(query[at][:, 0] == context[at][:, 0])
  assert abs(equal - 1 / 20) < 4 * np.sqrt(0.05 * 0.95 / at.sum())


def test_one_buffer_for_both_roles_still_draws_independently(replay):
  spec = BatchSpec(4, Rows(7), Rows(5))
  batch = _sample(Replay(replay.query, None), spec)
  assert batch.context.reward.max() < 1000
  assert np.mean(batch.context.reward == batch.query.reward[..., :5]) < 0.2


def test_offline_contexts_come_from_the_frozen_prefix(replay):
  spec = BatchSpec(4, Rows(7), Rows(5, 'offline'))
  batch = _sample(replay, spec)
  query, context = _split(batch)
  assert set(context.ravel()) == set(range(_OFFLINE))
  assert query.max() == 19


def test_draw_context(replay):
  draw = jax.jit(sampler.draw_context, static_argnums=(3, 4))
  for offline, known in ((True, _OFFLINE), (False, 14)):
    context, mask = draw(_KEY, replay.context, 1, 200, offline)
    assert set(np.asarray(context.reward)) == set(1100 + np.arange(known))
    np.testing.assert_array_equal(mask, np.ones(200))
  empty = buffers.clear(replay.context, 1)
  for offline in (True, False):
    context, mask = draw(_KEY, empty, 1, 5, offline)
    np.testing.assert_array_equal(mask, np.zeros(5))
    assert np.all(np.isfinite(context.reward))


def _exploration(sequence_size=8, offline_share=0.0):
  return BatchSpec(4, Rows(2), Exploration(3, sequence_size, offline_share))


def test_episode_contexts_are_whole_sequences_in_order(replay):
  batch = _sample(replay, _exploration())
  _, context = _split(batch)
  seen = {task: set() for task in range(_TASKS)}
  for task, rows, mask in zip(
    batch.task_id.ravel(),
    context.reshape(-1, 8),
    batch.context_mask.reshape(-1, 8),
  ):
    assert set(np.diff(mask)) <= {0.0, -1.0}, 'the mask is not a prefix'
    kept = rows[mask > 0]
    if task == 2:  # no sequence yet: offline data instead
      assert len(kept) == 3 and kept.max() < _OFFLINE
      continue
    start, length = next(s for s in _SEQUENCES[task] if s[0] == kept[0])
    np.testing.assert_array_equal(kept, np.arange(start, start + length))
    seen[task].add((start, length))
  assert seen[0] == set(_SEQUENCES[0]) and seen[1] == set(_SEQUENCES[1])


def test_long_sequences_are_cut_at_their_first_steps(replay):
  spec = _exploration(sequence_size=5)
  batch = _sample(replay, spec)
  _, context = _split(batch)
  lengths = set()
  for task, rows, mask in zip(
    batch.task_id.ravel(),
    context.reshape(-1, 5),
    batch.context_mask.reshape(-1, 5),
  ):
    if task == 0:
      kept = rows[mask > 0]
      np.testing.assert_array_equal(kept, kept[0] + np.arange(len(kept)))
      assert kept[0] in (6, 10)
      lengths.add(len(kept))
  assert lengths == {4, 5}


def test_offline_share_of_episode_contexts(replay):
  batch = _sample(replay, _exploration(offline_share=0.3))
  _, context = _split(batch)
  at = batch.task_id < 2
  first, size = context[at][:, 0], batch.context_mask[at].sum(-1)
  offline = first < _OFFLINE
  np.testing.assert_array_equal(size[offline], 3)
  assert abs(offline.mean() - 0.3) < 4 * np.sqrt(0.3 * 0.7 / offline.size)
  kept = context[at][offline][:, :3]
  assert set(kept.ravel()) == set(range(_OFFLINE))


def test_episode_context_without_any_data_is_empty(replay):
  encoder = replay.context
  for task in range(_TASKS):
    encoder = buffers.clear(encoder, task)
  batch = _sample(Replay(replay.query, encoder), _exploration())
  assert not batch.context_mask.any()


def test_task_repeat_keeps_tasks_for_k_updates(replay):
  spec = BatchSpec(4, Rows(2), Rows(2), task_repeat=3)
  batch = _sample(replay, spec, 30)
  by_group = batch.task_id.reshape(10, 3, 4)
  np.testing.assert_array_equal(by_group, np.repeat(by_group[:, :1], 3, axis=1))
  assert len({tuple(group[0]) for group in by_group}) > 5
  # The data are new every time.
  assert not np.array_equal(batch.query.reward[0], batch.query.reward[1])
  assert not np.array_equal(batch.context.reward[0], batch.context.reward[1])


@pytest.mark.parametrize(
  'spec',
  [
    BatchSpec(4, Rows(7), Rows(5)),
    _exploration(offline_share=0.3),
  ],
  ids=['transitions', 'episodes'],
)
def test_a_slot_draws_the_same_on_any_device(replay, spec):
  whole = _sample(replay, spec)
  some = _sample(replay, spec, slots=jnp.array([2, 3]))
  jax.tree.map(
    lambda x, y: np.testing.assert_array_equal(x[:, 2:], y), whole, some
  )
  # Slots with the same task draw different rows.
  same = whole.task_id[:, 0] == whole.task_id[:, 1]
  assert same.any() and not np.array_equal(
    whole.query.reward[same][:, 0], whole.query.reward[same][:, 1]
  )


def test_tasks_without_replacement(replay):
  spec = BatchSpec(2, Rows(1), replacement=False)
  batch = _sample(replay, spec, steps=3000)
  assert np.all(batch.task_id[:, 0] != batch.task_id[:, 1])
  counts = np.unique(batch.task_id, axis=0, return_counts=True)[1]
  assert len(counts) == 6  # ordered pairs of 3
  assert stats.chisquare(counts).pvalue > 1e-3
  with pytest.raises(ValueError, match='a meta-batch of 4 tasks, .* from 3'):
    _sample(replay, spec._replace(num_tasks=4))


def test_rows_without_replacement(replay):
  spec = BatchSpec(
    3,
    Rows(10, replacement=False),
    Rows(5, replacement=False),
    replacement=False,
  )
  batch = _sample(replay, spec, steps=3000)
  query, context = _split(batch)
  for task, size in enumerate(_SIZES):
    chosen = query[batch.task_id == task]
    distinct = np.array([len(set(rows)) for rows in chosen])
    assert np.all(distinct >= min(10, size)), 'a row was drawn twice'
    if size >= 10:
      counts = np.bincount(chosen.ravel().astype(int), minlength=size)
      assert len(counts) == size
      # Rows of one draw repel each other: an upper bound on the deviation.
      assert stats.chisquare(counts).pvalue > 1e-3
  distinct = [len(set(rows)) for rows in context.reshape(-1, 5)]
  assert set(distinct) == {5}
  # With too few rows all are there, and the rest is drawn among them.
  few = query[batch.task_id == 2]
  assert few.min() == 0 and few.max() == _SIZES[2] - 1
  assert {len(set(rows)) for rows in few} == {6}


def test_slices_are_consecutive(replay):
  spec = BatchSpec(2, Rows(1), Slice(8))
  batch = _sample(replay, spec, steps=2000)
  _, context = _split(batch)
  for task, size in enumerate(_SIZES):
    rows = context[batch.task_id == task]
    mask = batch.context_mask[batch.task_id == task]
    count = min(8, size)
    np.testing.assert_array_equal(
      mask, np.tile(np.arange(8) < count, (len(rows), 1))
    )
    assert np.all(np.diff(rows[:, :count], axis=1) == 1)
    starts = np.bincount(rows[:, 0].astype(int))
    assert len(starts) == max(size - count, 1)  # not from the last start
    if len(starts) > 1:
      assert stats.chisquare(starts).pvalue > 1e-3


def test_several_whole_sequences(replay):
  spec = BatchSpec(2, Rows(1), Sequences(3, 7))
  batch = _sample(replay, spec, steps=600)
  _, context = _split(batch)
  assert context.shape == (600, 2, 21)
  seen = set()
  for task, rows, mask in zip(
    batch.task_id.ravel(),
    context.reshape(-1, 3, 7),
    batch.context_mask.reshape(-1, 3, 7),
  ):
    if not _SEQUENCES[task]:
      assert not mask.any()
      continue
    for one, valid in zip(rows, mask):
      length = int(valid.sum())
      assert valid[:length].all()
      assert (one[0], length) in _SEQUENCES[task]
      np.testing.assert_array_equal(one[:length], one[0] + np.arange(length))
      seen.add((task, one[0]))
  assert seen == {(0, 6), (0, 10), (1, 6)}


# Checksums of the draws of seven updates (tasks, query, context, mask) as they
# have been since these kinds exist: the numbers of every run hang on them.
_DRAWS = {
  BatchSpec(4, Rows(7), Rows(5)): (
    2665901757,
    3743574868,
    4287953575,
    3766754557,
  ),
  BatchSpec(4, Rows(7), Rows(5, 'offline')): (
    2665901757,
    3743574868,
    3248653474,
    3766754557,
  ),
  BatchSpec(4, Rows(2), Exploration(3, 8, 0.3)): (
    2665901757,
    3509749830,
    455105110,
    769922514,
  ),
  BatchSpec(2, Rows(3), Slice(8)): (
    4275119601,
    2951061277,
    135486824,
    3240288559,
  ),
  BatchSpec(2, Rows(2), Sequences(3, 7)): (
    4275119601,
    1140345065,
    2135703016,
    2100815626,
  ),
  BatchSpec(
    3,
    Rows(10, replacement=False),
    Rows(5, replacement=False),
    replacement=False,
  ): (4254548656, 317403698, 1391245927, 2004538261),
  BatchSpec(2, Rows(4, replacement=False), Slice(8), replacement=False): (
    437927872,
    292833030,
    3100182449,
    1973411246,
  ),
  BatchSpec(4, Rows(8, online_share=0.5), Rows(5)): (
    2665901757,
    1409319902,
    4287953575,
    3766754557,
  ),
  BatchSpec(4, Rows(2), Rows(2), task_repeat=3): (
    580406272,
    64981082,
    3278348748,
    1994289511,
  ),
}


@pytest.mark.parametrize('spec', _DRAWS, ids=str)
def test_the_draws_stay_what_they_were(replay, spec):
  batch = _sample(replay, spec, steps=7)
  parts = (
    batch.task_id,
    batch.query.reward,
    batch.context.reward,
    batch.context_mask,
  )
  found = tuple(zlib.crc32(np.ascontiguousarray(x).tobytes()) for x in parts)
  assert found == _DRAWS[spec]
  # A query does not depend on whether there is a context.
  if isinstance(spec.context, Slice) and spec.replacement:
    alone = _sample(replay, spec._replace(context=None), steps=7)
    assert alone.context is None and alone.context_mask is None
    np.testing.assert_array_equal(alone.query.reward, batch.query.reward)


def test_windows(replay):
  spec = BatchSpec(2, Windows(3, 5))
  batch = _sample(replay, spec, steps=600)
  query = batch.query
  assert query.observation.shape == (600, 2, 3, 6, 1)
  assert query.action.shape == (600, 2, 3, 5, 1)
  assert batch.context is None
  seen = {}
  for task, rows, frames, mask in zip(
    np.repeat(batch.task_id.ravel(), 3),
    query.reward.reshape(-1, 5),
    query.observation.reshape(-1, 6),
    query.mask.reshape(-1, 5),
  ):
    if not _SEQUENCES[task]:
      assert not mask.any()
      continue
    rows = rows - 100 * task
    length = int(mask.sum())
    assert mask[:length].all(), 'the mask is not a prefix'
    # Next observations are those of the row itself here: of its last step.
    np.testing.assert_array_equal(frames - 100 * task, np.append(rows[0], rows))
    start, whole = next(s for s in _SEQUENCES[task] if s[0] <= rows[0] < sum(s))
    assert length == min(whole, 5)
    np.testing.assert_array_equal(rows[:length], rows[0] + np.arange(length))
    assert (rows[length:] == start + whole - 1).all()
    seen.setdefault((task, start), []).append(int(rows[0]) - start)
  assert seen.keys() == {(0, 6), (0, 10), (1, 6)}
  for (_, start), offsets in seen.items():
    length = {6: None, 10: 7}[start]
    if length:  # every start that leaves the window whole, equally often
      counts = np.bincount(offsets)
      assert len(counts) == length - 5 + 1
      assert stats.chisquare(counts).pvalue > 1e-3
  # Episodes are equally likely, whatever their length.
  first = len(seen[0, 6]) / (len(seen[0, 6]) + len(seen[0, 10]))
  assert abs(first - 0.5) < 4 * 0.5 / np.sqrt(len(seen[0, 6]) * 2)
  table = replay.query._replace(
    sequence_start=replay.query.sequence_start[:, :0],
    sequence_length=replay.query.sequence_length[:, :0],
  )
  with pytest.raises(ValueError, match='set sequence_episodes=1'):
    _sample(Replay(table, None), spec)


@pytest.mark.parametrize(
  'spec, error',
  [
    (BatchSpec(1, Rollout()), 'Rollout.* is not drawn from a replay'),
    (BatchSpec(1, Rows(1), 'any'), "'any' is not drawn from a replay"),
    (BatchSpec(1, Rows(1, 'new')), "part: unknown 'new'; known: all, offline"),
    (
      BatchSpec(1, Rows(1, 'offline', 0.5)),
      'online_share: shares are drawn from all rows',
    ),
  ],
  ids=str,
)
def test_what_cannot_be_drawn(replay, spec, error):
  with pytest.raises((TypeError, ValueError), match=error):
    _sample(replay, spec)
