"""Episodes and adaptation sequences on families with known answers."""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from offmeta import rollout
from offmeta.algorithms import latent, sac
from offmeta.networks.distributions import Gaussian, TanhNormal
from offmeta.testing import probes
from offmeta.types import Policy, Problem

_KEY = jax.random.key(0)
_FOREVER = probes.CountingFamily()
_MORTAL = probes.CountingFamily(terminates=True)


def _task(value=2.0, lifetime=3.0):
  return {'value': np.float32(value), 'lifetime': np.float32(lifetime)}


def _spy():
  """Its action tells its belief: (number of context entries) / 100."""

  def adapt(params, state, context, valid, key):
    return {
      'count': jnp.sum(valid),
      'rewards': jnp.sum(context.reward * valid),
      'seen': jnp.zeros(()),
    }

  def observe(params, state, transition, key):
    return {**state, 'seen': state['seen'] + transition.reward}

  zero = jnp.zeros(())
  return Policy(
    init=lambda params, key: {'count': zero, 'rewards': zero, 'seen': zero},
    act=lambda params, state, observation, key: (
      state['count'][None] / 100,
      state,
      {},
    ),
    observe=observe,
    adapt=adapt,
  )


def _episode(family, policy, task, key=_KEY, reward_free=False):
  run = jax.jit(
    lambda task, key: rollout.episode(
      family, policy, (), policy.init((), key), task, key, reward_free
    )
  )
  return jax.device_get(run(task, key))


def test_an_episode_by_hand():
  belief, data, valid = _episode(_FOREVER, _spy(), _task())
  np.testing.assert_array_equal(valid, np.ones(5))
  np.testing.assert_array_equal(data.observation[:, 0], [0, 1, 2, 3, 4])
  np.testing.assert_array_equal(data.next_observation[:, 0], [1, 2, 3, 4, 5])
  np.testing.assert_array_equal(data.reward, [2, 4, 6, 8, 10])
  # A time limit is no termination.
  np.testing.assert_array_equal(data.discount, np.ones(5))
  np.testing.assert_array_equal(data.extras['features'][:, 0], [1, 2, 3, 4, 5])
  np.testing.assert_array_equal(data.extras['time'], [0, 1, 2, 3, 4])
  assert belief['seen'] == 30.0


def test_an_episode_freezes_at_its_termination():
  belief, data, valid = _episode(_MORTAL, _spy(), _task(lifetime=3.0))
  np.testing.assert_array_equal(valid, [1, 1, 1, 0, 0])
  np.testing.assert_array_equal(data.reward, [2, 4, 6, 0, 0])
  np.testing.assert_array_equal(data.discount[:3], [1, 1, 0])
  np.testing.assert_array_equal(data.next_observation[:3, 0], [1, 2, 3])
  assert belief['seen'] == 12.0
  for leaf in jax.tree.leaves((belief, data)):  # NaN follows a termination
    assert np.all(np.isfinite(leaf))
    if leaf.shape[:1] == (5,):
      assert not np.any(leaf[3:])


def test_a_simulation_that_blows_up_starts_over():
  _, data, valid = _episode(probes.BlowsUp(), _spy(), _task())
  np.testing.assert_array_equal(valid, np.ones(5))
  np.testing.assert_array_equal(data.extras['diverged'], [0, 0, 1, 0, 0])
  np.testing.assert_array_equal(data.extras['time'], [0, 1, 2, 0, 1])
  np.testing.assert_array_equal(data.observation[:, 0], [0, 1, 2, 0, 1])
  np.testing.assert_array_equal(data.next_observation[:, 0], [1, 2, 2, 1, 2])
  np.testing.assert_array_equal(data.discount, np.ones(5))
  start = data.observation[0, 1]  # the same start again
  np.testing.assert_array_equal(data.observation[:, 1], np.full(5, start))


