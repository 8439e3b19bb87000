"""From a dataset to what an algorithm trains on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from offmeta.data import prepare
from offmeta.data.meta_dataset import DatasetError, MetaDataset
from offmeta.testing import probes
from offmeta.training import updates
from offmeta.types import BatchSpec, DataSpec, Rows, Stage, Transition

_KEY = jax.random.key(0)
_FAMILY = probes.BanditFamily()
# Episodes of each task by their lengths; the log of task 1 begins within one.
_LENGTHS = [[3, 2, 4, 1], [2, 3]]
_SIZE = np.array([10, 5])
_ROWS = 12
_TASKS = {'direction': np.array([[1.0, 0.0], [0.0, -1.0]], np.float32)}


def _data(**extras):
  """Rewards of the family; the observation is 100 * task + row."""
  rng = np.random.default_rng(0)
  action = rng.uniform(-1, 1, (2, _ROWS, 2)).astype(np.float32)
  time = np.zeros((2, _ROWS), np.float32)
  for m, lengths in enumerate(_LENGTHS):
    steps = np.concatenate([np.arange(n) for n in lengths])
    time[m, : len(steps)] = steps
  time[1, :2] += 2
  number = (np.arange(_ROWS) + 100.0 * np.arange(2)[:, None])[..., None]
  reward = np.einsum('mra,ma->mr', action, _TASKS['direction'])
  discount = np.ones((2, _ROWS), np.float32)
  discount[0, 4] = 0.0
  return MetaDataset(
    transitions=Transition(
      number,
      action,
      reward.astype(np.float32),
      discount,
      number + 0.5,
      {'time': time, 'features': np.ones((2, _ROWS, 1)), **extras},
    ),
    size=_SIZE,
    context=None,
    context_size=None,
    tasks=_TASKS,
    episode_return=np.zeros(2),
  )


def _replay(spec, data=None):
  return jax.device_get(
    prepare.replay(data or _data(), spec, _FAMILY, _TASKS, _KEY)
  )


def test_nothing_asked_for():
  data = _data()
  replay = _replay(DataSpec(), data)
  assert replay.encoder is None and replay.rl.data.extras == {}
  np.testing.assert_array_equal(replay.rl.data.reward, data.transitions.reward)
  np.testing.assert_array_equal(replay.rl.size, _SIZE)
  np.testing.assert_array_equal(replay.rl.offline_size, _SIZE)


def test_encoder_data_are_kept_apart():
  data = _data()
  context = jax.tree.map(lambda x: x[:, 2:7], data.transitions)
  data = data._replace(context=context, context_size=np.array([5, 3]))
  replay = _replay(DataSpec(stride=2), data)
  np.testing.assert_array_equal(
    replay.encoder.data.observation[0, :3, 0], [2, 4, 6]
  )
  np.testing.assert_array_equal(replay.encoder.size, [3, 2])
  # Where order matters both roles are taken from the RL data.
  assert _replay(DataSpec(returns_discount=0.9), data).encoder is None


def test_strides_keep_the_last_row():
  replay = _replay(DataSpec(stride=4)).rl
  np.testing.assert_array_equal(replay.size, [3, 2])
  np.testing.assert_array_equal(replay.data.observation[0, :3, 0], [1, 5, 9])
  np.testing.assert_array_equal(replay.data.observation[1, :2, 0], [100, 104])


def test_returns_are_computed_before_the_stride():
  data, gamma = _data(), 0.9
  replay = _replay(DataSpec(returns_discount=gamma, stride=3), data).rl
  reward = data.transitions.reward[0].astype(np.float64)
  rows = [0, 3, 6, 9]
  ends = [3, 5, 9, 10]  # of the episodes that hold these rows
  for position, (row, end) in enumerate(zip(rows, ends)):
    extras = {k: v[0, position] for k, v in replay.data.extras.items()}
    assert replay.data.observation[0, position, 0] == row
    np.testing.assert_allclose(
      extras['return_to_go'],
      sum(gamma**k * reward[row + k] for k in range(end - row)),
      rtol=1e-5,
    )
    np.testing.assert_allclose(
      extras['bootstrap'], gamma ** (end - row), rtol=1e-6
    )
    assert extras['last_observation'] == end - 0.5
    assert extras['last_discount'] == (end != 5)
  assert 'time' not in replay.data.extras


@pytest.mark.parametrize('discount', [None, 0.9])
def test_contexts_from_a_part_of_each_log(discount):
  """Consecutive rows, with the returns of the whole log; queries have all."""
  spec = DataSpec(returns_discount=discount, stride=3)
  part = _replay(spec._replace(context_part='first', context_rows=4))
  plain = _replay(spec)
  assert plain.encoder is None
  jax.tree.map(np.testing.assert_array_equal, part.rl, plain.rl)
  whole = _replay(spec._replace(stride=1)).rl
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(a, b[:, :4]),
    part.encoder.data,
    whole.data,
  )
  np.testing.assert_array_equal(part.encoder.size, [4, 4])
  with pytest.raises(DatasetError, match='context_rows=1000000: .* the last'):
    _replay(spec._replace(context_part='last', context_rows=10**6))


def test_sequences_are_consecutive_episodes():
  replay = _replay(DataSpec(sequence_episodes=2)).rl
  np.testing.assert_array_equal(replay.num_sequences, [2, 1])
  np.testing.assert_array_equal(replay.sequence_start[0], [0, 5])
  np.testing.assert_array_equal(replay.sequence_length[0], [5, 5])
  assert (replay.sequence_start[1, 0], replay.sequence_length[1, 0]) == (0, 5)
  single = _replay(DataSpec(sequence_episodes=3)).rl  # what is left over
  np.testing.assert_array_equal(single.sequence_length[0], [9, 1])


def test_a_log_without_time_is_refused():
  data = _data()
  del data.transitions.extras['time']
  for spec in DataSpec(returns_discount=0.9), DataSpec(sequence_episodes=1):
    with pytest.raises(DatasetError, match="extras lack 'time'"):
      _replay(spec, data)
  _replay(DataSpec(), data)


def test_mixed_rewards():
  data = _data()
  log = data.transitions
  replay = _replay(DataSpec(sequence_episodes=2, mix_rewards=True), data)
  np.testing.assert_array_equal(replay.rl.data.reward, log.reward)
  mixed = replay.encoder
  np.testing.assert_array_equal(mixed.num_sequences, [2, 1])
  starts = {0: [0, 3, 5, 9], 1: [0, 2]}
  lengths = {0: [3, 2, 4, 1], 1: [2, 3]}
  for task in range(2):
    total = 0
    for q in range(mixed.num_sequences[task]):
      begin = mixed.sequence_start[task, q]
      length = mixed.sequence_length[task, q]
      total += length
      part = jax.tree.map(lambda x: x[task, begin : begin + length], mixed.data)
      source, row = np.divmod(part.observation[:, 0], 100)
      first = source != task
      count = int(first.sum())
      assert first[:count].all() and 0 < count < length
      # A whole episode of the other task, then a second one of this.
      e = starts[1 - task].index(row[0])
      assert count == lengths[1 - task][e]
      np.testing.assert_array_equal(row[:count], row[0] + np.arange(count))
      assert starts[task].index(row[count]) % 2 == 1
      np.testing.assert_array_equal(
        row[count:], row[count] + np.arange(length - count)
      )
      assert part.extras['time'][0] in (0, 2)
      # All rewards are this task's.
      np.testing.assert_allclose(
        part.reward, part.action @ _TASKS['direction'][task], rtol=1e-5
      )
    assert mixed.size[task] == total
  other = prepare.replay(
    data,
    DataSpec(sequence_episodes=2, mix_rewards=True),
    _FAMILY,
    _TASKS,
    jax.random.key(1),
  )
  assert not np.array_equal(other.encoder.data.reward, mixed.data.reward)


def test_one_task_cannot_be_mixed():
  data = jax.tree.map(lambda x: np.asarray(x)[:1], _data())
  with pytest.raises(DatasetError, match='only one; set relabel_rewards'):
    prepare.replay(
      data,
      DataSpec(sequence_episodes=2, mix_rewards=True),
      _FAMILY,
      {'direction': _TASKS['direction'][:1]},
      _KEY,
    )


def test_annotate_runs_over_each_sequence_with_each_seeds_state(tmp_path):
  """A running sum of rewards, times a factor of the seed."""
  replay = prepare.replay(
    _data(), DataSpec(sequence_episodes=2), _FAMILY, _TASKS, _KEY
  )

  def annotate(state, transitions, mask):
    total = jnp.cumsum(transitions.reward * mask)
    return {'sum': state * total, 'pair': jnp.stack([mask, total], -1)}

  stage = Stage('any', 1, BatchSpec(1, Rows(1)), lambda *args: args, annotate)
  setup = tiny_run.make_setup(tmp_path)
  added = jax.device_get(
    updates.annotate(setup, setup.seeds, stage, jnp.array([1.0, 10.0]), replay)
  )
  reward = np.asarray(replay.rl.data.reward)
  expected = np.zeros((2, _ROWS))
  for task, begin, end in (0, 0, 5), (0, 5, 10), (1, 0, 5):
    expected[task, begin:end] = np.cumsum(reward[task, begin:end])
  np.testing.assert_allclose(added['sum'][0], expected, rtol=1e-5)
  np.testing.assert_allclose(added['sum'][1], 10 * expected, rtol=1e-5)
  assert added['pair'].shape == (2, 2, _ROWS, 2)
