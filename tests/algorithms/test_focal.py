"""FOCAL: numerics against numpy, order of the steps, gradient routing."""

import dataclasses
import functools

import helpers
import jax
import numpy as np
import numpy_reference as reference
import pytest

from offmeta import testing
from offmeta.algorithms import brac, focal
from offmeta.types import (
  BatchSpec,
  Problem,
  Rows,
  Sequences,
)

SPEC = helpers.SPEC

# The later release (the defaults), tiny; high rates, so that the old and the
# new parameters can be told apart.
LATER = focal.Config(
  latent_size=2,
  encoder_hidden=(6,),
  critic_hidden=(7,),
  actor_hidden=(6,),
  value_hidden=(5,),
  divergence_hidden=(5,),
  context_lr=0.01,
  critic_lr=0.02,
  actor_lr=0.01,
  value_lr=0.03,
  divergence_lr=0.05,
  target_rate=0.1,
  num_updates=4,
  num_tasks=4,
  query_size=3,
  context_size=5,
)
FIRST = dataclasses.replace(
  LATER,
  value_network=True,
  entropy_in_target=True,
  reward_scale=5.0,
  mean_weight=0.03,
  log_std_weight=0.02,
  learn_divergence_weight=True,
  divergence_weight=1.5,
  gradient_penalty='value',
  use_terminal=False,
  use_next_observation=False,
  max_log_std=0.0,
  metric_weight=10.0,
)
PLAIN = dataclasses.replace(  # SAC without any divergence
  LATER, divergence_weight=0.0, entropy_weight=0.3, entropy_in_target=True
)
FREE = dataclasses.replace(LATER, value_penalty=False, policy_penalty=False)
CONFIGS = pytest.mark.parametrize(
  'config', [LATER, FIRST, PLAIN, FREE], ids=['later', 'first', 'plain', 'free']
)


def _networks(config):
  return brac.make_networks(SPEC, config.latent_size, config)


@functools.cache
def _update(config):
  return jax.jit(
    focal.make(Problem(SPEC), config).loop('offline').stages[0].update
  )


@functools.cache
def _state(config):
  """Moved off its start; the dual critic with slopes on both sides of 1."""
  state = jax.jit(focal.make(Problem(SPEC), config).init)(jax.random.key(0))
  params = helpers.shaken(state.params)
  if config.regularised:
    params['divergence'] = helpers.shaken(params['divergence'], 3, 2.5)
  return state.replace(
    params=params, target_params=helpers.shaken(state.target_params, 1)
  )


@pytest.fixture(name='batch', scope='module')
def _batch():
  """Two tasks are drawn twice; entries of the contexts do not count."""
  composition = focal.make(Problem(SPEC), LATER).loop('offline').stages[0].batch
  batch = helpers.random_batch(1, SPEC, composition)
  return batch._replace(task_id=np.array([3, 1, 3, 1]))


# Numpy.


def _columns(config, data, m, i):
  columns = [data.observation[m, i], data.action[m, i], [data.reward[m, i]]]
  if config.use_next_observation:
    columns.append(data.next_observation[m, i])
  if config.use_terminal:
    columns.append([1.0 - data.discount[m, i]])
  return columns


def _latents(config, params, batch):
  """z [M][Z] of the encoder."""
  encoder = params['context']['encoder']['point']
  return [
    np.mean(
      [
        np.tanh(reference.mlp(encoder, *_columns(config, batch.context, m, i)))
        for i in np.flatnonzero(batch.context_mask[m])
      ],
      axis=0,
    )
    for m in range(batch.context_mask.shape[0])
  ]


def _dual(params, s, a, own, z):
  logged, other = [
    reference.softplus(reference.mlp(params['divergence'], s, x, z)[0])
    for x in (a, own)
  ]
  return -logged + np.log(other + 1e-8) + 1


def _act(config, params, s, z, noise):
  """(action, log pi, mean, log_std)."""
  mean, log_std = reference.normal_tanh(
    params['actor'], s, z, config.max_log_std
  )
  x = mean + np.exp(log_std) * np.asarray(noise, np.float64)
  log_prob = reference.tanh_log_prob(x, mean, log_std, config.tanh_correction)
  return np.tanh(x), log_prob, mean, log_std


def _targets(config, params, target, weight, batch, z, noise):
  """y of every row."""
  targets = []
  for m, b, s, a, r, discount, s2 in reference.rows(batch):
    if config.value_network:
      value = reference.mlp(target, s2, z[m])[0]
    else:
      a2, log_prob, *_ = _act(config, params, s2, z[m], noise['next'][m, b])
      value = reference.min_q(target, s2, a2, z[m])
      if config.entropy_in_target:
        value -= config.entropy_weight * log_prob
    if config.value_penalty and config.regularised:
      own, *_ = _act(config, params, s, z[m], noise['own'][m, b])
      value -= weight * _dual(params, s, a, own, z[m])
    targets.append(config.reward_scale * r + config.discount * discount * value)
  return np.array(targets)


