"""SMAC: numerics against numpy, gradient routing, switches, relabelling."""

import dataclasses

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference as reference
import pytest
import smac_inputs

from offmeta.algorithms import smac
from offmeta.types import Evidence, Problem, Transition

SPEC, CONFIG = helpers.SPEC, helpers.SMAC


@pytest.fixture(name='state', scope='module')
def _state():
  return smac_inputs.make_state()


@pytest.fixture(name='batch', scope='module')
def _batch():
  return smac_inputs.make_batch()


_VARIANTS = {
  'released': {},
  'other switches': dict(
    kl_over_tasks='sum',
    independent_next_latent=False,
    awac_weight=0.3,
    online_q_weight=0.7,
    encoder_loss='both',
  ),
}


@pytest.mark.parametrize('online', [False, True], ids=['offline', 'online'])
@pytest.mark.parametrize('variant', list(_VARIANTS))
def test_losses_against_numpy(state, batch, variant, online):
  config = dataclasses.replace(CONFIG, **_VARIANTS[variant])
  noise = smac_inputs.make_noise(state, batch)
  terms, logs = jax.jit(smac_inputs.bind_losses(config, online))(
    state.params, state.target_params, batch, noise
  )
  expected, _, _ = reference.smac(
    state.params, state.target_params, batch, noise, config, online
  )
  assert set(terms) == set(expected)
  for name, value in expected.items():
    # Float32 against float64.
    np.testing.assert_allclose(terms[name], value, rtol=2e-5, err_msg=name)
  assert all(np.isfinite(value) for value in logs.values())


@pytest.mark.parametrize('online', [False, True], ids=['offline', 'online'])
def test_updates_against_numpy_adam(state, batch, online):
  """Two whole updates of decoder and critics, without jax or optax."""
  config = dataclasses.replace(CONFIG, train_context_online=True)
  algorithm = smac.make(Problem(SPEC), config)
  (stage,) = algorithm.loop('online' if online else 'offline').stages
  update = jax.jit(stage.update)
  adams = {
    'decoder': reference.Adam(config.context_lr),
    'critic': reference.Adam(config.critic_lr),
  }
  target = jax.tree.map(
    lambda x: np.asarray(x, np.float64), state.target_params
  )
  for _ in range(2):
    noise = smac_inputs.make_noise(state, batch)
    _, z, y = reference.smac(
      state.params, state.target_params, batch, noise, config, online
    )
    inputs = [(s, a, z[m]) for m, _, s, a, *_ in reference.rows(batch)]
    rewards = [r for _, _, _, _, r, *_ in reference.rows(batch)]
    decoder = adams['decoder'].step(
      state.params['context']['decoder'],
      reference.mse_gradient(
        state.params['context']['decoder'], inputs, rewards
      ),
    )
    critic = adams['critic'].step(
      state.params['critic'],
      tuple(
        reference.mse_gradient(c, inputs, y) for c in state.params['critic']
      ),
    )
    target = jax.tree.map(lambda t, c: 0.9 * t + 0.1 * c, target, critic)
    state, _ = update(state, batch)
    helpers.assert_close(
      state.params['context']['decoder'], decoder, 1e-4, 1e-5
    )
    helpers.assert_close(state.params['critic'], critic, 1e-4, 1e-5)
    helpers.assert_close(state.target_params, target, 1e-4, 1e-5)
  # Adam's direction hides a scaled gradient; its moments do not.
  moments = state.opt_state['critic'][0]
  mean = adams['critic'].mean
  for i in range(2):
    np.testing.assert_allclose(
      moments.mu[i]['params']['Dense_0']['kernel'],
      mean[i, 'params', 'Dense_0', 'kernel'],
      rtol=1e-3,
      atol=1e-5,
    )
  moments = state.opt_state['context'][0].mu['decoder']['params']
  np.testing.assert_allclose(
    moments['Dense_1']['kernel'],
    adams['decoder'].mean['params', 'Dense_1', 'kernel'],
    rtol=1e-3,
    atol=1e-5,
  )


