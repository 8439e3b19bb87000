"""Meta-BC: the loss and its meta-gradient, routing, acting, learning."""

import dataclasses

import bandit_logs
import helpers
import jax
import macaw_inputs
import macaw_reference as reference
import numpy as np
import pytest

from offmeta.algorithms import meta_bc
from offmeta.types import (
  BatchSpec,
  DataSpec,
  Problem,
  Rows,
  Slice,
)

SPEC = helpers.SPEC  # O 3, A 2
CONFIG = meta_bc.Config(
  hidden=(4, 3),
  latent_size=2,
  policy_lr=1e-3,
  step_size_lr=3e-3,
  inner_policy_lr=0.02,
  num_updates=4,
  num_tasks=2,
  context_size=6,
  query_size=5,
)


def _changed(**changes):
  return dataclasses.replace(CONFIG, **changes)


def _state(config=CONFIG):
  """Tensors have step sizes of their own."""
  state = jax.jit(meta_bc.make(Problem(SPEC), config).init)(jax.random.key(0))
  return state.replace(
    params={
      'policy': helpers.shaken(state.params['policy'], 0, 0.2),
      'policy_steps': helpers.shaken(state.params['policy_steps'], 1, 0.5),
    }
  )


@pytest.fixture(name='batch', scope='module')
def _batch():
  """Of the first task's context two rows do not count, and are not finite."""
  algorithm = meta_bc.make(Problem(SPEC), CONFIG)
  batch = helpers.random_batch(
    1, SPEC, algorithm.loop('offline').stages[0].batch, algorithm.data
  )
  mask = np.ones((2, 6), np.float32)
  mask[0, 2:4] = 0.0
  context = jax.tree.map(np.array, batch.context)
  for leaf in jax.tree.leaves(context):
    leaf[mask == 0] = np.nan
  return batch._replace(context=context, context_mask=mask)


class _Numpy:
  """Meta-BC in plain numpy; derivatives by differences."""

  def __init__(self, params, config):
    # The policy network of the reference; it has no head here.
    self._net = reference.Macaw(
      {'policy': params['policy']},
      macaw_inputs.changed(layer=config.layer, advantage_coef=0.0),
    )

  def clone(self, theta, rows):
    mean, _ = self._net.policy(theta, rows['s'], rows['a'])
    squares = np.sum(((rows['a'] - mean) / 0.2) ** 2, axis=-1)
    return np.mean(0.5 * squares + 2 * np.log(0.2) + np.log(2 * np.pi), axis=-1)

  def adapted(self, theta, rho, rows):
    slope = reference._derivative(lambda x: self.clone(x, rows), theta)
    return theta - self._net.steps(rho, 'policy') * slope

  def outer(self, theta, rho, batch):
    return np.mean(
      [
        self.clone(
          self.adapted(
            theta,
            rho,
            reference.task_rows(batch.context, m, batch.context_mask),
          ),
          reference.task_rows(batch.query, m),
        )
        for m in range(2)
      ]
    )


@pytest.mark.parametrize(
  'changes', [{}, dict(layer='dense', task_loop='vmap')], ids=str
)
def test_loss_and_meta_gradient_against_numpy(batch, changes):
  config = _changed(**changes)
  state = _state(config)
  own = _Numpy(state.params, config)
  theta, rho = (
    reference.vector(state.params[k]) for k in ('policy', 'policy_steps')
  )
  after, logs = jax.jit(
    meta_bc.make(Problem(SPEC), config).loop('offline').stages[0].update
  )(state, batch)
  np.testing.assert_allclose(
    logs['policy/outer_loss'], own.outer(theta, rho, batch), rtol=1e-4
  )
  np.testing.assert_allclose(
    logs['policy/inner_loss'],
    np.mean(
      [
        own.clone(
          theta, reference.task_rows(batch.context, m, batch.context_mask)
        )
        for m in range(2)
      ]
    ),
    rtol=1e-4,
  )
  slopes = {
    'policy': reference._derivative(
      lambda x: np.array([own.outer(row, rho, batch) for row in x]), theta, 1e-4
    ),
    'policy_steps': reference._derivative(
      lambda x: np.array([own.outer(theta, row, batch) for row in x]), rho, 1e-4
    ),
  }
  for group, rate in (('policy', 1e-3), ('policy_steps', 3e-3)):
    # Adam's first moment is a tenth of the gradient, its first step the rate.
    slope = slopes[group]
    np.testing.assert_allclose(
      10 * reference.vector(after.opt_state[group][0].mu),
      slope,
      rtol=2e-3,
      atol=2e-4 * np.abs(slope).max(),
      err_msg=group,
    )
    moved = jax.tree.map(np.subtract, after.params[group], state.params[group])
    np.testing.assert_allclose(helpers.largest(moved), rate, rtol=1e-2)


def test_what_has_an_influence(batch):
  """Observations and actions, not rewards."""
  state, update = (
    _state(),
    jax.jit(
      meta_bc.make(Problem(SPEC), CONFIG).loop('offline').stages[0].update
    ),
  )
  before = update(state, batch)

  def changed(part, field):
    rows = getattr(batch, part)
    return update(
      state,
      batch._replace(
        **{part: rows._replace(**{field: 0.5 * getattr(rows, field)})}
      ),
    )

  for part in ('context', 'query'):
    for field in ('reward', 'discount', 'next_observation'):
      helpers.assert_same(changed(part, field), before)
    for field in ('observation', 'action'):
      loss = float(changed(part, field)[1]['policy/outer_loss'])
      assert abs(loss - float(before[1]['policy/outer_loss'])) > 1e-4


