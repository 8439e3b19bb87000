"""MACAW: losses and meta-gradients against numpy, routing, switches."""

import functools

import helpers
import jax
import jax.numpy as jnp
import macaw_inputs as inputs
import macaw_reference as reference
import numpy as np
import pytest

from offmeta.algorithms import macaw, macaw_losses, maml
from offmeta.types import Problem

SPEC, CONFIG = inputs.SPEC, inputs.CONFIG
_GROUPS = ('policy', 'value', 'policy_steps', 'value_steps', 'coefficient')


def _terms(config):
  networks = macaw.make_networks(SPEC, config)
  return lambda params, batch: macaw.losses(
    params, batch, networks, config, 7, None
  )[0]


@pytest.fixture(name='state', scope='module')
def _state():
  return inputs.make_state(CONFIG)


@pytest.fixture(name='batch', scope='module')
def _batch():
  return inputs.make_batch(CONFIG)


@pytest.mark.parametrize('variant', list(inputs.VARIANTS))
def test_losses_and_meta_gradients_against_numpy(variant):
  config = inputs.changed(**inputs.VARIANTS[variant])
  state, batch = inputs.make_state(config), inputs.make_batch(config)
  terms, gradients = jax.jit(
    lambda params: (
      _terms(config)(params, batch),
      jax.jacrev(lambda p: _terms(config)(p, batch))(params),
    )
  )(state.params)
  expected, slopes = reference.terms_and_gradients(state.params, batch, config)
  assert set(terms) == set(expected)
  for name, value in expected.items():
    np.testing.assert_allclose(terms[name], value, rtol=1e-4, err_msg=name)
    for group, slope in slopes[name].items():
      np.testing.assert_allclose(
        reference.vector(gradients[name][group]),
        slope,
        rtol=2e-3,
        atol=2e-4 * np.abs(slope).max(),
        err_msg=f'{name} {group}',
      )


# Gradient routing: term -> groups that it reaches.

_ROUTES = {
  'value': {'value', 'value_steps'},
  'policy': {'policy', 'policy_steps', 'coefficient'},
}


@pytest.mark.parametrize('task_loop', ['scan', 'vmap'])
def test_gradient_routing(state, batch, task_loop):
  terms = _terms(inputs.changed(task_loop=task_loop))
  for term, gradients in jax.jit(jax.jacrev(terms))(
    state.params, batch
  ).items():
    reached = {k for k in _GROUPS if helpers.largest(gradients[k]) > 1e-6}
    untouched = {k for k in _GROUPS if helpers.largest(gradients[k]) == 0}
    assert reached == _ROUTES[term], term
    assert untouched == set(_GROUPS) - _ROUTES[term], term
    if term == 'policy':
      # The adapted head is never used: its step sizes do not matter.
      assert helpers.largest(gradients['policy_steps']['head']) == 0
      trunk = gradients['policy_steps']['trunk']
      assert all(np.abs(x) > 1e-6 for x in jax.tree.leaves(trunk))


def _head_gradient(state, batch):
  return helpers.largest(
    jax.jit(jax.grad(lambda p: _terms(CONFIG)(p, batch)['policy']))(
      state.params
    )['policy']['head']
  )


def test_the_head_learns_through_the_inner_gradient_only(
  state, batch, monkeypatch
):
  assert _head_gradient(state, batch) > 1e-3
  off = {**state.params, 'coefficient': np.float32(-200.0)}  # lambda is 0
  assert _head_gradient(state.replace(params=off), batch) == 0
  second_order = maml.inner_step

  def first_order(network, params, steps, *args):
    _, gradients, aux = second_order(network, params, steps, *args)
    gradients = jax.lax.stop_gradient(gradients)
    adapted = jax.vmap(network.step, (None, 0, None))(params, gradients, steps)
    return adapted, gradients, aux

  monkeypatch.setattr(maml, 'inner_step', first_order)
  assert _head_gradient(state, batch) == 0


def test_the_policy_loss_leaves_the_value_alone(state, batch):
  """Also by itself, where the head's target could lead there."""
  networks = macaw.make_networks(SPEC, CONFIG)
  weights, value = jax.jit(
    lambda params: (
      networks.policy.generate(params['policy']),
      networks.value.generate(params['value']),
    )
  )(state.params)
  mask = np.ones_like(batch.query.reward)

  def loss(weights, value):
    terms = macaw_losses.policy_loss(
      networks, weights, value, batch.query, mask, CONFIG, head=True
    )
    return jnp.sum(terms.awr + terms.advantage)

  into_policy, into_value = jax.jit(jax.grad(loss, (0, 1)))(weights, value)
  assert helpers.largest(into_policy) > 1e-3
  assert helpers.largest(into_value) == 0


