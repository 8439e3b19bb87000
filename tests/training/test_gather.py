"""What one online iteration stores, and what it cannot know."""

import dataclasses
import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from offmeta import parallel, rollout
from offmeta.algorithms import smac
from offmeta.data import buffer as buffers, capacity
from offmeta.data.buffer import Replay
from offmeta.testing import probes
from offmeta.training import (
  gather as gathering,
  seeds as seeds_lib,
  updates,
  visits as visits_lib,
)
from offmeta.training.config import Visits
from offmeta.types import Policy, Problem

_FAMILY = probes.CountingFamily()
_MORTAL = probes.CountingFamily(terminates=True)
_H = _FAMILY.spec.episode_length
_TASKS = {
  'value': jnp.array([1.0, -2.0, 0.5, 3.0]),
  'lifetime': jnp.array([2.0, 5.0, 3.0, 4.0]),
}
_M, _OFFLINE = 4, 6
_KEY = jax.random.key(0)
# Per visit 2 prior episodes, then 1 prior and 2 posterior ones.
_CONFIG = Visits(
  tasks_per_iteration=2,
  prior_steps=2 * _H,
  posterior_steps=3 * _H,
  context_size=7,
  label_context_size=8,
)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _offline(mark, capacity=60, sequences=4):
  """Offline rows whose rewards are 1000 * mark + 100 * task + row."""
  reward = (
    1000.0 * mark + 100.0 * jnp.arange(_M)[:, None] + jnp.arange(_OFFLINE)
  )
  data = probes.random_transitions(_KEY, _FAMILY.spec, (_M, _OFFLINE))
  return buffers.make(
    data._replace(reward=reward), jnp.full(_M, _OFFLINE), capacity, sequences
  )


def _new(buffer, task):
  """Rows of a task after its offline data."""
  return jax.tree.map(
    lambda x: np.asarray(x)[task, _OFFLINE : int(buffer.size[task])],
    buffer.data,
  )


def _spy():
  """Action: (mean reward of the context) / 1e5; label: see `relabel`.

  A label is the mean reward of its context plus 0 to 0.01, drawn per call.
  """

  def mean(context, valid):
    reward = jnp.where(valid > 0, context.reward, 0.0)
    return jnp.sum(reward) / jnp.maximum(jnp.sum(valid), 1.0)

  def relabel(state, context, valid, data, key):
    assert data.extras == {}
    label = mean(context, valid) + 0.01 * jax.random.uniform(key)
    return jnp.full(data.action.shape[:-1], label)

  policy = Policy(
    init=lambda params, key: jnp.zeros(()),
    act=lambda params, state, observation, key: (state[None] / 1e5, state, {}),
    observe=lambda params, state, transition, key: state,
    adapt=lambda params, state, context, valid, key: mean(context, valid),
  )
  return smac.make(Problem(_FAMILY.spec), helpers.SMAC)._replace(
    explore=policy, relabel=relabel, actor_params=lambda state: ()
  )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _gather(family, config, replay, task_id, key):
  return gathering.gather(
    family, _spy(), (), replay, _TASKS, task_id, key, config
  )[0]


def _gather_spied(*given):
  """The replay of a visit, in numpy."""
  return jax.device_get(_gather(*given))


_VISITED = np.array([2, 0])


def _replay(shared=False):
  return jax.device_get(Replay(_offline(0), None if shared else _offline(1)))