def _actor(config, params, weight, batch, z, noise):
  """Terms of the policy and of V, the targets of V, and the mean of Dhat."""
  losses, errors, means, log_stds, values, duals = [], [], [], [], [], []
  for m, b, s, a, *_ in reference.rows(batch):
    own, log_prob, mean, log_std = _act(
      config, params, s, z[m], noise['own'][m, b]
    )
    q = reference.min_q(params['critic'], s, own, z[m])
    losses.append(config.entropy_weight * log_prob - q)
    means.append(mean)
    log_stds.append(log_std)
    if config.value_network:
      values.append(q - config.entropy_weight * log_prob)
      errors.append(
        (reference.mlp(params['value'], s, z[m])[0] - values[-1]) ** 2
      )
    if config.regularised:
      duals.append(_dual(params, s, a, own, z[m]))
  terms = {
    'actor/loss': np.mean(losses),
    'actor/regulariser': (
      config.mean_weight * np.mean(np.square(means))
      + config.log_std_weight * np.mean(np.square(log_stds))
    ),
  }
  if config.value_network:
    terms['value/loss'] = np.mean(errors)
  if config.regularised and config.policy_penalty:
    terms['actor/divergence'] = weight * np.mean(duals)
  return terms, values, duals and np.mean(duals)


@pytest.mark.parametrize('config, weight', [(LATER, 1), (FIRST, 10)])
def test_metric_terms_against_numpy(batch, config, weight):
  state = _state(config)
  ((group, terms),) = focal.representation(Problem(SPEC), config).steps
  terms = jax.jit(lambda p: terms(p, batch, None, None))(state.params)
  z = _latents(config, state.params, batch)
  near, far = [], []
  for i in range(4):
    for j in range(i):
      distance = np.mean((z[i] - z[j]) ** 2)
      if i - j == 2:  # drawn as 3, 1, 3, 1
        near.append(np.sqrt(distance + 1e-3))
      else:
        far.append(1 / (distance + 0.1))
  assert group == 'context'
  assert {k: float(v) for k, v in terms.items()} == pytest.approx(
    {
      'encoder/same_task': weight * sum(near) / 2.001,
      'encoder/other_tasks': weight * sum(far) / 4.001,
    },
    rel=1e-4,
  )


@functools.cache
def _draw_noise(config):
  return jax.jit(lambda s, b: focal.draw_noise(s, b, config))


def _noise_and_z(config, state, batch):
  noise = jax.device_get(_draw_noise(config)(state, batch))
  z = _latents(config, state.params, batch)
  rows = np.float32(z)[:, None].repeat(3, axis=1)
  return noise, z, rows


def test_the_clip_of_log_std_is_at_work(batch):
  """In what `test_control_against_numpy` compares."""
  actor = _networks(FIRST).actor
  log_std = np.asarray(
    jax.jit(actor.apply)(
      _state(FIRST).params['actor'],
      batch.query.observation,
      np.zeros((4, 3, 2), np.float32),
    ).log_std
  )
  assert log_std.max() == 0.0 > log_std.min()


@CONFIGS
def test_control_against_numpy(batch, config):
  state, weight = _state(config), 0.7
  noise, z, rows = _noise_and_z(config, state, batch)

  @jax.jit
  def terms(params, target):
    return brac.critic_terms(
      params,
      target,
      weight,
      batch.query,
      rows,
      noise,
      _networks(config),
      config,
    ), *brac.actor_terms(
      params, weight, batch.query, rows, noise['own'], _networks(config), config
    )

  critic, actor, logs = terms(state.params, state.target_params)
  y = _targets(
    config, state.params, state.target_params, weight, batch, z, noise
  )
  error = np.mean(
    [
      sum(
        (reference.mlp(c, s, a, z[m])[0] - t) ** 2
        for c in state.params['critic']
      )
      for (m, _, s, a, *_), t in zip(reference.rows(batch), y)
    ]
  )
  assert float(critic['critic/loss']) == pytest.approx(error, rel=2e-5)
  expected, _, estimate = _actor(config, state.params, weight, batch, z, noise)
  assert {k: float(v) for k, v in actor.items()} == pytest.approx(
    expected, rel=2e-5
  )
  if config.regularised:
    assert float(logs['divergence/estimate']) == pytest.approx(
      estimate, rel=2e-5
    )