def test_with_terminations_blowing_up_is_one():
  family = probes.BlowsUp(terminates=True)
  _, data, valid = _episode(family, _spy(), _task(lifetime=5.0))
  np.testing.assert_array_equal(valid, [1, 1, 1, 0, 0])
  np.testing.assert_array_equal(data.extras['diverged'], [0, 0, 1, 0, 0])
  np.testing.assert_array_equal(data.discount[:3], [1, 1, 0])
  np.testing.assert_array_equal(data.next_observation[:3, 0], [1, 2, 2])
  # A body that falls before that does not blow up.
  _, data, valid = _episode(family, _spy(), _task(lifetime=2.0))
  np.testing.assert_array_equal(valid, [1, 1, 0, 0, 0])
  assert not np.any(data.extras['diverged'])


def test_the_same_key_gives_the_same_episode():
  start = lambda key: np.asarray(
    _episode(_FOREVER, rollout.uniform_policy(1), _task(), key)[1].observation
  )
  np.testing.assert_array_equal(start(_KEY), start(_KEY))
  assert not np.array_equal(start(_KEY), start(jax.random.key(1)))


def test_uniform_policy():
  policy = rollout.uniform_policy(2)
  actions = np.asarray(
    jax.jit(jax.vmap(lambda k: policy.act((), (), (), k)[0]))(
      jax.random.split(_KEY, 500)
    )
  )
  assert actions.shape == (500, 2)
  assert -1 <= actions.min() < -0.95 and 0.95 < actions.max() <= 1


@pytest.mark.parametrize('family', [_FOREVER, _MORTAL])
def test_reward_free_hides_rewards_from_the_policy(family):
  spy = _spy()

  def observe(params, state, transition, key):
    assert transition.extras == {}, 'features reached the policy'
    return {**state, 'seen': state['seen'] + jnp.abs(transition.reward)}

  belief, data, _ = _episode(
    family, spy._replace(observe=observe), _task(), reward_free=True
  )
  assert belief['seen'] == 0.0
  assert set(data.extras) == {'diverged'} and not np.any(data.reward)
  poisoned = _episode(
    probes.PoisonedReward(family),
    spy._replace(observe=observe),
    _task(),
    reward_free=True,
  )
  jax.tree.map(np.testing.assert_array_equal, poisoned[1], data)


def test_what_is_recorded_is_the_state_after_a_step():
  def observe(params, state, transition, key):
    assert 'count' not in transition.extras, 'it reached the policy'
    return state

  done = jax.jit(
    lambda: rollout.adaptation_sequence(
      _MORTAL,
      _spy()._replace(observe=observe),
      (),
      _task(),
      _KEY,
      6,
      1,
      record=lambda state: {'count': state.observation[0]},
    )
  )()
  done = jax.device_get(done)
  np.testing.assert_array_equal(
    done.transitions.extras['count'][:6], [1, 2, 3, 1, 2, 3]
  )
  np.testing.assert_array_equal(done.valid.sum(), 6)


# Adaptation sequences.


@functools.cache
def _adapting(family, num_steps, num_prior):
  run = jax.jit(
    lambda task, key: rollout.adaptation_sequence(
      family, _spy(), (), task, key, num_steps, num_prior
    )
  )
  return lambda task, key: jax.device_get(run(task, key))


def test_meta_test_protocol():
  """Two prior episodes, the third after 2 H transitions, as SMAC's release."""
  done = _adapting(_FOREVER, 15, 2)(_task(), _KEY)
  np.testing.assert_array_equal(done.returns, [30, 30, 30])
  np.testing.assert_array_equal(done.valid, np.ones(15))
  # The action of every step tells the size of the context behind it.
  np.testing.assert_allclose(
    100 * done.transitions.action[:, 0], [0] * 10 + [10] * 5, rtol=1e-5
  )
  assert done.context_size == 10
  # One episode after another, each with its own start.
  np.testing.assert_array_equal(
    done.transitions.observation[:, 0], [0, 1, 2, 3, 4] * 3
  )
  starts = done.transitions.observation[:, 1].reshape(3, 5)
  assert len(set(np.asarray(starts[:, 0]))) == 3


