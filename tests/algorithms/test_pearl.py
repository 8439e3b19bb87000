"""PEARL: numerics against numpy, order of the steps, gradient routing."""

import dataclasses

import helpers
import jax
import numpy as np
import numpy_reference as reference
import pytest

from offmeta.algorithms import latent, pearl
from offmeta.networks.distributions import ShiftedTanhNormal, task_noise
from offmeta.types import Problem

SPEC, CONFIG = helpers.SPEC, helpers.PEARL
_NETWORKS = pearl.make_networks(SPEC, CONFIG)


@pytest.fixture(name='state', scope='module')
def _state():
  state = jax.jit(pearl.make(Problem(SPEC), CONFIG).init)(jax.random.key(0))
  return state.replace(
    params=helpers.shaken(state.params),
    target_params=helpers.shaken(state.target_params, 1),
  )


@pytest.fixture(name='batch', scope='module')
def _batch():
  composition = pearl.make(Problem(SPEC), CONFIG).loop('online').stages[0].batch
  return helpers.random_batch(1, SPEC, composition)


def _noise(state, batch):
  """The noise that `update` draws: stream i of every task slot."""
  return jax.device_get(_draw(state.key, state.step, batch.slot))


@jax.jit
def _draw(key, step, slots):
  return tuple(
    task_noise(latent.slot_keys(key, step, slots, i), shape)
    for i, shape in enumerate(((2,), (3, 2)))
  )


def _rows(z):
  return np.float32(z)[:, None].repeat(3, axis=1)