@pytest.mark.parametrize('kind', ['action', 'value'])
def test_divergence_terms_against_numeric_differentiation(batch, kind):
  config = dataclasses.replace(LATER, gradient_penalty=kind)
  state = _state(config)
  params = state.params
  noise, z, rows = _noise_and_z(config, state, batch)
  terms = jax.jit(
    lambda p: brac.divergence_terms(
      p,
      batch.query,
      rows,
      noise['dual'][:, 1],
      noise['mix'][:, 1],
      _networks(config),
      config,
    )
  )(params)
  mix = np.asarray(noise['mix'], np.float64)[:, 1]
  assert np.all((0 <= mix) & (mix <= 1)) and mix.std() > 0.1
  duals, penalties = [], []
  for m, b, s, a, *_ in reference.rows(batch):
    a = np.asarray(a, np.float64)
    own, *_ = _act(config, params, s, z[m], noise['dual'][m, 1, b])
    duals.append(_dual(params, s, a, own, z[m]))
    mixed = mix[m, b] * a + (1 - mix[m, b]) * own
    c = lambda x: reference.mlp(params['divergence'], s, x, z[m])[0]
    if kind == 'action':
      slope = [
        (c(mixed + 1e-6 * e) - c(mixed - 1e-6 * e)) / 2e-6 for e in np.eye(2)
      ]
    else:
      slope = [c(mixed)]
    size = np.sqrt(1e-8 + np.sum(np.square(slope)))
    penalties.append(max(size - 1, 0) ** 2)
  assert 0 < np.count_nonzero(penalties) < len(penalties)
  assert {k: float(v) for k, v in terms.items()} == pytest.approx(
    {
      'divergence/loss': -np.mean(duals),
      'divergence/penalty': 5.0 * np.mean(penalties),
    },
    rel=1e-4,
  )


@pytest.mark.parametrize('config', [LATER, FIRST], ids=['later', 'first'])
def test_update_against_numpy_adam(batch, config):
  """z is the encoder's before its step; each part learns of the new ones."""
  before = _state(config)
  noise, z, _ = _noise_and_z(config, before, batch)
  after, logs = _update(config)(before, batch)
  params = {  # the dual critic has made its steps, no other part has
    **before.params,
    'divergence': after.params['divergence'],
  }
  weight = config.divergence_weight
  y = _targets(config, params, before.target_params, weight, batch, z, noise)
  inputs = [(s, a, z[m]) for m, _, s, a, *_ in reference.rows(batch)]
  critic = reference.Adam(config.critic_lr).step(
    params['critic'],
    tuple(reference.mse_gradient(c, inputs, y) for c in params['critic']),
  )
  helpers.assert_close(after.params['critic'], critic, 1e-4, 1e-5)
  new = critic
  _, values, estimate = _actor(
    config, {**params, 'critic': critic}, weight, batch, z, noise
  )
  if config.value_network:
    inputs = [(s, z[m]) for m, _, s, *_ in reference.rows(batch)]
    new = reference.Adam(config.value_lr).step(
      params['value'], reference.mse_gradient(params['value'], inputs, values)
    )
    helpers.assert_close(after.params['value'], new, 1e-4, 1e-5)
  helpers.assert_close(
    after.target_params,
    jax.tree.map(
      lambda t, n: 0.9 * t + 0.1 * np.asarray(n), before.target_params, new
    ),
    1e-4,
    1e-5,
  )
  assert float(logs['divergence/estimate']) == pytest.approx(estimate, rel=1e-4)
  raised = config.learn_divergence_weight * (estimate - 0.05)
  assert float(after.extras['divergence_weight']) == pytest.approx(
    weight + raised, rel=1e-5
  )


def test_dual_critic_makes_its_steps(batch):
  """Three of Adam's, with new actions each."""
  before = _state(LATER)
  after, _ = _update(LATER)(before, batch)
  noise, _, rows = _noise_and_z(LATER, before, batch)
  optimizer = brac.make_optimizers(_networks(LATER), LATER)['divergence']
  params = before.params['divergence']
  opt_state = before.opt_state['divergence']

  @jax.jit
  def step(params, opt_state, dual, mix):
    gradient = jax.grad(
      lambda p: sum(
        brac.divergence_terms(
          {**before.params, 'divergence': p},
          batch.query,
          rows,
          dual,
          mix,
          _networks(LATER),
          LATER,
        ).values()
      )
    )(params)
    change, opt_state = optimizer.update(gradient, opt_state)
    return jax.tree.map(lambda p, c: p + c, params, change), opt_state

  for i in range(3):
    params, opt_state = step(
      params, opt_state, noise['dual'][:, i], noise['mix'][:, i]
    )
  helpers.assert_close(after.params['divergence'], params, 1e-5, leaf_rtol=1e-4)
  # Independent actions.
  flat = np.asarray(noise['dual']).transpose(1, 0, 2, 3).reshape(3, -1)
  flat = np.vstack([flat, noise['own'].ravel(), noise['next'].ravel()])
  assert np.abs(np.corrcoef(flat) - np.eye(5)).max() < 0.7