def test_a_started_episode_is_finished():
  # 12 steps are 2.4 episodes: the third is run to its end.
  done = _adapting(_FOREVER, 12, 1)(_task(), _KEY)
  assert done.returns.shape == (3,) and done.valid.shape == (15,)
  np.testing.assert_allclose(
    100 * done.transitions.action[:, 0], [0] * 5 + [5] * 5 + [10] * 5, rtol=1e-5
  )


def test_early_terminations_give_more_episodes():
  # Episodes of 3 steps: 5 of them reach 15.
  done = _adapting(_MORTAL, 15, 2)(_task(), _KEY)
  assert done.returns.shape == (12,)
  np.testing.assert_array_equal(done.returns[:5], [12] * 5)
  assert np.all(np.isnan(done.returns[5:]))
  assert done.valid.sum() == 15 and np.all(done.valid[:15] == 1)
  np.testing.assert_array_equal(
    done.transitions.observation[:15, 0], [0, 1, 2] * 5
  )
  np.testing.assert_allclose(
    100 * done.transitions.action[:15, 0],
    [0] * 6 + [6] * 3 + [9] * 3 + [12] * 3,
    rtol=1e-5,
  )
  assert done.context_size == 12
  assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(done.transitions))


def test_lifetimes_that_do_not_divide_the_budget():
  # Episodes of 4: 4, 8, 12, 16 >= 15.
  done = _adapting(_MORTAL, 15, 2)(_task(lifetime=4.0), _KEY)
  assert np.isfinite(done.returns).sum() == 4 and done.valid.sum() == 16
  # Of 1: stopped at the bound of 12 episodes.
  done = _adapting(_MORTAL, 15, 2)(_task(lifetime=1.0), _KEY)
  np.testing.assert_array_equal(done.returns, [2.0] * 12)


def test_the_context_is_exactly_what_was_gathered():
  seen = []

  def context_fn(transitions, valid, key):
    jax.debug.callback(
      lambda *x: seen.append(jax.device_get(x)),
      transitions.reward,
      valid,
      ordered=True,
    )
    return transitions, valid

  done = jax.jit(
    lambda: rollout.adaptation_sequence(
      _MORTAL, _spy(), (), _task(), _KEY, 9, 1, context_fn
    )
  )()
  jax.effects_barrier()
  np.testing.assert_array_equal(np.asarray(done.returns)[:3], [12, 12, 12])
  assert len(seen) == 3
  for number, (reward, valid) in enumerate(seen):
    used = 3 * number
    np.testing.assert_array_equal(valid, np.arange(len(valid)) < used)
    np.testing.assert_array_equal(reward[:used], [2, 4, 6] * number)


def test_final_return_is_the_last_episode_that_took_place():
  nan = np.nan
  returns = np.float32([[1.0, 2.0, 3.0], [4.0, 5.0, nan], [6.0, nan, nan]])
  final_return = jax.jit(rollout.final_return)
  np.testing.assert_array_equal(final_return(returns), [3, 5, 6])
  np.testing.assert_array_equal(final_return(returns[None]), [[3, 5, 6]])


# Latents.


def _latent_policy(period, deterministic=True):
  """Prior N(0, 1), posterior N(3, 1e-4); the action is tanh(z)."""

  def encode(params, context, valid):
    known = jnp.any(valid > 0)
    return Gaussian(
      jnp.where(known, 3.0, 0.0)[None], jnp.where(known, 1e-4, 1.0)[None]
    )

  return latent.latent_policy(
    encode,
    lambda params, observation, z: TanhNormal(z, 0 * z),
    1,
    deterministic,
    period,
  )


@pytest.mark.parametrize('period, distinct', [(1, 5), (0, 1), (2, 3)])
def test_latents_are_drawn_anew(period, distinct):
  done = jax.jit(
    lambda: rollout.adaptation_sequence(
      _FOREVER, _latent_policy(period), (), _task(), _KEY, 15, 2
    )
  )()
  z = np.arctanh(np.asarray(done.transitions.action)[:, 0]).reshape(3, 5)
  for episode in z:
    assert len(set(episode)) == distinct
    if period == 2:  # 0 1 | 2 3 | 4
      assert episode[0] == episode[1] != episode[2] == episode[3]
  assert not set(z[0]) & set(z[1])
  # Prior, prior, posterior.
  assert z[:2].std() > 0.3 and np.all(np.abs(z[:2]) < 4)
  np.testing.assert_allclose(z[2], 3.0, atol=0.1)
  assert np.abs(z[:2] - 3.0).min() > 0.1


