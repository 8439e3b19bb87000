"""SAC: numerics against numpy, gradient routing, temperature, acting."""

import dataclasses

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference as reference
import pytest

from offmeta import testing
from offmeta.algorithms import latent, sac
from offmeta.networks.distributions import task_noise
from offmeta.testing import probes
from offmeta.types import Problem

SPEC = helpers.SPEC
CONFIG = sac.Config(
  critic_hidden=(7,),
  actor_hidden=(6,),
  critic_lr=0.02,
  actor_lr=0.01,
  temperature_lr=0.05,
  target_rate=0.1,
  reward_scale=2.0,
  temperature=0.3,
  target_entropy_per_action=-0.7,
  num_updates=4,
  batch_size=5,
)
_NETWORKS = sac.make_networks(SPEC, CONFIG)


@pytest.fixture(name='state', scope='module')
def _state():
  state = jax.jit(sac.make(Problem(SPEC), CONFIG).init)(jax.random.key(0))
  params = helpers.shaken({k: state.params[k] for k in ('critic', 'actor')})
  return state.replace(
    params={**state.params, **params},
    target_params=helpers.shaken(state.target_params, 1),
  )


@pytest.fixture(name='batch', scope='module')
def _batch():
  composition = sac.make(Problem(SPEC), CONFIG).loop('online').stages[0].batch
  return jax.jit(lambda key: probes.random_batch(key, SPEC, composition))(
    jax.random.key(1)
  )


@pytest.fixture(name='update', scope='module')
def _update():
  return jax.jit(
    sac.make(Problem(SPEC), CONFIG).loop('online').stages[0].update
  )


def _noise(state, batch):
  """The noise that `update` draws, of the actions at s and at s'."""
  return tuple(
    task_noise(latent.slot_keys(state.key, state.step, batch.slot, i), (5, 2))
    for i in range(2)
  )


@jax.jit
def _losses(params, target, query, noise):
  return sac.losses(params, target, query, noise, _NETWORKS, CONFIG)[0]


# The losses in numpy, transition by transition.


def _act(actor, s, noise):
  """Action and log-probability."""
  mean, log_std = reference.normal_tanh(actor, s, [])
  x = mean + np.exp(log_std) * np.asarray(noise, np.float64)
  return np.tanh(x), reference.tanh_log_prob(x, mean, log_std)


def _critic(params, target, batch, noise):
  """The loss, and the target y of every row."""
  alpha = np.exp(float(params['temperature']))
  targets, errors = [], []
  for m, b, s, a, r, discount, s2 in reference.rows(batch):
    a2, log_prob = _act(params['actor'], s2, noise[1][m, b])
    value = reference.min_q(target, s2, a2, []) - alpha * log_prob
    y = CONFIG.reward_scale * r + CONFIG.discount * discount * value
    targets.append(y)
    errors.append(
      sum((reference.mlp(c, s, a)[0] - y) ** 2 for c in params['critic'])
    )
  return np.mean(errors), targets


def _actor(params, batch, noise):
  """The loss, and the mean log-probability of the actor's actions."""
  alpha = np.exp(float(params['temperature']))
  losses, log_probs = [], []
  for m, b, s, *_ in reference.rows(batch):
    a, log_prob = _act(params['actor'], s, noise[0][m, b])
    losses.append(
      alpha * log_prob - reference.min_q(params['critic'], s, a, [])
    )
    log_probs.append(log_prob)
  return np.mean(losses), np.mean(log_probs)


def _temperature(params, log_prob):
  """Its gradient with respect to log alpha is the loss itself."""
  alpha = np.exp(float(params['temperature']))
  target_entropy = -0.7 * SPEC.action_size
  return -alpha * (log_prob + target_entropy)


def test_losses_against_numpy(state, batch):
  noise = _noise(state, batch)
  terms = _losses(state.params, state.target_params, batch.query, noise)
  actor, log_prob = _actor(state.params, batch, noise)
  expected = {
    'critic': _critic(state.params, state.target_params, batch, noise)[0],
    'actor': actor,
    'temperature': _temperature(state.params, log_prob),
  }
  assert set(terms) == set(expected)
  for name, value in expected.items():
    np.testing.assert_allclose(terms[name], value, rtol=2e-5, err_msg=name)


def test_a_termination_ends_the_return(state, batch):
  """No value of s' where the discount is 0."""
  noise = _noise(state, batch)
  ended = batch.query._replace(discount=jnp.zeros_like(batch.query.discount))
  other = ended._replace(next_observation=ended.next_observation + 3.0)
  loss = lambda query: _losses(state.params, state.target_params, query, noise)[
    'critic'
  ]
  np.testing.assert_array_equal(loss(ended), loss(other))
  assert loss(batch.query) != loss(ended)


def test_actor_gradient_against_finite_differences(state, batch):
  """It flows through the action into Q as well as into log pi."""
  noise = _noise(state, batch)
  gradient = jax.grad(
    lambda actor: _losses(
      {**state.params, 'actor': actor}, state.target_params, batch.query, noise
    )['actor']
  )(state.params['actor'])
  leaves, structure = jax.tree.flatten(state.params['actor'])
  rng = np.random.default_rng(0)
  for _ in range(3):
    direction = [rng.normal(size=x.shape) for x in leaves]
    at = lambda step: _actor(
      {
        **state.params,
        'actor': jax.tree.unflatten(
          structure,
          [
            np.asarray(x, np.float64) + step * d
            for x, d in zip(leaves, direction)
          ],
        ),
      },
      batch,
      noise,
    )[0]
    numeric = (at(1e-6) - at(-1e-6)) / 2e-6
    exact = sum(
      np.sum(np.asarray(g) * d)
      for g, d in zip(jax.tree.leaves(gradient), direction)
    )
    np.testing.assert_allclose(exact, numeric, rtol=1e-3, atol=1e-4)