@pytest.mark.parametrize(
  'alpha, used', [(-3.0, 0.0), (1.0, 1.0), (5000.0, 2000.0)]
)
def test_divergence_weight_is_used_clipped(batch, alpha, used):
  state = _state(FIRST).replace(extras={'divergence_weight': np.float32(alpha)})
  after, logs = _update(FIRST)(state, batch)
  assert float(logs['divergence/weight']) == used
  assert float(logs['actor/divergence']) == pytest.approx(
    used * float(logs['divergence/estimate']), rel=1e-6
  )
  assert float(after.extras['divergence_weight']) == pytest.approx(
    alpha + float(logs['divergence/estimate']) - 0.05, rel=1e-6
  )


# Gradient routing: term -> the one part that it reaches.

_ROUTES = {
  'encoder/same_task': 'context',
  'encoder/other_tasks': 'context',
  'divergence/loss': 'divergence',
  'divergence/penalty': 'divergence',
  'critic/loss': 'critic',
  'actor/loss': 'actor',
  'actor/regulariser': 'actor',
  'actor/divergence': 'actor',
  'value/loss': 'value',
}


@pytest.mark.parametrize('config', [LATER, FIRST], ids=['later', 'first'])
def test_gradient_routing(batch, config):
  state = _state(config)
  noise, _, rows = _noise_and_z(config, state, batch)
  networks = _networks(config)
  ((_, encoder_terms),) = focal.representation(Problem(SPEC), config).steps

  @jax.jit
  def gradients(params, target):
    def terms(params, target):
      return {
        **encoder_terms(params, batch, None, None),
        **brac.divergence_terms(
          params,
          batch.query,
          rows,
          noise['dual'][:, 0],
          noise['mix'][:, 0],
          networks,
          config,
        ),
        **brac.critic_terms(
          params, target, 0.7, batch.query, rows, noise, networks, config
        ),
        **brac.actor_terms(
          params, 0.7, batch.query, rows, noise['own'], networks, config
        )[0],
      }

    return jax.jacrev(terms, (0, 1))(params, target)

  found = gradients(state.params, state.target_params)
  expected = dict(_ROUTES)
  if not config.value_network:
    del expected['value/loss']
  if not config.mean_weight:
    expected['actor/regulariser'] = None
  assert set(found) == set(expected)
  for term, (params, target) in found.items():
    sizes = {k: helpers.largest(v) for k, v in params.items()}
    assert {k for k, v in sizes.items() if v > 1e-7} == {expected[term]} - {
      None
    }, term
    assert {k for k, v in sizes.items() if v > 0} == {expected[term]} - {
      None
    }, term
    assert helpers.largest(target) == 0, term


def test_no_bellman_error_reaches_the_encoder(batch):
  """What the queries hold does not matter to it, to the last bit."""
  state = _state(FIRST)
  update = _update(FIRST)
  other = batch._replace(
    query=batch.query._replace(
      reward=100.0 - batch.query.reward, action=-batch.query.action
    )
  )
  (one, _), (two, _) = update(state, batch), update(state, other)
  helpers.assert_same(one.params['context'], two.params['context'])
  helpers.assert_same(one.opt_state['context'], two.opt_state['context'])
  moved = jax.tree.map(
    np.subtract, one.params['context'], state.params['context']
  )
  assert helpers.largest(moved) > 1e-3
  moments = [s.opt_state['critic'][0].mu for s in (one, two)]
  assert helpers.largest(jax.tree.map(np.subtract, *moments)) > 1.0


def test_no_metric_loss_no_encoder(batch):
  config = dataclasses.replace(LATER, metric_weight=0.0)
  state = _state(config)
  after, _ = _update(config)(state, batch)
  helpers.assert_same(after.params['context'], state.params['context'])


def test_no_divergence_no_dual_critic(batch):
  state = _state(PLAIN)
  assert set(state.params) == {'context', 'critic', 'actor'}
  _, logs = _update(PLAIN)(state, batch)
  assert not [name for name in logs if 'divergence' in name]


# Devices, interface, acting.


