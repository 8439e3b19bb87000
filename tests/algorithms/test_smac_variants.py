"""SMAC's other actor, encoder losses and weights, against numpy."""

import dataclasses

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference as reference
import pytest
import smac_inputs

from offmeta.algorithms import smac
from offmeta.losses import policy
from offmeta.types import Problem

SPEC, CONFIG = helpers.SPEC, helpers.SMAC


def _with(**changes):
  return dataclasses.replace(CONFIG, **changes)


@pytest.fixture(name='state', scope='module')
def _state():
  return smac_inputs.make_state()


@pytest.fixture(name='batch', scope='module')
def _batch():
  return smac_inputs.make_batch()


@pytest.fixture(name='noise', scope='module')
def _noise(state, batch):
  return smac_inputs.make_noise(state, batch)


def _double(tree):
  return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def _assert_gradient(gradient, objective, params):
  """A gradient against central differences of a function in float64."""
  params, gradient = _double(params), _double(gradient)
  rng = np.random.default_rng(0)
  for _ in range(3):
    direction = jax.tree.map(lambda x: rng.normal(size=x.shape), params)
    move = lambda h: objective(
      jax.tree.map(lambda x, d: x + h * d, params, direction)
    )
    slope = (move(1e-5) - move(-1e-5)) / 2e-5
    along = sum(
      jax.tree.leaves(
        jax.tree.map(lambda g, d: np.sum(g * d), gradient, direction)
      )
    )
    np.testing.assert_allclose(along, slope, rtol=2e-4)


def _latents(encoder, batch, noise, name):
  return [
    mean + np.sqrt(variance) * np.asarray(e, np.float64)
    for (mean, variance), e in zip(
      reference.task_posteriors(encoder, batch), noise[name]
    )
  ]


# The SAC actor.

_SACS = {
  'as PEARL': smac.SacActorConfig(),
  'other weights': smac.SacActorConfig(
    entropy_weight=0.3, mean_weight=0.2, log_std_weight=0.1
  ),
  'hard target': smac.SacActorConfig(entropy_in_target=False),
}


def _own(actor, s, z, noise):
  """(action, log-probability, mean, log-std) of the actor's own action."""
  mean, log_std = reference.normal_tanh(actor, s, z)
  x = mean + np.exp(log_std) * np.asarray(noise, np.float64)
  return np.tanh(x), reference.tanh_log_prob(x, mean, log_std), mean, log_std


def _sac_actor(actor, params, batch, noise, config):
  """Entropy-regularised -Q, and PEARL's regularisers."""
  z = _latents(params['context']['encoder'], batch, noise, 'latent')
  losses, means, log_stds = [], [], []
  for m, b, s, *_ in reference.rows(batch):
    action, log_prob, mean, log_std = _own(
      actor, s, z[m], noise['action'][m, b]
    )
    q = reference.min_q(params['critic'], s, action, z[m])
    losses.append(config.sac.entropy_weight * log_prob - q)
    means.append(mean)
    log_stds.append(log_std)
  return (
    np.mean(losses)
    + config.sac.mean_weight * np.mean(np.square(means))
    + config.sac.log_std_weight * np.mean(np.square(log_stds))
  )


def _sac_critic(params, target, batch, noise, config):
  """TD error; the entropy of the next action is part of its value."""
  encoder = params['context']['encoder']
  z = _latents(encoder, batch, noise, 'latent')
  next_z = _latents(encoder, batch, noise, 'next_latent')
  errors = []
  for m, b, s, a, r, discount, s2 in reference.rows(batch):
    a2, log_prob, *_ = _own(
      params['actor'], s2, next_z[m], noise['next_action'][m, b]
    )
    value = reference.min_q(target, s2, a2, z[m])
    if config.sac.entropy_in_target:
      value -= config.sac.entropy_weight * log_prob
    y = config.reward_scale * r + config.discount * discount * value
    errors.append(
      sum((reference.mlp(c, s, a, z[m])[0] - y) ** 2 for c in params['critic'])
    )
  return np.mean(errors)


@pytest.mark.parametrize('online', [False, True], ids=['offline', 'online'])
@pytest.mark.parametrize('name', list(_SACS))
def test_sac_actor_against_numpy(state, batch, noise, name, online):
  config = _with(actor='sac', sac=_SACS[name])
  terms, logs = jax.jit(smac_inputs.bind_losses(config, online))(
    state.params, state.target_params, batch, noise
  )
  np.testing.assert_allclose(
    terms['actor'],
    _sac_actor(state.params['actor'], state.params, batch, noise, config),
    rtol=2e-5,
  )
  np.testing.assert_allclose(
    terms['critic'],
    _sac_critic(state.params, state.target_params, batch, noise, config),
    rtol=2e-5,
  )
  assert all(np.isfinite(value) for value in logs.values())