def test_updates_against_numpy_adam(state, batch, update):
  """Two whole updates of critics, targets and temperature.

  All gradients are taken at the parameters from before the update; targets
  follow the critics from after it.
  """
  critic_adam = reference.Adam(CONFIG.critic_lr)
  alpha_adam = reference.Adam(CONFIG.temperature_lr)
  target = jax.tree.map(
    lambda x: np.asarray(x, np.float64), state.target_params
  )
  inputs = [(s, a) for _, _, s, a, *_ in reference.rows(batch)]
  for _ in range(2):
    params, noise = state.params, _noise(state, batch)
    _, y = _critic(params, state.target_params, batch, noise)
    critic = critic_adam.step(
      params['critic'],
      tuple(reference.mse_gradient(c, inputs, y) for c in params['critic']),
    )
    _, log_prob = _actor(params, batch, noise)
    alpha = alpha_adam.step(
      {'log': params['temperature']}, {'log': _temperature(params, log_prob)}
    )['log']
    target = jax.tree.map(lambda t, c: 0.9 * t + 0.1 * c, target, critic)
    state, _ = update(state, batch)
    helpers.assert_close(state.params['critic'], critic, 1e-4, 1e-5)
    helpers.assert_close(state.target_params, target, 1e-4, 1e-5)
    np.testing.assert_allclose(state.params['temperature'], alpha, rtol=1e-5)


def test_gradient_routing(state, batch):
  """Each term reaches the group of its name, and nothing else."""
  noise = _noise(state, batch)
  found = jax.jit(jax.jacrev(_losses, (0, 1)))(
    state.params, state.target_params, batch.query, noise
  )
  assert set(found) == set(state.params) == {'critic', 'actor', 'temperature'}
  for term, (params, target) in found.items():
    sizes = {name: helpers.largest(tree) for name, tree in params.items()}
    assert sizes.pop(term) > 1e-7
    assert set(sizes.values()) == {0.0} and helpers.largest(target) == 0.0


@pytest.mark.parametrize('log_std, rises', [(-1.0, False), (-9.0, True)])
def test_temperature_seeks_the_target_entropy(
  state, batch, update, log_std, rises
):
  """It falls under a wide policy and rises under a narrow one."""
  layers = state.params['actor']['params']
  heads = {
    'Dense_1': jax.tree.map(jnp.zeros_like, layers['Dense_1']),
    'Dense_2': {**layers['Dense_2'], 'bias': jnp.full(2, log_std)},
  }
  heads['Dense_2']['kernel'] = jnp.zeros_like(layers['Dense_2']['kernel'])
  before = state.replace(
    params={**state.params, 'actor': {'params': {**layers, **heads}}}
  )
  after, metrics = update(before, batch)
  target = CONFIG.target_entropy_per_action * SPEC.action_size
  assert (metrics['actor/entropy'] < target) == rises
  change = after.params['temperature'] - state.params['temperature']
  np.testing.assert_allclose(change, 0.05 if rises else -0.05, rtol=1e-3)


def test_fixed_temperature(state, batch, update):
  config = dataclasses.replace(CONFIG, learn_temperature=False)
  after, metrics = jax.jit(
    sac.make(Problem(SPEC), config).loop('online').stages[0].update
  )(state, batch)
  for tree in ('params', 'opt_state'):
    helpers.assert_same(
      getattr(after, tree)['temperature'], getattr(state, tree)['temperature']
    )
  np.testing.assert_allclose(metrics['temperature/alpha'], 0.3, rtol=1e-6)
  learned, _ = update(state, batch)
  helpers.assert_close(after.params['actor'], learned.params['actor'], 1e-6)


def test_policies(state):
  """Exploration samples the policy, evaluation takes tanh(mean)."""
  algorithm = sac.make(Problem(SPEC), CONFIG)
  params = algorithm.actor_params(state)
  observation = jnp.array([0.5, -1.0, 2.0])
  mean, log_std = reference.normal_tanh(params, observation, [])
  act = lambda policy, key: policy.act(params, (), observation, key)[0]
  for policy in (algorithm.evaluate, algorithm.evaluate_given_context):
    np.testing.assert_allclose(
      act(policy, jax.random.key(0)), np.tanh(mean), rtol=1e-5
    )
  keys = jax.random.split(jax.random.key(1), 4000)
  samples = np.asarray(
    jax.jit(jax.vmap(lambda k: act(algorithm.explore, k)))(keys)
  )
  # The normal distribution below -1/2, 0 and 1/2; standard error 0.008.
  for at, share in ((-0.5, 0.3085), (0.0, 0.5), (0.5, 0.6915)):
    below = np.mean(samples < np.tanh(mean + at * np.exp(log_std)), axis=0)
    np.testing.assert_allclose(below, share, atol=0.04)


def test_contract():
  testing.check_algorithm(sac.make, CONFIG, SPEC)


def test_published_defaults():
  """Table 1 of arXiv 1812.05905."""
  c = sac.Config()
  assert c.critic_hidden == c.actor_hidden == (256, 256)
  assert c.critic_lr == c.actor_lr == c.temperature_lr == 3e-4
  assert (c.discount, c.target_rate, c.batch_size) == (0.99, 0.005, 256)
  assert c.learn_temperature and c.target_entropy_per_action == -1.0
  assert sac.make(Problem(SPEC), c).in_phase('offline') == ()