def test_diagnoses_against_numpy(state, batch):
  """KL and error of the decoder for 1, 2, 4 and all 5 of the transitions."""
  context = jax.tree.map(np.asarray, batch.context)
  # The policy's own contexts have no second row: it comes never to count.
  holes = np.array([1.0, 0.0, 1.0, 1.0, 1.0]) * np.ones((4, 1))
  rows_mask = np.array([1.0, 1.0, 0.0]) * np.ones((4, 1))
  key = jax.random.key(7)
  evidence = Evidence(
    logged=context,
    logged_mask=np.ones((4, 5)),
    own=jax.tree.map(lambda x: x[:, ::-1], context),
    own_mask=holes,
    rows=batch.query,
    rows_mask=rows_mask,
    key=key,
  )
  algorithm = smac.make(Problem(SPEC), CONFIG)
  found = jax.jit(algorithm.diagnose)(state, evidence)
  params = state.params['context']
  noise = [
    np.asarray(jax.random.normal(k, (2,)), np.float64)
    for k in jax.random.split(key, 4)
  ]
  expected = {}
  for kind, all_rows, counted in (
    ('logged', context, {1: [0], 2: [0, 1], 4: [0, 1, 2, 3], 5: range(5)}),
    (
      'own',
      evidence.own,
      {1: [0], 2: [0, 2], 4: [0, 2, 3, 4], 5: [0, 2, 3, 4]},
    ),
  ):
    x = f'{kind}_transitions'
    expected[x] = list(counted)
    kls, errors = [], []
    for given in counted.values():
      mask = np.isin(np.arange(5), list(given))
      of = [
        reference.posterior(
          params['encoder'],
          Transition(*[leaf[m] for leaf in all_rows[:-1]]),
          mask,
        )
        for m in range(4)
      ]
      kls.append(np.mean([reference.kl_to_prior(*p) for p in of]))
      z = [mean + np.sqrt(var) * e for (mean, var), e in zip(of, noise)]
      errors.append(
        np.mean(
          [
            abs(reference.mlp(params['decoder'], s, a, z[m])[0] - r)
            for m, b, s, a, r, *_ in reference.rows(batch)
            if rows_mask[m, b]
          ]
        )
      )
    expected[f'kl_to_prior_by_{x}'] = kls
    expected[f'reward_error_by_{x}'] = errors
  assert set(found) == set(expected)
  for name, value in expected.items():
    np.testing.assert_allclose(found[name], value, rtol=2e-5, err_msg=name)


# Gradient routing: term -> parts that it reaches.

_PARTS = ('encoder', 'decoder', 'critic', 'actor', 'target')
_ROUTES = {
  'reward': {'encoder', 'decoder'},
  'kl': {'encoder'},
  'critic': {'critic'},
  'actor': {'actor'},
}


@pytest.mark.parametrize('actor', ['awac', 'sac'])
@pytest.mark.parametrize(
  'online, encoder_loss',
  [(False, 'reward'), (True, 'reward'), (True, 'both'), (True, 'q')],
)
def test_gradient_routing(state, batch, actor, online, encoder_loss):
  config = dataclasses.replace(CONFIG, actor=actor, encoder_loss=encoder_loss)
  losses = smac_inputs.bind_losses(config, online)
  noise = smac_inputs.make_noise(state, batch)

  @jax.jit
  def gradients(params, target):
    return jax.jacrev(lambda p, t: losses(p, t, batch, noise)[0], (0, 1))(
      params, target
    )

  routes = dict(_ROUTES)
  if encoder_loss != 'reward':
    routes['critic'] = {'critic', 'encoder'}
  if encoder_loss == 'q':  # the decoder, which labels, trains all the same
    routes['reward'] = {'decoder'}
  for term, (params, target) in gradients(
    state.params, state.target_params
  ).items():
    parts = {
      **params['context'],
      'critic': params['critic'],
      'actor': params['actor'],
      'target': target,
    }
    reached = {part for part in _PARTS if helpers.largest(parts[part]) > 1e-6}
    untouched = {part for part in _PARTS if helpers.largest(parts[part]) == 0}
    assert reached == routes[term], term
    assert untouched == set(_PARTS) - routes[term], term