def test_four_devices_do_what_one_does(batch):
  """Pairs of a task lie on different devices."""
  state = _state(FIRST)
  one = _update(FIRST)
  four = jax.pmap(
    focal.make(Problem(SPEC), FIRST, 'task').loop('offline').stages[0].update,
    axis_name='task',
    in_axes=(None, 0),
    out_axes=None,
  )
  split = jax.tree.map(lambda x: x[:, None], batch)
  expected, shared = state, state
  for _ in range(5):
    expected, logs = one(expected, batch)
    shared, shared_logs = four(shared, split)
  assert float(logs['encoder/same_task']) > 0
  helpers.assert_close(shared_logs, logs, 1e-4, 1e-6)
  helpers.assert_close(shared, expected, 1e-4, 1e-6, leaf_rtol=1e-5)


@pytest.mark.parametrize(
  'config',
  [LATER, dataclasses.replace(FIRST, context='sequences')],
  ids=['later', 'first'],
)
def test_contract(config):
  testing.check_algorithm(focal.make, config, SPEC, quick=True)


def test_contexts():
  algorithm = focal.make(Problem(SPEC), focal.Config())
  batch = algorithm.loop('offline').stages[0].batch
  assert batch == BatchSpec(16, Rows(256), Rows(200))
  assert algorithm.data.sequence_episodes == 0
  algorithm = focal.make(Problem(SPEC), focal.Config(context='sequences'))
  batch = algorithm.loop('offline').stages[0].batch
  assert batch.context == Sequences(1, SPEC.episode_length)
  assert algorithm.data.sequence_episodes == 1


def test_acting(batch):
  """z is 0 before anything is known, and the mean of the points after."""
  state, algorithm = _state(LATER), focal.make(Problem(SPEC), LATER)
  params = algorithm.actor_params(state)
  data = jax.tree.map(lambda x: x[1], batch.context)
  mask, key = batch.context_mask[1], jax.random.key(5)
  observation = np.ones(3, np.float32)
  for policy, stochastic in (
    (algorithm.explore, True),
    (algorithm.evaluate, False),
    (algorithm.evaluate_given_context, False),
  ):
    act, adapt = jax.jit(policy.act), jax.jit(policy.adapt)
    prior = jax.jit(policy.init)(params, key)
    np.testing.assert_array_equal(prior, np.zeros(2))
    z = adapt(params, prior, data, mask, key)
    np.testing.assert_allclose(
      z, _latents(LATER, state.params, batch)[1], rtol=1e-4, atol=1e-6
    )
    row = jax.tree.map(lambda x: x[0], data)
    np.testing.assert_array_equal(
      jax.jit(policy.observe)(params, z, row, key), z
    )
    actions = [
      np.asarray(act(params, z, observation, jax.random.key(i))[0])
      for i in range(2)
    ]
    assert np.any(actions[0] != actions[1]) == stochastic
    mean, _ = reference.normal_tanh(params['actor'], observation, z)
    if not stochastic:
      np.testing.assert_allclose(actions[0], np.tanh(mean), rtol=1e-4)
  assert algorithm.posterior is None


@pytest.mark.parametrize(
  'change',
  [
    dict(gradient_penalty='both'),
    dict(context='episodes'),
    dict(tanh_correction='none'),
  ],
)
def test_unknown_switches_are_refused(change):
  ((name, value),) = change.items()
  with pytest.raises(ValueError, match=f'{name}: .{value}'):
    focal.make(Problem(SPEC), dataclasses.replace(LATER, **change))


def test_behaviour_defaults():
  """Those of the later code."""
  c = focal.Config()
  assert (c.latent_size, c.encoder_hidden, c.metric_weight) == (
    5,
    (64, 64),
    1.0,
  )
  assert c.use_next_observation and c.use_terminal
  assert c.critic_hidden == c.actor_hidden == c.divergence_hidden == (256,) * 2
  assert (
    c.context_lr,
    c.critic_lr,
    c.actor_lr,
    c.value_lr,
    c.divergence_lr,
  ) == (3e-4, 3e-4, 3e-4, 3e-4, 1e-4)
  assert (c.discount, c.target_rate, c.reward_scale) == (0.99, 0.005, 1.0)
  assert (c.entropy_weight, c.entropy_in_target, c.value_network) == (
    1.0,
    False,
    False,
  )
  assert (
    c.divergence_weight,
    c.learn_divergence_weight,
    c.value_penalty,
    c.policy_penalty,
  ) == (0.2, False, True, True)
  assert (
    c.divergence_steps,
    c.gradient_penalty,
    c.gradient_penalty_weight,
  ) == (3, 'action', 5.0)
  assert c.num_updates == 200_000
