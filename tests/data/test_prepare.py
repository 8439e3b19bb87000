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
  assert replay.context is None and replay.query.data.extras == {}
  np.testing.assert_array_equal(
    replay.query.data.reward, data.transitions.reward
  )
  np.testing.assert_array_equal(replay.query.size, _SIZE)
  np.testing.assert_array_equal(replay.query.offline_size, _SIZE)


def test_encoder_data_are_kept_apart():
  data = _data()
  context = jax.tree.map(lambda x: x[:, 2:7], data.transitions)
  data = data._replace(context=context, context_size=np.array([5, 3]))
  replay = _replay(DataSpec(stride=2), data)
  np.testing.assert_array_equal(
    replay.context.data.observation[0, :3, 0], [2, 4, 6]
  )
  np.testing.assert_array_equal(replay.context.size, [3, 2])
  # Where order matters both roles are taken from the query data.
  assert _replay(DataSpec(returns_discount=0.9), data).context is None


def test_strides_keep_the_last_row():
  replay = _replay(DataSpec(stride=4)).query
  np.testing.assert_array_equal(replay.size, [3, 2])
  np.testing.assert_array_equal(replay.data.observation[0, :3, 0], [1, 5, 9])
  np.testing.assert_array_equal(replay.data.observation[1, :2, 0], [100, 104])


def test_returns_are_computed_before_the_stride():
  data, gamma = _data(), 0.9
  replay = _replay(DataSpec(returns_discount=gamma, stride=3), data).query
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
  assert plain.context is None
  jax.tree.map(np.testing.assert_array_equal, part.query, plain.query)
  whole = _replay(spec._replace(stride=1)).query
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(a, b[:, :4]),
    part.context.data,
    whole.data,
  )
  np.testing.assert_array_equal(part.context.size, [4, 4])
  with pytest.raises(DatasetError, match='context_rows=1000000: .* the last'):
    _replay(spec._replace(context_part='last', context_rows=10**6))


def test_sequences_are_consecutive_episodes():
  replay = _replay(DataSpec(sequence_episodes=2)).query
  np.testing.assert_array_equal(replay.num_sequences, [2, 1])
  np.testing.assert_array_equal(replay.sequence_start[0], [0, 5])
  np.testing.assert_array_equal(replay.sequence_length[0], [5, 5])
  assert (replay.sequence_start[1, 0], replay.sequence_length[1, 0]) == (0, 5)
  single = _replay(DataSpec(sequence_episodes=3)).query  # what is left over
  np.testing.assert_array_equal(single.sequence_length[0], [9, 1])


def test_a_log_without_time_is_refused():
  data = _data()
  del data.transitions.extras['time']
  for spec in DataSpec(returns_discount=0.9), DataSpec(sequence_episodes=1):
    with pytest.raises(DatasetError, match="extras lack 'time'"):
      _replay(spec, data)
  _replay(DataSpec(), data)


def _long_data(num_tasks, num_episodes):
  """Episodes of 2 steps; the observation is 1000 * task + row."""
  rows = 2 * num_episodes
  rng = np.random.default_rng(1)
  angle = np.arange(num_tasks) * 2 * np.pi / num_tasks
  tasks = {
    'direction': np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float32)
  }
  shape = (num_tasks, rows)
  action = rng.uniform(-1, 1, shape + (2,)).astype(np.float32)
  number = (np.arange(rows) + 1000.0 * np.arange(num_tasks)[:, None])[..., None]
  return MetaDataset(
    transitions=Transition(
      number,
      action,
      np.einsum('mra,ma->mr', action, tasks['direction']),
      np.ones(shape, np.float32),
      number + 0.5,
      {
        'time': np.tile(np.arange(2.0), (num_tasks, num_episodes)),
        'features': np.ones(shape + (1,)),
      },
    ),
    size=np.full(num_tasks, rows),
    context=None,
    context_size=None,
    tasks=tasks,
    episode_return=np.zeros(num_tasks),
  )