def test_offline_actor_gradient_is_advantage_weighted_cloning(state, batch):
  """In the offline phase the actor's own actions carry no gradient."""
  cold = dataclasses.replace(CONFIG, awac_temperature=np.inf)
  noise = smac_inputs.make_noise(state, batch)

  def gradient(fn):
    return jax.jit(jax.grad(fn))(state.params['actor'])

  def with_actor(online):
    def loss(actor):
      params = {**state.params, 'actor': actor}
      return smac_inputs.bind_losses(cold, online)(
        params, state.target_params, batch, noise
      )[0]['actor']

    return loss

  def cloning(actor):
    networks = smac.make_networks(SPEC, cold)
    posterior = networks.encoder.apply(
      state.params['context']['encoder'], batch.context, batch.context_mask
    )
    z = posterior.sample(noise['latent'])[:, None].repeat(3, axis=1)
    return -jnp.mean(
      networks.actor.apply(actor, batch.query.observation, z).log_prob(
        batch.query.action
      )
    )

  offline = gradient(with_actor(False))
  helpers.assert_close(offline, gradient(cloning), 1e-3, 1e-4)
  online = gradient(with_actor(True))
  difference = jax.tree.map(np.subtract, online, offline)
  assert helpers.largest(difference) > 1e-3


# What an update leaves alone.


@pytest.mark.parametrize('trained', [False, True], ids=['frozen', 'trained'])
def test_context_networks_online(state, batch, trained):
  config = dataclasses.replace(CONFIG, train_context_online=trained)
  update = jax.jit(
    smac.make(Problem(SPEC), config).loop('online').stages[0].update
  )
  before = state
  for _ in range(2):
    state, _ = update(state, batch)
  assert int(state.step) == 2
  for group in ('critic', 'actor'):
    change = jax.tree.map(
      np.subtract, state.params[group], before.params[group]
    )
    assert helpers.largest(change) > 0
  helpers.assert_same(state.extras, before.extras)
  pairs = (
    (state.params['context'], before.params['context']),
    (state.opt_state['context'], before.opt_state['context']),
  )
  for now, then in pairs:
    if trained:
      change = jax.tree.map(np.subtract, now, then)
      assert helpers.largest(change) > 0
    else:
      helpers.assert_same(now, then)


def test_begin_online_takes_a_snapshot_and_keeps_the_optimiser(state):
  after = jax.jit(smac.make(Problem(SPEC), CONFIG).loop('online').begin)(state)
  helpers.assert_same(after.extras, state.params['context'])
  helpers.assert_same(after.replace(extras=state.extras), state)


# Relabelling.


@pytest.mark.parametrize('label_with', ['snapshot', 'current'])
def test_relabel_against_numpy(state, batch, label_with):
  config = dataclasses.replace(CONFIG, label_with=label_with)
  relabel = jax.jit(smac.make(Problem(SPEC), config).relabel)
  networks = state.extras
  if label_with == 'current':
    networks = state.params['context']
  context = jax.tree.map(lambda x: x[1], batch.context)
  mask = batch.context_mask[1]
  data = helpers.random_transitions(5, SPEC, (6,))
  key = jax.random.key(6)
  labels = relabel(state, context, mask, data, key)
  mean, variance = reference.posterior(networks['encoder'], context, mask)
  # One z for the whole rollout.
  z = mean + np.sqrt(variance) * np.asarray(jax.random.normal(key, (2,)))
  expected = [
    reference.mlp(networks['decoder'], s, a, z)[0]
    for s, a in zip(data.observation, data.action)
  ]
  np.testing.assert_allclose(labels, expected, rtol=1e-4, atol=1e-5)
  # Another key is another z.
  assert (
    np.abs(
      np.subtract(
        relabel(state, context, mask, data, jax.random.key(7)), labels
      )
    ).min()
    > 1e-6
  )


def test_released_defaults():
  """Those of the release."""
  c = smac.Config()
  assert (c.latent_size, c.encoder_hidden, c.decoder_hidden) == (
    5,
    (200,) * 3,
    (64, 64),
  )
  assert (c.critic_hidden, c.actor_hidden) == ((300,) * 3, (300,) * 3)
  assert (c.context_lr, c.critic_lr, c.actor_lr) == (3e-4,) * 3
  assert (c.discount, c.target_rate, c.reward_scale) == (0.99, 0.005, 5.0)
  assert (c.kl_weight, c.awac_temperature) == (0.1, 100.0)
  assert (c.awac_weight, c.online_q_weight) == (1.0, 1.0)
  assert (c.encoder_loss, c.actor) == ('reward', 'awac')
  assert not c.train_context_online
  assert c.latent_resample_period == 1
  assert c.offline == smac.OfflineConfig(50_000, 4, 128, 64)
  assert (
    c.online.num_updates,
    c.online.num_tasks,
    c.online.query_size,
    c.online.context_size,
    c.online.task_repeat,
  ) == (16_000, 4, 256, 64, 4)
  assert (c.online.context, c.online.online_share) == ('transitions', -1)