def test_counts_order_and_places():
  config = dataclasses.replace(_CONFIG, rewards='true')
  replay = _gather_spied(_FAMILY, config, _replay(), _VISITED, _KEY)
  # 10 prior and 15 further steps; only prior ones go to the encoder.
  np.testing.assert_array_equal(replay.query.size, [31, 6, 31, 6])
  np.testing.assert_array_equal(replay.context.size, [16, 6, 16, 6])
  for task in (0, 2):
    rl, encoder = _new(replay.query, task), _new(replay.context, task)
    value = float(np.asarray(_TASKS['value'])[task])
    np.testing.assert_array_equal(
      rl.reward, np.tile(value * np.arange(1, 6), 5)
    )
    np.testing.assert_array_equal(rl.discount, np.ones(25))
    jax.tree.map(
      lambda a, b: np.testing.assert_array_equal(a[:10], b), rl, encoder
    )
    # Five different starts; prior for three episodes, then the posterior.
    assert len(np.unique(rl.observation[:, 1])) == 5
    assert not np.any(rl.action[:15])
    means = 1e5 * rl.action[15:, 0].reshape(2, 5)
    np.testing.assert_array_equal(means, means[:, :1] * np.ones((2, 5)))
    # Of the task's context buffer: offline rewards near 1000 + 100 * task,
    # new ones at most 15. A mean of 7 of them.
    assert np.all(means > 0.0) and np.all(means < 1000 + 100 * task + 6)
    assert means[0, 0] != means[1, 0]
  # Offline data stay.
  before = _replay()
  for old, new in zip(before, replay, strict=True):
    np.testing.assert_array_equal(
      new.data.reward[:, :_OFFLINE], old.data.reward[:, :_OFFLINE]
    )
    np.testing.assert_array_equal(new.offline_size, np.full(_M, _OFFLINE))


@pytest.mark.parametrize('shared', [False, True])
def test_sequences_are_recorded(shared):
  config = dataclasses.replace(_CONFIG, rewards='true')
  replay = _gather_spied(_FAMILY, config, _replay(shared), _VISITED, _KEY)
  buffer = replay.contexts()
  assert (replay.context is None) == shared
  np.testing.assert_array_equal(buffer.num_sequences, [1, 0, 1, 0])
  for task in (0, 2):
    assert buffer.sequence_start[task, 0] == _OFFLINE
    assert buffer.sequence_length[task, 0] == 10
  # A second iteration, with a task twice.
  replay = _gather_spied(
    _FAMILY, config, replay, np.array([2, 2]), jax.random.key(1)
  )
  buffer = replay.contexts()
  np.testing.assert_array_equal(buffer.num_sequences, [1, 0, 3, 0])
  first = 31 if shared else 16
  np.testing.assert_array_equal(
    buffer.sequence_start[2, :3], [_OFFLINE, first, first + 10]
  )
  np.testing.assert_array_equal(buffer.sequence_length[2, :3], [10, 10, 10])
  for start in (first, first + 10):  # whole episodes under the prior
    np.testing.assert_array_equal(
      buffer.data.observation[2, start : start + 10, 0],
      np.tile(np.arange(5), 2),
    )
    assert not np.any(buffer.data.action[2, start : start + 10])


def test_posterior_steps_into_the_encoder_by_switch():
  config = dataclasses.replace(
    _CONFIG, rewards='true', posterior_to_context=True
  )
  replay = _gather_spied(_FAMILY, config, _replay(), _VISITED, _KEY)
  np.testing.assert_array_equal(replay.context.size, [31, 6, 31, 6])


def test_terminating_episodes_fill_the_quota():
  config = dataclasses.replace(_CONFIG, rewards='true')
  replay = _gather_spied(_MORTAL, config, _replay(), _VISITED, _KEY)
  # Task 2 lives 3 steps: 4 episodes for 10, 5 for 15. Task 0 lives 2.
  np.testing.assert_array_equal(replay.context.size, [16, 6, 18, 6])
  np.testing.assert_array_equal(replay.query.size, [32, 6, 33, 6])
  for task, life, episodes in ((2, 3, 9), (0, 2, 13)):
    new = _new(replay.query, task)
    np.testing.assert_array_equal(
      new.observation[:, 0], np.tile(np.arange(life), episodes)
    )
    np.testing.assert_array_equal(
      new.discount, np.tile([1.0] * (life - 1) + [0.0], episodes)
    )
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(new))
  np.testing.assert_array_equal(
    replay.context.sequence_length[:, 0], [10, 0, 12, 0]
  )