# Updates.


@functools.cache
def _jitted_update(config):
  return jax.jit(
    macaw.make(Problem(SPEC, 7), config).loop('offline').stages[0].update
  )


def _update(config, state, batch):
  return _jitted_update(config)(state, batch)


def test_scan_equals_vmap(state, batch):
  scan, vmap = (
    _update(inputs.changed(task_loop=loop), state, batch)
    for loop in ('scan', 'vmap')
  )
  # Adam would hide the scale of a gradient, but not in its moments.
  helpers.assert_close(scan, vmap, 1e-4, 1e-6, leaf_rtol=1e-5)


def test_each_group_moves_at_its_rate(state, batch):
  after, logs = _update(CONFIG, state, batch)
  rates = dict(
    policy=1e-3,
    value=2e-3,
    policy_steps=3e-3,
    value_steps=3e-3,
    coefficient=3e-3,
  )
  for group, rate in rates.items():
    moved = jax.tree.map(np.subtract, after.params[group], state.params[group])
    # Adam's first step is the rate, wherever the gradient is not tiny.
    np.testing.assert_allclose(helpers.largest(moved), rate, rtol=1e-2)
  assert all(np.isfinite(x) for x in logs.values())
  assert int(after.step) == 1


def test_rows_that_do_not_count(state):
  """As if they were not there; not even when they are not finite."""
  batch = inputs.make_batch(CONFIG)
  keep = np.array([[0, 1, 4, 5], [0, 1, 2, 3]])
  mask = np.zeros((2, 6), np.float32)
  mask[np.arange(2)[:, None], keep] = 1.0
  shorter = batch._replace(
    context=jax.tree.map(
      lambda x: x[np.arange(2)[:, None], keep], batch.context
    ),
    context_mask=np.ones((2, 4), np.float32),
  )
  masked, short = (
    _update(CONFIG, state, b)
    for b in (batch._replace(context_mask=mask), shorter)
  )
  helpers.assert_close(masked, short, 1e-4, 1e-6, leaf_rtol=1e-5)
  # A task without any row is not adapted, and does no harm.
  mask = mask * np.float32([[0.0], [1.0]])
  empty, _ = _update(CONFIG, state, batch._replace(context_mask=mask))
  assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(empty.params))


@pytest.fixture(name='release', scope='module')
def _release(state, batch):
  return jax.device_get(jax.jit(_terms(CONFIG))(state.params, batch))


@pytest.mark.parametrize(
  'changes',
  [
    dict(bootstrap_terminal='none'),
    dict(mask_bootstrap_on_death=True),
    dict(adapt='latent_only'),
    dict(head_relu_on_action=False),
    dict(adv_std_eps=0.5),
    dict(temperature=0.5),
    dict(max_weight=1.1),
    dict(target_rate=1.0),
  ],
  ids=str,
)
def test_switches_change_the_loss(state, batch, release, changes):
  other = jax.device_get(
    jax.jit(_terms(inputs.changed(**changes)))(state.params, batch)
  )
  assert any(abs(other[k] - v) > 1e-4 * abs(v) for k, v in release.items())


def test_outer_norm(state, batch, release):
  """A sum over the two tasks divided by 7, or by 2."""
  by_two = jax.jit(_terms(inputs.changed(outer_norm='meta_batch')))(
    state.params, batch
  )
  for name, value in release.items():
    np.testing.assert_allclose(float(by_two[name]) / value, 3.5, rtol=1e-5)


def test_where_the_end_of_the_episode_matters(state, batch):
  """The outer value target bootstraps with it, the inner one does not."""
  networks = macaw.make_networks(SPEC, CONFIG)

  def moved(rows):
    return rows._replace(
      extras={
        **rows.extras,
        'last_observation': 1.0 + rows.extras['last_observation'],
      }
    )

  inner = jax.jit(
    lambda context: macaw_losses.inner_loop(
      state.params, context, batch.context_mask, networks, CONFIG
    )
  )
  one, other = inner(batch.context), inner(moved(batch.context))
  helpers.assert_same(
    (one.value, one.value_loss), (other.value, other.value_loss)
  )
  change = jax.tree.map(np.subtract, one.policy, other.policy)
  assert helpers.largest(change) > 1e-5
  for config, matters in (
    (CONFIG, True),
    (inputs.changed(bootstrap_terminal='none'), False),
  ):
    terms = jax.jit(_terms(config))
    before = terms(state.params, batch)
    after = terms(state.params, batch._replace(query=moved(batch.query)))
    for name in before:
      change = abs(float(before[name]) - float(after[name]))
      assert (change > 1e-5) == matters, name
