"""Encoders that give points, and models of a latent, against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from offmeta.networks import context
from offmeta.types import Transition

_KEY = jax.random.key(0)
_RNG = np.random.default_rng(0)
_HIGH, _LOW = 0.5, -10.0


def _array(*shape):
  return np.float32(_RNG.normal(size=shape))


_DATA = Transition(
  _array(4, 6, 3),
  _array(4, 6, 2),
  _array(4, 6),
  np.float32(_RNG.integers(0, 2, (4, 6))),
  _array(4, 6, 3),
)


def _shaken(params):
  """Moves parameters off their small start."""
  leaves, tree = jax.tree.flatten(params)
  return jax.tree.unflatten(
    tree,
    [
      np.asarray(leaf) + np.float32(0.5) * _array(*leaf.shape)
      for leaf in leaves
    ],
  )


def _mlp(params, *inputs):
  """One ReLU layer and one head."""
  x, layers = np.concatenate(inputs, -1), params['params']
  for name in ('Dense_0', 'Dense_1'):
    x = x @ np.asarray(layers[name]['kernel']) + layers[name]['bias']
    x = np.maximum(x, 0) if name == 'Dense_0' else x
  return x


@pytest.mark.parametrize('next_observation', [False, True])
@pytest.mark.parametrize('terminal', [False, True])
def test_points_against_numpy(next_observation, terminal):
  network = context.transition_encoder(
    3, 2, 5, (7,), next_observation, terminal
  )
  params = _shaken(jax.jit(network.init)(_KEY))
  columns = [_DATA.observation, _DATA.action, _DATA.reward[..., None]]
  columns += [_DATA.next_observation] * next_observation
  columns += [1 - _DATA.discount[..., None]] * terminal
  apply = jax.jit(network.apply)
  points = apply(params, _DATA, _array(4, 6, 5))
  np.testing.assert_allclose(
    points, np.tanh(_mlp(params['point'], *columns)), rtol=1e-4, atol=1e-5
  )
  # The noise does not matter, and no further leaf of the data does.
  data = _DATA._replace(extras={'features': np.nan})
  if not next_observation:
    data = data._replace(next_observation=np.nan * data.next_observation)
  if not terminal:
    data = data._replace(discount=np.nan * data.discount)
  np.testing.assert_array_equal(apply(params, data, _array(4, 6, 5)), points)


@pytest.mark.parametrize(
  'log_variance, variance',
  [(0.0, 1.0), (np.log(2.5), 2.5), (-5.0, 0.1), (5.0, 10.0)],
)
def test_stochastic_points(log_variance, variance):
  network = context.transition_encoder(3, 2, 2, (7,), stochastic=True)
  params = jax.jit(network.init)(_KEY)
  np.testing.assert_array_equal(params['log_variance'], np.zeros(2))
  params = _shaken(params)
  params['log_variance'] = np.full(2, log_variance, np.float32)
  noise = _array(4, 6, 2)
  mean = _mlp(
    params['point'], _DATA.observation, _DATA.action, _DATA.reward[..., None]
  )
  points, gradient = jax.jit(
    lambda p: (
      network.apply(p, _DATA, noise),
      jax.grad(lambda p: jnp.sum(network.apply(p, _DATA, noise)))(p),
    )
  )(params)
  np.testing.assert_allclose(
    points, np.tanh(mean + np.sqrt(variance) * noise), rtol=1e-4, atol=1e-5
  )
  gradient = np.asarray(gradient['log_variance'])
  assert np.all((gradient != 0) == (0.1 < variance < 10.0))


def test_masked_mean():
  points = _array(3, 4, 2)
  mask = np.float32([[1, 0, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]])
  expected = [
    (points[0, 0] + points[0, 2] + points[0, 3]) / 3,
    points[1, 1],
    np.zeros(2),
  ]
  np.testing.assert_allclose(
    jax.jit(context.masked_mean)(points, mask), expected, rtol=1e-5, atol=1e-6
  )


def test_bounded_gaussian_against_numpy():
  network = context.bounded_gaussian((3, 2), 4, (7,))
  params = _shaken(jax.jit(network.init)(_KEY))
  mean, variance = jax.jit(network.apply)(
    params, _DATA.observation, _DATA.action
  )
  out = np.tanh(_mlp(params, _DATA.observation, _DATA.action))
  np.testing.assert_allclose(mean, out[..., :4], rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(
    variance, np.log1p(np.exp(out[..., 4:])), rtol=1e-4
  )


def test_gaussian_model_against_numpy():
  network = context.gaussian_model((3, 2), 2, (7,))
  params = jax.jit(network.init)(_KEY)
  np.testing.assert_array_equal(params['low'], np.full(2, _LOW))
  np.testing.assert_array_equal(params['high'], np.full(2, _HIGH))
  params = _shaken(params)
  params['low'] = np.float32([-1.0, -0.5])  # where both bounds are felt
  (mean, variance), spread = jax.jit(network.apply)(
    params, _DATA.observation, _DATA.action
  )
  out = _mlp(params['body'], _DATA.observation, _DATA.action)
  low, high = np.asarray(params['low']), np.asarray(params['high'])
  raw = high - np.log1p(np.exp(high - out[..., 2:]))
  raw = low + np.log1p(np.exp(raw - low))
  np.testing.assert_allclose(mean, out[..., :2], rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(np.log(variance), raw, rtol=1e-3, atol=1e-4)
  np.testing.assert_allclose(spread, np.sum(high - low), rtol=1e-6)


def test_gaussian_model_stays_between_its_bounds():
  network = context.gaussian_model((1,), 1, ())
  params = jax.jit(network.init)(_KEY)
  head = params['body']['params']['Dense_0']
  apply = jax.jit(network.apply)
  for raw, bound in ((200.0, _HIGH), (-200.0, _LOW)):
    head['kernel'] = np.float32([[0.0, raw]])
    (_, variance), _ = apply(params, np.ones(1, np.float32))
    # softplus(x) > 0 for the lower bound: it is reached from above.
    np.testing.assert_allclose(np.log(variance), [bound], atol=1e-3)