@pytest.mark.parametrize(
  'family, rewards, expected',
  [
    (probes.BlowsUp(), 'decoder', 2 * 5),  # once in each of five episodes
    # Episodes of three steps: 4 fill the prior quota, 5 the posterior one.
    (probes.BlowsUp(terminates=True), 'true', 2 * (4 + 5)),
  ],
)
def test_steps_that_blew_up_are_counted(family, rewards, expected):
  config = dataclasses.replace(_CONFIG, rewards=rewards)
  visited = np.array([1, 3])  # tasks that live longer than that
  metrics = jax.jit(
    lambda replay, visited: gathering.gather(
      family, _spy(), (), replay, _TASKS, visited, _KEY, config
    )[1]
  )(_replay(), visited)
  assert jax.device_get(metrics) == {'gather/diverged': expected}


def test_labels():
  replay = _gather_spied(_FAMILY, _CONFIG, _replay(), _VISITED, _KEY)
  for task in (0, 2):
    labels = _new(replay.query, task).reward.reshape(5, 5)
    # One draw per rollout, another one for each.
    np.testing.assert_array_equal(labels, labels[:, :1] * np.ones((5, 5)))
    assert len(set(labels[:, 0])) == 5
    # The context: frozen offline rows of the same task, context buffer, drawn
    # anew for each rollout.
    low = 1000 + 100 * task
    assert np.all(labels >= low) and np.all(labels <= low + 5.01)
    assert np.ptp(labels) > 0.0101
    np.testing.assert_array_equal(
      _new(replay.context, task).reward, labels[:2].ravel()
    )


def test_label_contexts_are_frozen_offline_data_of_the_task():
  """NaN wherever a label context must not come from."""
  replay = _replay()
  online = jax.tree.map(
    lambda x: np.full_like(x[0, :3], np.nan), replay.context.data
  )
  encoder, append = replay.context, jax.jit(buffers.append)
  for task in range(_M):
    encoder = append(encoder, task, online, np.int32(3))
  encoder = jax.tree.map(np.array, encoder)
  for leaf in jax.tree.leaves(encoder.data):
    leaf[[1, 3]] = np.nan  # not visited
  rl = replay.query._replace(
    data=jax.tree.map(lambda x: np.full_like(x, np.nan), replay.query.data)
  )
  config = dataclasses.replace(_CONFIG, posterior_steps=0)
  after = _gather_spied(_FAMILY, config, Replay(rl, encoder), _VISITED, _KEY)
  for task in (0, 2):
    new = _new(after.query, task)
    assert new.reward.shape == (10,)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(new))


def test_clear_encoder_buffer_leaves_the_last_visit():
  config = dataclasses.replace(_CONFIG, rewards='true', clear_context=True)
  replay = _replay()
  for number in range(2):
    replay = _gather_spied(
      _FAMILY, config, replay, _VISITED, jax.random.key(number)
    )
  np.testing.assert_array_equal(replay.context.size, [10, 6, 10, 6])
  np.testing.assert_array_equal(replay.query.size, [56, 6, 56, 6])
  for task in (0, 2):
    start = _OFFLINE + 25  # the second visit's prior steps in the query buffer
    jax.tree.map(
      lambda e, r: np.testing.assert_array_equal(
        e[task, :10], r[task, start : start + 10]
      ),
      replay.context.data,
      replay.query.data,
    )
  # Contexts of the second visit are of it alone: means of small rewards.
  means = 1e5 * replay.query.data.action[0, _OFFLINE + 40 : _OFFLINE + 50]
  assert np.all(means > 0) and np.all(means <= 5.01)