def test_second_order(batch):
  """A first-order step leaves the step sizes' gradient as it is, but not the
  policy's."""
  network = meta_bc.make_network(SPEC, CONFIG)
  params = _state().params
  full = jax.jit(
    jax.grad(lambda p: meta_bc.losses(p, batch, network, CONFIG)[0])
  )(params)
  first = network._replace(
    step=lambda params, gradient, steps: network.step(
      params, jax.lax.stop_gradient(gradient), steps
    )
  )
  short = jax.jit(
    jax.grad(lambda p: meta_bc.losses(p, batch, first, CONFIG)[0])
  )(params)
  helpers.assert_close(full['policy_steps'], short['policy_steps'], 1e-4, 1e-5)
  change = jax.tree.map(np.subtract, full['policy'], short['policy'])
  assert helpers.largest(change) > 1e-2 * helpers.largest(full['policy'])


def test_acting():
  algorithm = meta_bc.make(Problem(SPEC), CONFIG)
  params = algorithm.actor_params(_state())
  rows, valid = macaw_inputs.make_context(False)
  spoiled = jax.tree.map(np.array, rows)
  for leaf in jax.tree.leaves(spoiled):
    leaf[6:] = np.nan
  named = {
    's': np.asarray(rows.observation[:6], np.float64),
    'a': np.asarray(rows.action[:6], np.float64),
  }
  own = _Numpy(params, CONFIG)
  theta = own.adapted(
    *(reference.vector(params[k]) for k in ('policy', 'policy_steps')), named
  )
  expected = np.asarray(own._net.policy(theta, named['s'], named['a'])[0])
  key = jax.random.key(0)
  apply = jax.jit(meta_bc.make_network(SPEC, CONFIG).apply_generated)
  for policy in (
    algorithm.explore,
    algorithm.evaluate,
    algorithm.evaluate_given_context,
  ):
    adapt = jax.jit(policy.adapt)
    prior = jax.jit(policy.init)(params, key)
    weights = adapt(params, prior, spoiled, valid, key).weights
    np.testing.assert_allclose(
      apply(weights, rows.observation[:6]), expected, rtol=1e-4, atol=1e-5
    )
    helpers.assert_same(adapt(params, prior, rows, 0 * valid, key), prior)
    # 3 x 4 + 4, 4 x 3 + 3, 3 x 2 + 2.
    assert sum(x.size for x in jax.tree.leaves(prior.weights)) == 39


# Settings.


def test_what_it_asks_for():
  algorithm = meta_bc.make(Problem(SPEC), CONFIG)
  assert algorithm.data == DataSpec(stride=7, shared=True)
  assert algorithm.in_phase('online') == ()
  for sampling, context in (
    ('contiguous', Slice(6)),
    ('uniform', Rows(6, replacement=False)),
  ):
    (stage,) = (
      meta_bc.make(Problem(SPEC), _changed(train_inner_sampling=sampling))
      .loop('offline')
      .stages
    )
    assert stage.num_steps == 4
    assert stage.batch == BatchSpec(
      2, Rows(5, replacement=False), context, replacement=False
    )


@pytest.mark.parametrize('name', ['layer', 'train_inner_sampling', 'task_loop'])
def test_bad_settings_raise(name):
  with pytest.raises(ValueError, match=f"meta_bc.{name}: 'x'"):
    meta_bc.make(Problem(SPEC), _changed(**{name: 'x'}))


def test_released_defaults():
  """Those of MACAW (its release)."""
  c = meta_bc.Config()
  assert (c.hidden, c.layer, c.latent_size) == ((100,) * 3, 'wlinear', 100)
  assert (c.policy_lr, c.step_size_lr, c.inner_policy_lr) == (1e-4, 1e-3, 1e-3)
  assert (c.num_tasks, c.context_size, c.query_size) == (5, 256, 256)
  assert (c.stride, c.num_updates, c.action_std) == (7, 1_000_000, 0.2)


# Learning.


def test_adaptation_to_held_out_directions():
  config = meta_bc.Config(
    hidden=(16, 16),
    latent_size=16,
    policy_lr=1e-3,
    step_size_lr=1e-2,
    inner_policy_lr=1e-2,
    num_tasks=4,
    context_size=32,
    query_size=32,
    num_updates=300,
  )
  params = bandit_logs.train(meta_bc.make, config)
  score = bandit_logs.scorer(
    meta_bc.make(Problem(bandit_logs.FAMILY.spec), config)
  )
  contexts = bandit_logs.contexts(config.context_size)
  adapted = score(params, contexts)
  prior = score(params, bandit_logs.nothing(contexts))
  # One policy for all: opposite directions cancel.
  np.testing.assert_allclose(np.mean(prior), 0.0, atol=1e-3)
  # Six seeds gave 0.7 to 1.2, and 1.3 to 1.5 on average. Every direction, so
  # both signs of both actions.
  assert np.min(adapted) > 0.5
  assert np.mean(adapted) > np.mean(prior) + 1.0
  # The mechanism: no step, no adaptation.
  still = {
    **params,
    'policy_steps': jax.tree.map(
      lambda x: np.full_like(x, -100.0), params['policy_steps']
    ),
  }
  np.testing.assert_allclose(score(still, contexts), prior, atol=1e-4)
