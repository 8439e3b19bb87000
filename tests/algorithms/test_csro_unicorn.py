"""CSRO and UNICORN: what they add to FOCAL, against numpy."""

import dataclasses
import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference as reference
import pytest

from offmeta import testing
from offmeta.algorithms import brac, csro, focal, unicorn
from offmeta.networks import context
from offmeta.types import Problem

SPEC = helpers.SPEC
_SIZES = dict(
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
CSRO = csro.Config(**_SIZES, model_hidden=(5,))
SS = unicorn.Config(**_SIZES, decoder_hidden=(5,))
SUP = dataclasses.replace(SS, supervision='classification')
ALL = pytest.mark.parametrize(
  'module, config',
  [(csro, CSRO), (unicorn, SS), (unicorn, SUP)],
  ids=['csro', 'ss', 'sup'],
)


@functools.cache
def _update(module, config):
  return jax.jit(
    module.make(Problem(SPEC, 6), config).loop('offline').stages[0].update
  )


@functools.cache
def _state(module, config):
  state = jax.jit(module.make(Problem(SPEC, 6), config).init)(jax.random.key(0))
  return state.replace(params=helpers.shaken(state.params))


@pytest.fixture(name='batch', scope='module')
def _batch():
  """Two tasks are drawn twice; entries of the contexts do not count."""
  composition = (
    csro.make(Problem(SPEC, 6), CSRO).loop('offline').stages[0].batch
  )
  batch = helpers.random_batch(1, SPEC, composition)
  return batch._replace(task_id=np.array([3, 1, 3, 1]))


def _terms(module, config, params, batch, noise):
  """{name: scalar} of all steps, and the group of each step."""
  steps = module.representation(Problem(SPEC, 6), config).steps
  values = jax.jit(
    lambda p: [terms(p, batch, noise, None) for _, terms in steps]
  )(params)
  return {k: float(v) for terms in values for k, v in terms.items()}


def _noise(state, batch, config):
  return np.asarray(
    jax.jit(lambda s, b: focal.draw_noise(s, b, config)['points'])(state, batch)
  )


# Numpy.


def _points(config, params, batch, noise=None):
  """(row, point, s, a, r, s') per task, of the entries that count."""
  encoder, data = params['context']['encoder'], batch.context
  tasks = []
  for m, mask in enumerate(batch.context_mask):
    tasks.append([])
    for i in np.flatnonzero(mask):
      s, a, r, s2 = (
        data.observation[m, i],
        data.action[m, i],
        data.reward[m, i],
        data.next_observation[m, i],
      )
      columns = [s, a, [r]]
      if config.use_next_observation:
        columns += [s2, [1.0 - data.discount[m, i]]]
      x = reference.mlp(encoder['point'], *columns)
      if noise is not None:
        variance = np.clip(np.exp(encoder['log_variance']), 0.1, 10.0)
        x = x + np.sqrt(variance) * np.asarray(noise[m, i], np.float64)
      tasks[-1].append((np.tanh(x), s, a, r, s2))
  return tasks


def _metric(config, latents):
  """Tasks are 3, 1, 3, 1."""
  near, far = [], []
  for i in range(4):
    for j in range(i):
      distance = np.mean((latents[i] - latents[j]) ** 2)
      if i - j == 2:
        near.append(np.sqrt(distance + 1e-3))
      else:
        far.append(1 / (distance + 0.1))
  return {
    'encoder/same_task': config.metric_weight * sum(near) / 2.001,
    'encoder/other_tasks': config.metric_weight * sum(far) / 4.001,
  }


def _mean_point(tasks):
  return [np.mean([row[0] for row in rows], axis=0) for rows in tasks]


def test_csro_against_numpy(batch):
  state = _state(csro, CSRO)
  tasks = _points(CSRO, state.params, batch)
  likelihood, bound = [], []
  for rows in tasks:
    out = [
      np.tanh(reference.mlp(state.params['club']['model'], s, a))
      for _, s, a, *_ in rows
    ]
    z = np.array([row[0] for row in rows])
    mean = np.array(out)[:, :2]
    variance = np.array([reference.softplus(o[2:]) for o in out])
    likelihood.append(
      np.mean((z - mean) ** 2 / (2 * variance) + np.log(np.sqrt(variance)))
    )
    cost = lambda i, j: np.mean((z[j] - mean[i]) ** 2 / variance[i])
    every = range(len(rows))
    bound.append(
      -np.mean([cost(i, i) for i in every])
      + np.mean([cost(i, j) for i in every for j in every])
    )
  assert _terms(csro, CSRO, state.params, batch, None) == pytest.approx(
    {
      **_metric(CSRO, _mean_point(tasks)),
      'club/model': 10 * np.mean(likelihood),
      'encoder/club': 10 * np.mean(bound),
    },
    rel=1e-4,
  )


def test_unicorn_against_numpy(batch):
  state = _state(unicorn, SS)
  noise = _noise(state, batch, SS)
  tasks = _points(SS, state.params, batch, noise)
  latents = _mean_point(tasks)
  expected = _metric(SS, latents)
  for name, size in (('dynamics', 3), ('reward', 1)):
    decoder, losses = state.params['context'][name], []
    low, high = [np.asarray(decoder[k], np.float64) for k in ('low', 'high')]
    for z, rows in zip(latents, tasks):
      of_task = []
      for _, s, a, r, s2 in rows:
        out = reference.mlp(decoder['body'], z, s, a)
        raw = high - reference.softplus(high - out[size:])
        raw = low + reference.softplus(raw - low)
        target = np.array([r]) if name == 'reward' else s2 - s
        of_task.append(np.mean((target - out[:size]) ** 2 / np.exp(raw) + raw))
      losses.append(np.mean(of_task))
    expected[f'decoder/{name}'] = np.mean(losses) + 0.01 * np.sum(high - low)
  assert _terms(unicorn, SS, state.params, batch, noise) == pytest.approx(
    expected, rel=1e-4
  )


def test_unicorn_classification_against_numpy(batch):
  state = _state(unicorn, SUP)
  noise = _noise(state, batch, SUP)
  latents = _mean_point(_points(SUP, state.params, batch, noise))
  losses = []
  for z, label in zip(latents, batch.task_id):
    logits = reference.mlp(state.params['context']['classifier'], z)
    assert logits.shape == (6,)
    losses.append(np.log(np.sum(np.exp(logits))) - logits[label])
  assert _terms(unicorn, SUP, state.params, batch, noise) == pytest.approx(
    {'decoder/task': np.mean(losses)}, rel=1e-5
  )


def test_unicorn_decoders_start_as_published():
  """All else alike; rlkit's small last layer hides the latent."""
  small = dataclasses.replace(SS, decoder_hidden=(64,), decoder_start='rlkit')
  wide = dataclasses.replace(small, decoder_start='truncated_normal')
  assert SS.decoder_start == 'truncated_normal'
  start = {
    config.decoder_start: jax.jit(unicorn.make(Problem(SPEC, 6), config).init)(
      jax.random.key(0)
    ).params['context']
    for config in (small, wide)
  }
  helpers.assert_same(
    start['rlkit']['encoder'], start['truncated_normal']['encoder']
  )
  for name in ('dynamics', 'reward'):
    layers = start['truncated_normal'][name]['body']['params']
    last = np.asarray(layers['Dense_1']['kernel'])
    assert 0.9 / 8 < np.abs(last).max() <= 1 / 8
    assert not layers['Dense_0']['bias'].any()
    layers = start['rlkit'][name]['body']['params']
    assert np.max(np.abs(layers['Dense_1']['kernel'])) <= 3e-3

  def pull(config):
    """How the models' error changes with the latent, at the start."""
    params = start[config.decoder_start]['reward']
    model = context.gaussian_model(
      (2, 3, 2), 1, config.decoder_hidden, config.hidden_bias
    )
    error = lambda z: jnp.square(
      model.apply(params, z, jnp.ones(3), jnp.ones(2))[0].mean[0] - 2.0
    )
    return helpers.largest(jax.jit(jax.grad(error))(np.float32([0.1, -0.2])))

  assert pull(wide) > 5 * pull(small)


def test_csro_clips_log_std_at_0():
  """As its release and FOCAL's first; FOCAL's later code and UNICORN at 2."""
  for config, largest in ((CSRO, 0.0), (SS, 2.0), (focal.Config(), 2.0)):
    actor = brac.make_networks(SPEC, 2, config).actor

    @jax.jit
    def log_std(key, actor=actor):
      params = jax.tree.map(lambda x: 1e6 * x, actor.init(key))
      return actor.apply(params, jnp.ones(3), jnp.ones(2)).log_std

    assert np.max(log_std(jax.random.key(0))) == largest
    assert config.tanh_correction == 'shifted'


# Gradient routing: loss term -> parts that it reaches.

_METRIC = {'encoder/same_task': {'encoder'}, 'encoder/other_tasks': {'encoder'}}
_ROUTES = {
  CSRO: {**_METRIC, 'club/model': {'model'}, 'encoder/club': {'encoder'}},
  SS: {
    **_METRIC,
    'decoder/dynamics': {'encoder', 'dynamics'},
    'decoder/reward': {'encoder', 'reward'},
  },
  SUP: {'decoder/task': {'encoder', 'classifier'}},
}


@ALL
def test_gradient_routing(batch, module, config):
  state = _state(module, config)
  noise = _noise(state, batch, config)
  steps = module.representation(Problem(SPEC, 6), config).steps

  @jax.jit
  def gradients(params):
    return jax.jacrev(
      lambda p: {
        k: v
        for _, terms in steps
        for k, v in terms(p, batch, noise, None).items()
      }
    )(params)

  found = gradients(state.params)
  assert set(found) == set(_ROUTES[config])
  for term, params in found.items():
    learned = {**params.pop('context'), **params.pop('club', {})}
    parts = {**params, **learned}
    reached = {k for k, v in parts.items() if helpers.largest(v) > 1e-7}
    touched = {k for k, v in parts.items() if helpers.largest(v) > 0}
    assert reached == touched == _ROUTES[config][term], term


def test_every_learner_of_a_step_is_the_group_that_it_names():
  groups = lambda module, config: [
    group for group, _ in module.representation(Problem(SPEC, 6), config).steps
  ]
  assert groups(csro, CSRO) == ['club', 'context']  # the model comes first
  assert groups(unicorn, SS) == groups(unicorn, SUP) == ['context']


def test_csro_encoder_learns_against_the_new_model(batch):
  """In the release's order; Adam's first moments are a tenth of a gradient."""
  before = _state(csro, CSRO)
  after, _ = _update(csro, CSRO)(before, batch)
  _, (_, terms) = csro.representation(Problem(SPEC, 6), CSRO).steps

  def gradient(club):
    params = {**before.params, 'club': club}
    return jax.jit(
      jax.grad(
        lambda c: sum(
          terms({**params, 'context': c}, batch, None, None).values()
        )
      )
    )(params['context'])

  moments = jax.tree.map(
    lambda m: 10 * np.asarray(m), after.opt_state['context'][0].mu
  )
  helpers.assert_close(
    moments, gradient(after.params['club']), 1e-3, leaf_rtol=1e-4
  )
  old = gradient(before.params['club'])
  assert helpers.largest(jax.tree.map(np.subtract, moments, old)) > 1e-2


@ALL
def test_no_bellman_error_reaches_the_representation(batch, module, config):
  state, update = _state(module, config), _update(module, config)
  other = batch._replace(
    query=batch.query._replace(
      reward=100.0 - batch.query.reward, action=-batch.query.action
    )
  )
  (one, _), (two, _) = update(state, batch), update(state, other)
  for group in set(state.params) & {'context', 'club'}:
    helpers.assert_same(one.params[group], two.params[group])
    helpers.assert_same(one.opt_state[group], two.opt_state[group])
  moments = [s.opt_state['critic'][0].mu for s in (one, two)]
  assert helpers.largest(jax.tree.map(np.subtract, *moments)) > 1.0


@pytest.mark.parametrize(
  'module, config', [(csro, CSRO), (unicorn, SS)], ids=['csro', 'ss']
)
def test_four_devices_do_what_one_does(batch, module, config):
  one, four = (
    _update(module, config),
    jax.pmap(
      module.make(Problem(SPEC, 6), config, 'task')
      .loop('offline')
      .stages[0]
      .update,
      axis_name='task',
      in_axes=(None, 0),
      out_axes=None,
    ),
  )
  split = jax.tree.map(lambda x: x[:, None], batch)
  expected = shared = _state(module, config)
  for _ in range(4):
    expected, logs = one(expected, batch)
    shared, shared_logs = four(shared, split)
  helpers.assert_close(shared_logs, logs, 1e-4, 1e-6)
  helpers.assert_close(shared, expected, 1e-4, 1e-6, leaf_rtol=1e-5)


@ALL
def test_contract(module, config):
  testing.check_algorithm(module.make, config, SPEC, quick=True)


def test_unicorn_draws_points_while_acting(batch):
  """As in training: the latent is a mean of random points."""
  state, algorithm = _state(unicorn, SS), unicorn.make(Problem(SPEC, 6), SS)
  params = algorithm.actor_params(state)
  data = jax.tree.map(lambda x: x[1], batch.context)
  mask, policy = batch.context_mask[1], algorithm.evaluate_given_context
  adapt = jax.jit(
    jax.vmap(lambda key: policy.adapt(params, jnp.zeros(2), data, mask, key))
  )
  z = adapt(jax.random.split(jax.random.key(0), 2000))
  draws = [
    _mean_point(_points(SS, state.params, batch, noise))[1]
    for noise in np.random.default_rng(0).normal(size=(300, 4, 5, 2))
  ]
  np.testing.assert_allclose(
    np.mean(z, axis=0), np.mean(draws, axis=0), atol=0.1
  )
  np.testing.assert_allclose(np.std(z, axis=0), np.std(draws, axis=0), rtol=0.2)


def test_unicorn_refuses():
  with pytest.raises(ValueError, match='supervision: .both'):
    unicorn.make(Problem(SPEC, 6), dataclasses.replace(SS, supervision='both'))
  with pytest.raises(ValueError, match='context: .episodes'):
    unicorn.make(Problem(SPEC, 6), dataclasses.replace(SS, context='episodes'))
  with pytest.raises(ValueError, match='decoder_start: .zeros'):
    unicorn.make(
      Problem(SPEC, 6), dataclasses.replace(SS, decoder_start='zeros')
    )


def test_behaviour_defaults():
  """Those of the releases."""
  c = csro.Config()
  assert (c.latent_size, c.mi_weight, c.model_weight, c.metric_weight) == (
    20,
    10.0,
    10.0,
    10.0,
  )
  assert c.encoder_hidden == c.model_hidden == (200,) * 3
  assert c.critic_hidden == c.actor_hidden == c.value_hidden == (256,) * 3
  assert c.value_network and c.entropy_in_target and not c.value_penalty
  assert (
    c.divergence_weight,
    c.max_divergence_weight,
    c.target_divergence,
    c.divergence_weight_rate,
    c.learn_divergence_weight,
  ) == (50.0, 2000.0, 0.05, 1.0, True)
  assert (c.reward_scale, c.mean_weight, c.log_std_weight) == (5.0, 1e-3, 1e-3)
  assert (c.num_updates, c.context_size) == (105_000, 100)
  c = unicorn.Config()
  assert (c.latent_size, c.encoder_hidden, c.decoder_hidden) == (
    5,
    (64, 64),
    (64, 64),
  )
  assert (c.metric_weight, c.supervision) == (0.15, 'reconstruction')