def test_critic_losses_against_numpy(state, batch):
  noise, _ = _noise(state, batch)
  terms, z = jax.jit(
    lambda p, t, b, n: pearl.critic_losses(p, t, b, n, _NETWORKS, CONFIG, None)
  )(state.params, state.target_params, batch, noise)
  expected, z_expected, _ = reference.pearl_critic(
    state.params, state.target_params, batch, noise, CONFIG
  )
  assert set(terms) == set(expected)
  for name, value in expected.items():
    np.testing.assert_allclose(terms[name], value, rtol=2e-5, err_msg=name)
  np.testing.assert_allclose(z, _rows(z_expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  'changes',
  [{}, {'tanh_correction': 'shifted'}, {'mean_penalised': 'after_tanh'}],
)
def test_actor_losses_against_numpy(state, batch, changes):
  config = dataclasses.replace(CONFIG, **changes)
  networks = pearl.make_networks(SPEC, config)
  _, noise = _noise(state, batch)
  z = np.float32(np.random.default_rng(3).normal(size=(4, 2)))
  terms, _ = jax.jit(
    lambda p, c, b, z, n: pearl.actor_losses(p, c, b, z, n, networks, config)
  )(state.params, state.params['critic'], batch, _rows(z), noise)
  expected, _ = reference.pearl_actor(
    state.params, state.params['critic'], batch, z, noise, config
  )
  assert set(terms) == set(expected)
  for name, value in expected.items():
    np.testing.assert_allclose(terms[name], value, rtol=2e-5, err_msg=name)


def test_switches_of_the_release(state):
  """The correction reaches the actor, zero biases every network."""
  config = dataclasses.replace(
    CONFIG, tanh_correction='shifted', zero_last_bias=True
  )
  networks = pearl.make_networks(SPEC, config)
  distribution = jax.eval_shape(
    networks.actor.apply,
    state.params['actor'],
    *(np.ones(size, np.float32) for size in (3, 2)),
  )
  assert isinstance(distribution, ShiftedTanhNormal)
  plain = pearl.make_networks(SPEC, CONFIG)
  key = jax.random.key(0)
  start, plain = (
    jax.device_get(
      jax.jit(lambda n=n: {k: v.init(key) for k, v in n._asdict().items()})()
    )
    for n in (networks, plain)
  )
  zeros = lambda tree: sum(not np.any(leaf) for leaf in jax.tree.leaves(tree))
  for name, params in start.items():
    more = zeros(params) - zeros(plain[name])
    assert more == (2 if name == 'critic' else 1), name  # one per member


def test_unknown_penalty_is_refused():
  with pytest.raises(ValueError, match='mean_penalised: .both'):
    pearl.make(
      Problem(SPEC), dataclasses.replace(CONFIG, mean_penalised='both')
    )


def test_without_decoder_there_is_no_reward_term(state, batch):
  config = dataclasses.replace(CONFIG, train_decoder=False)
  terms, _ = jax.eval_shape(
    lambda *given: pearl.critic_losses(*given, _NETWORKS, config, None),
    state.params,
    state.target_params,
    batch,
    _noise(state, batch)[0],
  )
  assert set(terms) == {'critic', 'kl'}


def test_updates_against_numpy_adam(state, batch):
  """Two whole updates: the value learns from the *updated* critics.

  And from z of the encoder before its update; its target follows the new
  value.
  """
  update = jax.jit(
    pearl.make(Problem(SPEC), CONFIG).loop('online').stages[0].update
  )
  adams = {
    name: reference.Adam(rate)
    for name, rate in (
      ('critic', CONFIG.critic_lr),
      ('value', CONFIG.value_lr),
      ('decoder', CONFIG.context_lr),
    )
  }
  target = jax.tree.map(
    lambda x: np.asarray(x, np.float64), state.target_params
  )
  for _ in range(2):
    params = state.params
    latent_noise, action_noise = _noise(state, batch)
    _, z, y = reference.pearl_critic(
      params, state.target_params, batch, latent_noise, CONFIG
    )
    inputs = [(s, a, z[m]) for m, _, s, a, *_ in reference.rows(batch)]
    critic = adams['critic'].step(
      params['critic'],
      tuple(reference.mse_gradient(c, inputs, y) for c in params['critic']),
    )
    rewards = [r for _, _, _, _, r, *_ in reference.rows(batch)]
    decoder = adams['decoder'].step(
      params['context']['decoder'],
      reference.mse_gradient(params['context']['decoder'], inputs, rewards),
    )
    _, value_targets = reference.pearl_actor(
      params, critic, batch, z, action_noise, CONFIG
    )
    inputs = [(s, z[m]) for m, _, s, *_ in reference.rows(batch)]
    value = adams['value'].step(
      params['value'],
      reference.mse_gradient(params['value'], inputs, value_targets),
    )
    target = jax.tree.map(lambda t, v: 0.9 * t + 0.1 * v, target, value)
    state, _ = update(state, batch)
    helpers.assert_close(state.params['critic'], critic, 1e-4, 1e-5)
    helpers.assert_close(
      state.params['context']['decoder'], decoder, 1e-4, 1e-5
    )
    helpers.assert_close(state.params['value'], value, 1e-4, 1e-5)
    helpers.assert_close(state.target_params, target, 1e-4, 1e-5)
  moments = state.opt_state['value'][0].mu['params']
  for layer in ('Dense_0', 'Dense_1'):
    np.testing.assert_allclose(
      moments[layer]['kernel'],
      adams['value'].mean['params', layer, 'kernel'],
      rtol=1e-3,
      atol=1e-4,
    )
  moments = state.opt_state['critic'][0].mu[1]['params']
  np.testing.assert_allclose(
    moments['Dense_0']['kernel'],
    adams['critic'].mean[1, 'params', 'Dense_0', 'kernel'],
    rtol=1e-3,
    atol=1e-4,
  )


# Gradient routing: term -> parts that it reaches.

_PARTS = ('encoder', 'decoder', 'critic', 'value', 'actor', 'target')
_ROUTES = {
  'critic': {'encoder', 'critic'},
  'kl': {'encoder'},
  'reward': {'encoder', 'decoder'},
  'value': {'value'},
  'actor': {'actor'},
  'regulariser': {'actor'},
}


@pytest.mark.parametrize('q_into_encoder', [False, True])
def test_gradient_routing(state, batch, q_into_encoder):
  """Value and policy losses never reach encoder and critics."""
  config = dataclasses.replace(CONFIG, backprop_q_into_encoder=q_into_encoder)
  noises = _noise(state, batch)

  @jax.jit
  def gradients(params, target):
    def terms(params, target):
      first, z = pearl.critic_losses(
        params, target, batch, noises[0], _NETWORKS, config, None
      )
      # As in `update`: z as it comes out, the critics not differentiated.
      second, _ = pearl.actor_losses(
        params,
        jax.lax.stop_gradient(params['critic']),
        batch,
        z,
        noises[1],
        _NETWORKS,
        config,
      )
      return {**first, **second}

    return jax.jacrev(terms, (0, 1))(params, target)

  routes = dict(_ROUTES)
  if not q_into_encoder:
    routes['critic'] = {'critic'}
  found = gradients(state.params, state.target_params)
  assert set(found) == set(routes)
  for term, (params, target) in found.items():
    parts = {**params, **params['context'], 'target': target}
    reached = {part for part in _PARTS if helpers.largest(parts[part]) > 1e-7}
    untouched = {part for part in _PARTS if helpers.largest(parts[part]) == 0}
    assert reached == routes[term], term
    assert untouched == set(_PARTS) - routes[term], term


def test_behaviour_defaults():
  """SMAC's data generator (the defaults), and the first release."""
  c = pearl.Config()
  assert (c.latent_size, c.encoder_hidden) == (5, (200,) * 3)
  assert c.critic_hidden == c.value_hidden == c.actor_hidden == (300,) * 3
  assert (c.critic_lr, c.actor_lr, c.context_lr, c.value_lr) == (
    3e-4,
    3e-4,
    3e-4,
    1e-3,
  )
  assert (c.discount, c.target_rate, c.reward_scale, c.kl_weight) == (
    0.99,
    0.005,
    5.0,
    0.1,
  )
  assert c.train_decoder and c.backprop_q_into_encoder
  assert c.mean_weight == c.log_std_weight == 1e-3
  assert (
    c.online.num_updates,
    c.online.num_tasks,
    c.online.query_size,
    c.online.context_size,
  ) == (16_000, 4, 256, 64)