def test_deterministic_and_stochastic_actions():
  belief = jax.jit(_latent_policy(0).init)((), _KEY)
  observation = np.zeros(2, np.float32)
  act = {
    deterministic: jax.jit(_latent_policy(0, deterministic).act)
    for deterministic in (True, False)
  }
  for deterministic in (True, False):
    actions = {
      float(
        act[deterministic]((), belief, observation, jax.random.key(i))[0].item()
      )
      for i in range(4)
    }
    assert len(actions) == (1 if deterministic else 4)
  mode = act[True]((), belief, observation, _KEY)[0]
  np.testing.assert_allclose(mode, np.tanh(belief.latent), rtol=1e-6)


def test_uniform_until_something_is_known():
  """Either the policy's own action or the uniform policy's, then its own."""
  config = sac.Config(critic_hidden=(4,), actor_hidden=(4,))
  algorithm = sac.make(Problem(helpers.SPEC), config)
  params = algorithm.actor_params(jax.jit(algorithm.init)(jax.random.key(0)))
  policy = rollout.uniform_at_first(algorithm.explore, 2)
  observation, key = np.ones(3, np.float32), jax.random.key(1)
  context = helpers.random_transitions(1, helpers.SPEC, (3,))
  own, random = jax.device_get(
    jax.jit(
      lambda: (
        algorithm.explore.act(params, (), observation, key)[0],
        rollout.uniform_policy(2).act((), (), observation, key)[0],
      )
    )()
  )
  assert np.all(own != random)

  @jax.jit
  def act(steps, valid):
    acting = rollout.Acting(params, steps)
    belief = policy.init(acting, key)
    if valid is not None:
      belief = policy.adapt(acting, belief, context, valid, key)
    belief = policy.observe(acting, belief, context, key)
    return policy.act(acting, belief, observation, key)[0]

  two, none = np.float32([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
  for steps, valid, expected in (
    (2, None, random),
    (2, none, random),
    (2, two, own),
    (3, two, random),
    (0, None, own),
    (0, none, own),
  ):
    np.testing.assert_array_equal(act(np.int32(steps), valid), expected)


def test_a_filter_sees_every_observation_and_keeps_what_it_asks_for():
  """`act` may change the state, also before the first step of an episode."""
  policy = _spy()._replace(
    init=lambda params, key: jnp.zeros(()),
    # Observations count steps: t plus a random start.
    act=lambda params, state, observation, key: (
      state[None] / 100,
      state + observation[1],
      {},
    ),
    observe=lambda params, state, transition, key: 10.0 * state,
    adapt=lambda params, state, context, valid, key: jnp.zeros(()),
    keep=lambda transition: transition._replace(
      observation=transition.observation[..., :1], next_observation=()
    ),
  )
  belief, data, _ = _episode(_FOREVER, policy, _task())
  start = data.observation[0, 1]
  expected = 0.0
  for t in range(_FOREVER.spec.episode_length):
    np.testing.assert_allclose(data.action[t, 0], expected / 100, rtol=1e-6)
    expected = 10.0 * (expected + start)
  np.testing.assert_allclose(belief, expected, rtol=1e-6)
  done = jax.jit(
    lambda task, key: rollout.adaptation_sequence(
      _FOREVER,
      policy,
      (),
      task,
      key,
      10,
      1,
      record=lambda state: {'position': state.physics},
    )
  )(_task(), _KEY)
  done = jax.device_get(done)
  kept = done.transitions
  assert kept.next_observation == () and kept.observation.shape[-1] == 1
  np.testing.assert_array_equal(kept.extras['position'][:3], [1.0, 2.0, 3.0])
  assert np.sum(kept.reward) == np.sum(done.returns)