@pytest.mark.parametrize('each, positions', [(2, 1), (3, 1), (4, 2)])
def test_mixed_rewards(each, positions):
  """As BOReL's release: first halves of some sequences."""
  data = _long_data(5, 40 * each)
  log, spec = (
    data.transitions,
    DataSpec(sequence_episodes=each, mix_rewards=True),
  )
  prepared = lambda key: jax.device_get(
    prepare.replay(data, spec, _FAMILY, data.tasks, jax.random.key(key))
  )
  replay = prepared(0)
  np.testing.assert_array_equal(replay.query.data.reward, log.reward)
  mixed = replay.context
  numbers = 40
  np.testing.assert_array_equal(mixed.num_sequences, numbers)
  np.testing.assert_array_equal(mixed.size, data.size)
  np.testing.assert_array_equal(
    mixed.sequence_start, np.tile(np.arange(numbers) * 2 * each, (5, 1))
  )
  np.testing.assert_array_equal(mixed.data.extras['time'], log.extras['time'])
  # [task, sequence, episode, step].
  shape = (5, numbers, each, 2)
  source, row = [
    x.reshape(shape) for x in np.divmod(mixed.data.observation[..., 0], 1000)
  ]
  moved = (source != np.arange(5)[:, None, None, None]).any(axis=-1)
  assert not moved[:, :, positions:].any()
  # 1 - (1 - 1/n)^n of the sequences are drawn; fewer moved, as an episode may
  # come back from where it went.
  for position in range(positions):
    share = moved[:, :, position].mean(axis=1)
    np.testing.assert_allclose(share[0], 0.635, atol=0.08)
    assert np.all((0.4 < share) & (share < 0.75)), share
  if positions == 2:  # the same sequences give way at both
    np.testing.assert_array_equal(moved[0, :, 0], moved[0, :, 1])
  # Whole episodes, from the same position of any sequence; what stays does so
  # where it was.
  np.testing.assert_array_equal(np.diff(row, axis=-1), 1.0)
  at = np.broadcast_to(np.arange(each), shape[:3])
  np.testing.assert_array_equal(row[..., 0] // 2 % each, at)
  where = np.broadcast_to(np.arange(numbers)[:, None], shape[:3])
  same = row[..., 0] // 2 // each == where
  assert same[~moved][at[~moved] >= positions].all()
  assert same[0][~moved[0]].all() and not same[0][moved[0]].all()
  # All rewards are this task's.
  np.testing.assert_allclose(
    mixed.data.reward,
    np.einsum('mra,ma->mr', mixed.data.action, data.tasks['direction']),
    rtol=1e-4,
    atol=1e-5,
  )
  assert not np.array_equal(prepared(1).context.data.reward, mixed.data.reward)


def test_mixing_goes_from_task_to_task():
  """Task 1 takes from task 0 what that has by then, perhaps of task 1."""
  data = _long_data(2, 40)
  spec = DataSpec(sequence_episodes=2, mix_rewards=True)
  mixed = jax.device_get(
    prepare.replay(data, spec, _FAMILY, data.tasks, _KEY)
  ).context
  source, row = [
    x.reshape(2, 20, 2, 2)[:, :, 0, 0]
    for x in np.divmod(mixed.data.observation[..., 0], 1000)
  ]
  own = row // 4 == np.arange(20)
  assert not np.any((source[0] == 0) & ~own[0])
  assert np.any((source[1] == 1) & ~own[1])  # its own, from elsewhere


def test_short_sequences_are_mixed():
  """Of episodes of unequal lengths, some without a second one."""
  for key in range(5):
    mixed = jax.device_get(
      prepare.replay(
        _data(),
        DataSpec(sequence_episodes=3, mix_rewards=True),
        _FAMILY,
        _TASKS,
        jax.random.key(key),
      )
    ).context
    np.testing.assert_array_equal(mixed.num_sequences, [2, 1])
    for task in range(2):
      n = mixed.num_sequences[task]
      assert mixed.sequence_length[task, :n].sum() == mixed.size[task]
      size = mixed.size[task]
      np.testing.assert_allclose(
        mixed.data.reward[task, :size],
        mixed.data.action[task, :size] @ _TASKS['direction'][task],
        rtol=1e-4,
        atol=1e-6,
      )


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
  reward = np.asarray(replay.query.data.reward)
  expected = np.zeros((2, _ROWS))
  for task, begin, end in (0, 0, 5), (0, 5, 10), (1, 0, 5):
    expected[task, begin:end] = np.cumsum(reward[task, begin:end])
  np.testing.assert_allclose(added['sum'][0], expected, rtol=1e-5)
  np.testing.assert_allclose(added['sum'][1], 10 * expected, rtol=1e-5)
  assert added['pair'].shape == (2, 2, _ROWS, 2)