def test_prior_episodes_alone_fill_every_task():
  config = dataclasses.replace(
    _CONFIG, rewards='true', prior_steps=7, posterior_steps=0
  )
  replay, _ = jax.jit(
    lambda replay: gathering.gather(
      _MORTAL, _spy(), (), replay, _TASKS, jnp.arange(_M), _KEY, config
    )
  )(_replay())
  replay = jax.device_get(replay)
  # Lifetimes 2, 5, 3, 4: whole episodes to at least 7 steps.
  for buffer in (replay.query, replay.context):
    np.testing.assert_array_equal(buffer.size - _OFFLINE, [8, 10, 9, 8])
  assert not np.any(_new(replay.query, 1).action)


# Reward-free.

_CONFIGS = {
  'frozen': helpers.SMAC,
  'trained': dataclasses.replace(
    helpers.SMAC,
    train_context_online=True,
    online=dataclasses.replace(
      helpers.SMAC.online, context='episodes', sequence_size=10
    ),
  ),
}


@pytest.mark.parametrize(
  'name, family, poison',
  [('frozen', _FAMILY, float('nan')), ('trained', _MORTAL, 1e9)],
)
def test_true_rewards_are_absent_from_the_online_phase(name, family, poison):
  """Poisoned rewards and features change no bit of replay and learner."""
  make = functools.partial(smac.make, Problem(family.spec), _CONFIGS[name])
  algorithm = make()
  keys = jax.random.split(_KEY, 1)
  state = jax.jit(
    lambda key: algorithm.loop('online').begin(algorithm.init(key))
  )(keys[0])
  update = updates.make_update(
    lambda axis: make(axis).loop('online').stages[0],
    helpers.seeds(keys),
    3,
    shared_replay=True,
  )

  add = jax.jit(lambda state: jax.tree.map(lambda x: x[None], state))

  def iteration(family, config):
    replay = jax.jit(
      lambda state, replay, visited: gathering.gather(
        family, algorithm, state, replay, _TASKS, visited, _KEY, config
      )[0]
    )(state, _replay(shared=name == 'trained'), _VISITED)
    after, _ = update(add(state), replay)
    return replay, after

  clean = iteration(family, _CONFIG)
  poisoned = iteration(probes.PoisonedReward(family, poison), _CONFIG)
  helpers.assert_same(poisoned, clean)
  assert not any(
    np.any(np.isnan(helpers.numbers(x))) for x in jax.tree.leaves(clean)
  )
  assert np.asarray(clean[0].query.size)[0] > _OFFLINE
  assert np.asarray(clean[1].step)[0] == 3
  if name == 'trained':
    return
  # The oracle does read them, so poison would have shown.
  oracle = dataclasses.replace(_CONFIG, rewards='true')
  replay, after = iteration(probes.PoisonedReward(family, poison), oracle)
  assert np.any(np.isnan(replay.query.data.reward))
  assert any(
    np.any(np.isnan(x)) for x in jax.tree.leaves(after.params['critic'])
  )


@pytest.mark.parametrize('family', [_FAMILY, _MORTAL])
def test_no_round_copies_the_replay(family):
  """Seeds finish after different numbers of rounds; no select over a buffer."""
  seeds = helpers.seeds(jax.random.split(_KEY, 2))
  replay = jax.tree.map(lambda x: np.stack([x, x]), _replay())
  gather = jax.jit(
    jax.vmap(
      lambda replay, task_id, key: gathering.gather(
        family,
        _spy(),
        (),
        replay,
        _TASKS,
        task_id,
        key,
        _CONFIG,
        seeds_axis=parallel.SEEDS,
      )[0],
      axis_name=parallel.SEEDS,
    )
  )
  args = replay, np.array([[2, 0], [1, 3]]), seeds.keys
  capacity = replay.query.data.reward.shape
  whole = 'tensor<' + 'x'.join(map(str, capacity))
  selects = [
    line
    for line in gather.lower(*args).as_text().splitlines()
    if 'stablehlo.select' in line
  ]
  assert selects and not [line for line in selects if whole in line]
  # One seed alone gives the same.
  both = jax.device_get(gather(*args))
  for s in range(2):
    alone = _gather_spied(family, _CONFIG, _replay(), *[x[s] for x in args[1:]])
    for one, two in zip(alone, both):
      size = np.asarray(one.size)
      np.testing.assert_array_equal(two.size[s], size)
      held = np.arange(capacity[-1]) < size[:, None]
      np.testing.assert_array_equal(
        np.asarray(two.data.reward[s])[held], np.asarray(one.data.reward)[held]
      )