def test_sac_actor_gradient_against_numpy(state, batch, noise):
  config = _with(actor='sac', sac=_SACS['other weights'])
  losses = smac_inputs.bind_losses(config, False)
  gradient = jax.jit(
    jax.grad(
      lambda actor: losses(
        {**state.params, 'actor': actor},
        state.target_params,
        batch,
        noise,
      )[0]['actor']
    )
  )(state.params['actor'])
  _assert_gradient(
    gradient,
    lambda actor: _sac_actor(actor, state.params, batch, noise, config),
    state.params['actor'],
  )


def test_sac_actor_without_entropy_is_the_q_term(state, batch, noise):
  hard = smac.SacActorConfig(
    entropy_weight=0.0, mean_weight=0.0, log_std_weight=0.0
  )
  terms = [
    jax.jit(smac_inputs.bind_losses(config, True))(
      state.params, state.target_params, batch, noise
    )[0]
    for config in (_with(actor='sac', sac=hard), _with(awac_weight=0.0))
  ]
  helpers.assert_close(*terms, rtol=1e-6)


def test_sac_actor_trains_alike_in_both_phases(state, batch):
  config = _with(actor='sac', train_context_online=True)
  algorithm = smac.make(Problem(SPEC), config)
  offline, online = (
    jax.jit(stage.update)(state, batch)
    for loop in algorithm.loops
    for stage in loop.stages
  )
  helpers.assert_same(online, offline)


# What trains the encoder.


def _encoder_objective(encoder, params, targets, batch, noise, config):
  """What the encoder descends; TD targets are held fixed."""
  z = _latents(encoder, batch, noise, 'latent')
  reward_errors, td_errors = [], []
  for (m, _, s, a, r, *_), y in zip(reference.rows(batch), targets):
    decoded = reference.mlp(params['context']['decoder'], s, a, z[m])[0]
    reward_errors.append((decoded - r) ** 2)
    td_errors.append(
      sum((reference.mlp(c, s, a, z[m])[0] - y) ** 2 for c in params['critic'])
    )
  loss = config.kl_weight * np.mean(
    [
      reference.kl_to_prior(*belief)
      for belief in reference.task_posteriors(encoder, batch)
    ]
  )
  if config.encoder_loss in ('reward', 'both'):
    loss += np.mean(reward_errors)
  if config.encoder_loss in ('q', 'both'):
    loss += np.mean(td_errors)
  return loss


@pytest.mark.parametrize('encoder_loss', ['reward', 'q', 'both'])
def test_encoder_gradient_against_numpy(state, batch, noise, encoder_loss):
  config = _with(encoder_loss=encoder_loss)
  losses = smac_inputs.bind_losses(config, True)

  def total(encoder):
    context = {**state.params['context'], 'encoder': encoder}
    terms, _ = losses(
      {**state.params, 'context': context}, state.target_params, batch, noise
    )
    return sum(terms.values())

  encoder = state.params['context']['encoder']
  _, _, targets = reference.smac(
    state.params, state.target_params, batch, noise, config, True
  )
  _assert_gradient(
    jax.jit(jax.grad(total))(encoder),
    lambda e: _encoder_objective(
      e, state.params, targets, batch, noise, config
    ),
    encoder,
  )


def test_the_decoder_trains_alike_whatever_trains_the_encoder(state, batch):
  decoders = [
    jax.jit(
      smac.make(Problem(SPEC), _with(encoder_loss=loss))
      .loop('offline')
      .stages[0]
      .update
    )(state, batch)[0].params['context']['decoder']
    for loss in ('reward', 'q')
  ]
  helpers.assert_close(decoders[1], decoders[0], 1e-5)
  change = jax.tree.map(
    np.subtract, decoders[1], state.params['context']['decoder']
  )
  assert helpers.largest(change) > 1e-3


# Meta behaviour cloning.


def test_infinite_temperature_weighs_all_alike_exactly(state, batch, noise):
  advantage = jnp.array([[-1e30, 3.0], [0.5, 1e30], [7.0, -7.0], [0.0, 1e-9]])
  weigh = policy.softmax_advantage_weights
  ones = np.ones((4, 2), np.float32)
  np.testing.assert_array_equal(
    jax.jit(lambda a: weigh(a, np.inf))(advantage), ones
  )
  devices = jax.devices()[:4]
  assert len(devices) == 4
  shared = jax.pmap(
    lambda a: weigh(a, np.inf, 'task'), axis_name='task', devices=devices
  )
  np.testing.assert_array_equal(shared(advantage), ones)
  config = _with(awac_temperature=np.inf)
  terms, logs = jax.jit(smac_inputs.bind_losses(config, False))(
    state.params, state.target_params, batch, noise
  )
  np.testing.assert_allclose(terms['actor'], -logs['actor/log_prob'], rtol=1e-6)
  assert logs['actor/max_weight'] == 1.0
