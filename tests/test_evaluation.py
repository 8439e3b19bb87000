"""Meta-test and shift diagnostics on families with known answers."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from offmeta import evaluation, rollout
from offmeta.data import buffer as buffers
from offmeta.testing import probes
from offmeta.types import Policy, Transition

_FAMILY = probes.CountingFamily()
_TASKS = {
  'value': np.float32([1.0, -2.0, 0.5]),
  'lifetime': np.full(3, 5.0, np.float32),
}
_KEY = jax.random.key(0)


def _mean_reward_policy():
  """The action is the mean reward of the context / 100; 0 without one."""
  zero = jnp.zeros(())

  def adapt(params, state, context, valid, key):
    return jnp.sum(context.reward * valid) / jnp.maximum(jnp.sum(valid), 1)

  return Policy(
    init=lambda params, key: zero,
    act=lambda params, state, observation, key: (state[None] / 100, state, {}),
    observe=lambda params, state, transition, key: state,
    adapt=adapt,
  )


@jax.jit
def _meta_test(tasks):
  return evaluation.meta_test(
    _FAMILY, _mean_reward_policy(), (), tasks, _KEY, 2, 15, 2
  )


def _test(tasks):
  return jax.device_get(_meta_test(tasks))


def test_meta_test_batches_tasks_and_repetitions():
  done = _test(_TASKS)
  assert done.returns.shape == (3, 2, 3)
  np.testing.assert_array_equal(
    done.returns,
    np.array([15.0, -30.0, 7.5])[:, None, None] * np.ones((3, 2, 3)),
  )
  np.testing.assert_array_equal(done.context_size, np.full((3, 2), 10))
  # The third episode knows the mean reward 3 * value of its own task.
  np.testing.assert_allclose(
    done.transitions.action[:, :, 10:, 0],
    0.03 * np.array([1.0, -2.0, 0.5])[:, None, None] * np.ones((3, 2, 5)),
    rtol=1e-5,
  )
  assert not np.any(done.transitions.action[:, :, :10])
  # Every repetition has its own starts.
  starts = np.asarray(done.transitions.observation[:, :, ::5, 1])
  assert len(np.unique(starts)) == 18


def test_a_subset_of_tasks_scores_as_in_the_whole():
  some = jax.tree.map(lambda x: x[:2], _TASKS)
  np.testing.assert_array_equal(
    _test(some).transitions.observation,
    _test(_TASKS).transitions.observation[:2],
  )


@jax.jit
def _make_buffer():
  """Offline rewards 10 * task + (0 to 3); what came later is NaN."""
  reward = 10.0 * jnp.arange(3.0)[:, None] + jnp.arange(4.0)
  wide = reward[..., None]
  buffer = buffers.make(
    Transition(wide, wide, reward, jnp.ones_like(reward), wide),
    jnp.full(3, 4),
    8,
  )
  poison = jax.tree.map(lambda x: jnp.full_like(x[0, :2], jnp.nan), buffer.data)
  for task in range(3):
    buffer = buffers.append(buffer, task, poison, jnp.int32(2))
  return buffer


@functools.cache
def _buffer():
  return jax.device_get(_make_buffer())


# One program each; outside jit, jax compiles one per operation and shape.
_offline_contexts = jax.jit(evaluation.offline_contexts, static_argnums=(3, 4))
_offline_sequences = jax.jit(
  evaluation.offline_sequences, static_argnums=(3, 4, 5)
)


def test_given_context_is_offline_data_of_the_task():
  """Also the first episode has it, and all have the same."""
  spied = []
  policy = _mean_reward_policy()

  def adapt(params, state, context, valid, key):
    jax.debug.callback(
      lambda *x: spied.append(jax.device_get(x)),
      context.reward,
      valid,
      ordered=False,
    )
    return policy.adapt(params, state, context, valid, key)

  ids, buffer = np.array([2, 0]), _buffer()
  returns = jax.jit(
    lambda buffer: evaluation.meta_test_given_context(
      _FAMILY,
      policy._replace(adapt=adapt),
      (),
      jax.tree.map(lambda x: x[ids], _TASKS),
      evaluation.offline_contexts(buffer, ids, _KEY, 2, 6),
      _KEY,
      15,
    )
  )(buffer)
  jax.effects_barrier()
  np.testing.assert_array_equal(
    returns, np.array([7.5, 15.0])[:, None, None] * np.ones((2, 2, 3))
  )
  contexts = [
    tuple(np.asarray(reward)) for reward, valid in spied if np.all(valid == 1)
  ]
  assert len(contexts) == len(spied) == 2 * 2 * 3
  for context in contexts:  # of task 2 or of task 0, offline rows only
    assert len(context) == 6
    assert set(context) <= {20, 21, 22, 23} or set(context) <= {0, 1, 2, 3}
  # One draw per repetition, for its three episodes.
  counts = {context: contexts.count(context) for context in contexts}
  assert sorted(counts.values()) == [3, 3, 3, 3]


@pytest.mark.parametrize('held', [False, True])
def test_a_held_policy_learns_nothing_while_it_acts(held):
  """What un-adapted means for policies whose belief moves in every step."""
  spied = []

  def act(params, state, observation, key):
    jax.debug.callback(lambda x: spied.append(float(x)), state, ordered=False)
    return state[None] / 100, state, {}

  policy = _mean_reward_policy()._replace(
    act=act, observe=lambda params, state, transition, key: state + 1
  )
  contexts = _offline_contexts(_buffer(), np.arange(3), _KEY, 1, 6)
  contexts = contexts._replace(mask=np.zeros_like(contexts.mask))
  jax.jit(
    lambda held: evaluation.meta_test_given_context(
      _FAMILY, policy, (), _TASKS, contexts, _KEY, 10, held=held
    )
  )(held)
  jax.effects_barrier()
  # Three tasks, two episodes of five steps each.
  assert sorted(spied) == (
    [0.0] * 30 if held else sorted([0.0, 1.0, 2.0, 3.0, 4.0] * 6)
  )


def test_given_sequences_are_recorded_ones_in_order():
  buffer = _buffer()
  time = np.broadcast_to(np.arange(8) % 2, (3, 8))
  buffer = buffer._replace(
    data=buffer.data._replace(extras={'time': time}),
    sequence_start=np.int32([[0, 1], [2, 0], [0, 0]]),
    sequence_length=np.int32([[4, 2], [2, 0], [0, 0]]),
    num_sequences=np.int32([2, 1, 0]),
  )
  contexts = _offline_sequences(buffer, np.arange(3), _KEY, 20, 1, 3)
  known = [
    {tuple(reward[valid > 0]) for reward, valid in zip(rewards, mask)}
    for rewards, mask in zip(
      np.asarray(contexts.context.reward), np.asarray(contexts.mask)
    )
  ]
  # One episode each (they begin at even rows), though there may be more.
  assert known == [{(0, 1), (1,)}, {(12, 13)}, {()}]


def _adaptation(reward):
  """[M, R, W] self-collected rewards, the last two not of any step."""
  reward = np.asarray(reward, np.float32)
  size = np.full(reward.shape[:2], reward.shape[2] - 2, np.int32)
  wide, valid = reward[..., None], np.ones_like(reward)
  valid[..., -2:] = 0.0
  return rollout.Adaptation(
    np.zeros(reward.shape[:2] + (3,), np.float32),
    Transition(wide, wide, reward, np.ones_like(reward), wide),
    valid,
    size,
  )


@pytest.mark.parametrize('offset, expected', [(0.0, 0.0), (10.0, 0.5)])
def test_distribution_shift(offset, expected):
  """The posterior is N(mean reward, 1 / 4) here."""

  def posterior(params, context, valid):
    mean = jnp.sum(context.reward * valid) / jnp.sum(valid)
    return mean[None], jnp.full(1, 0.5)

  # Offline rewards of task m are exactly 10 m, so that draws do not differ.
  buffer = _buffer()
  buffer = buffer._replace(
    data=buffer.data._replace(reward=np.floor(buffer.data.reward / 10) * 10)
  )
  own = (10.0 * np.arange(3)[:, None, None] + offset) * np.ones((3, 2, 6))
  own[:, :, 4:] = 1e6  # not valid
  shift = jax.jit(
    lambda buffer: evaluation.distribution_shift(
      types.SimpleNamespace(posterior=posterior),
      (),
      _adaptation(own),
      *[
        evaluation.offline_contexts(buffer, jnp.arange(3), key, 2, 5)
        for key in jax.random.split(_KEY)
      ],
    )
  )(buffer)
  shift = jax.device_get(shift)
  np.testing.assert_allclose(
    shift.offline_mean[..., 0], [[0, 0], [10, 10], [20, 20]]
  )
  np.testing.assert_allclose(
    shift.self_mean[..., 0], shift.offline_mean[..., 0] + offset
  )
  # KL to N(0, 1): 0.5 (0.25 + mu^2 - 1 - ln 0.25).
  mu = np.array([0.0, 10.0, 20.0])
  kl = lambda mu: 0.5 * (0.25 + mu**2 - 1 - np.log(0.25))
  np.testing.assert_allclose(shift.kl_offline, kl(mu), rtol=1e-5)
  np.testing.assert_allclose(shift.kl_self, kl(mu + offset), rtol=1e-5)
  # KL between: (difference)^2 / (2 * 0.25). Within 0. Over all pairs of
  # tasks: 4 times 10 and 2 times 20 apart, mean square 200. Own: offset^2.
  np.testing.assert_allclose(
    shift.normalized_shift, expected, rtol=1e-5, atol=1e-12
  )


def test_distribution_shift_is_kl_from_the_self_collected_posterior():
  """Offline N(10 m, 1), self-collected N(10 m, 1 / 4): KL is not symmetric."""

  def posterior(params, context, valid):
    mean = jnp.sum(context.reward * valid) / jnp.sum(valid)
    return mean[None], jnp.where(valid.shape[0] == 5, 1.0, 0.5)[None]

  buffer = _buffer()
  buffer = buffer._replace(
    data=buffer.data._replace(reward=np.floor(buffer.data.reward / 10) * 10)
  )
  own = 10.0 * np.arange(3)[:, None, None] * np.ones((3, 2, 6))
  shift = jax.jit(
    lambda buffer: evaluation.distribution_shift(
      types.SimpleNamespace(posterior=posterior),
      (),
      _adaptation(own),
      *[
        evaluation.offline_contexts(buffer, jnp.arange(3), key, 2, 5)
        for key in jax.random.split(_KEY)
      ],
    )
  )(buffer)
  # KL(N(0, 1/4) || N(0, 1)) = 0.5 (1/4 - 1 + ln 4) over the mean of
  # 0.5 difference^2 = 0.5 * 200 between tasks.
  expected = 0.5 * (0.25 - 1 + np.log(4)) / 100
  np.testing.assert_allclose(shift.normalized_shift, expected, rtol=1e-5)