# Capacities.


def _uniform_algorithm():
  return _spy()._replace(explore=rollout.uniform_policy(1))


@pytest.mark.parametrize('family, clear', [(_FAMILY, False), (_MORTAL, True)])
def test_scheduled_capacities_are_never_exceeded(family, clear):
  """The same rows as with far larger buffers, over random schedules."""
  config = Visits(
    tasks_per_iteration=3,
    prior_steps=7,
    posterior_steps=4,
    posterior_to_context=not clear,
    clear_context=clear,
    rewards='true',
  )
  seeds, iterations = 8, 4
  keys = seeds_lib.seed_keys(3, seeds)
  visited = visits_lib.visits(keys, iterations, config, _M)
  assert visited.shape == (seeds, iterations, 3)
  size = capacity.sizes(
    family.spec, config, visited, _M, _OFFLINE, _OFFLINE, shared=False
  )
  lifetimes = jax.random.randint(_KEY, (seeds, _M), 1, _H + 1)

  @functools.partial(jax.jit, static_argnums=(0, 1))
  def run(rl, encoder):
    start = Replay(
      _offline(0, rl, size.sequences), _offline(1, encoder, size.sequences)
    )

    def one(key, visited, lifetime):
      tasks = {**_TASKS, 'lifetime': lifetime.astype(jnp.float32)}

      def body(replay, item):
        number, task_id = item
        return gathering.gather(
          family,
          _uniform_algorithm(),
          (),
          replay,
          tasks,
          task_id,
          jax.random.fold_in(key, number),
          config,
        )[0], None

      return jax.lax.scan(body, start, (jnp.arange(iterations), visited))[0]

    return jax.vmap(one)(keys, visited, lifetimes)

  exact, roomy = jax.device_get([run(size.query, size.context), run(300, 300)])
  for got, expected in zip(exact, roomy):
    np.testing.assert_array_equal(got.size, expected.size)
    assert np.all(got.num_sequences <= size.sequences)
    np.testing.assert_array_equal(got.sequence_start, expected.sequence_start)
    rows = got.data.reward.shape[-1]
    valid = np.arange(rows) < np.asarray(got.size)[..., None]
    for a, b in zip(jax.tree.leaves(got.data), jax.tree.leaves(expected.data)):
      b = np.asarray(b)[:, :, :rows]
      np.testing.assert_array_equal(np.asarray(a)[valid], b[valid])
  # Not wasteful: without termination the fullest task fills all but a margin.
  if not family.spec.terminates:
    assert exact.query.size.max() == size.query - _H


def test_longest_is_the_longest():
  """Brute force over all lifetimes."""
  for horizon in (1, 3, 4):
    for quota in range(0, 9):
      spec = probes.CountingFamily(episode_length=horizon, terminates=True).spec
      reach = {0}  # steps used so far, over all ways to get there
      ends = {0} if quota == 0 else set()
      while reach and quota:
        reach = {
          used + life for used in reach for life in range(1, horizon + 1)
        }
        ends |= {used for used in reach if used >= quota}
        reach = {used for used in reach if used < quota}
      assert capacity.longest(spec, quota) == max(ends)
      full = spec._replace(terminates=False)
      assert capacity.longest(full, quota) == -(-quota // horizon) * horizon
