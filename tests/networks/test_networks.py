"""Perceptrons, ensembles, actors and the set encoder against numpy."""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from offmeta.networks import actors, base, context, critics, distributions
from offmeta.types import Transition

_KEY = jax.random.key(0)


def _layers(params):
  layers = params['params']
  return [
    (
      np.asarray(layers[f'Dense_{i}']['kernel']),
      np.asarray(layers[f'Dense_{i}']['bias']),
    )
    for i in range(len(layers))
  ]


_shaken = functools.partial(helpers.shaken, scale=0.5)


def test_mlp_against_numpy():
  network = base.mlp((2, 3), (7, 5), ((1, 0.1), (2, 0.2)))
  params = _shaken(jax.jit(network.init)(_KEY))
  rng = np.random.default_rng(1)
  a, b = rng.normal(size=(4, 2)), rng.normal(size=(4, 3))
  first, second = jax.jit(network.apply)(params, a, b)
  (w0, b0), (w1, b1), (w2, b2), (w3, b3) = _layers(params)
  h = np.maximum(np.hstack([a, b]) @ w0 + b0, 0)
  h = np.maximum(h @ w1 + b1, 0)
  np.testing.assert_allclose(first, h @ w2 + b2, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(second, h @ w3 + b3, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('hidden_bias', [0.0, 0.1])
def test_initialisers(hidden_bias):
  network = base.mlp((10,), (400, 100), ((6, 3e-3),), hidden_bias)
  (w0, b0), (w1, b1), (w2, b2) = _layers(jax.jit(network.init)(_KEY))
  # U(+-1/sqrt(output width)): 1/20 and 1/10; the head U(+-3e-3), its bias too.
  for values, bound in ((w0, 0.05), (w1, 0.1), (w2, 3e-3)):
    assert 0.95 * bound < np.abs(values).max() <= bound
    assert abs(values.std() - bound / np.sqrt(3)) < 0.05 * bound
  assert 0 < np.abs(b2).max() <= 3e-3
  np.testing.assert_array_equal(b0, np.full(400, hidden_bias, np.float32))
  np.testing.assert_array_equal(b1, np.full(100, hidden_bias, np.float32))


def test_last_biases_can_start_at_zero():
  """SMAC's release; all other numbers are the same. Not those of log-std."""
  for make in (
    lambda *zero: critics.scalar((2,), (4,), 0.1, *zero),
    lambda *zero: critics.q_ensemble((2,), (4,), 2, 0.1, *zero),
    lambda *zero: context.set_encoder(1, 1, 2, (4,), False, 0.1, *zero),
    lambda *zero: actors.tanh_gaussian_actor((2,), 3, (4,), 0.1, *zero),
  ):
    old, new = jax.jit(lambda key: (make().init(key), make(True).init(key)))(
      _KEY
    )
    zeros = 0
    for (path, a), b in zip(
      jax.tree_util.tree_leaves_with_path(old), jax.tree.leaves(new)
    ):
      if np.array_equal(b, np.zeros_like(b)):
        assert 'Dense_1' in str(path) and 'bias' in str(path)
        assert 0 < np.max(np.abs(a)) <= 3e-3
        zeros += 1
      else:
        np.testing.assert_array_equal(a, b)
    assert zeros == (2 if isinstance(old, tuple) else 1)


def test_truncated_normal_start():
  """mbrl-lib's, of hidden layers too: std 1/(2 sqrt(inputs)), biases 0."""
  network = base.mlp((100,), (400,), ((200, 3e-3),), 0.1, 'truncated_normal')
  for (kernel, bias), inputs in zip(
    _layers(jax.jit(network.init)(_KEY)), (100, 400)
  ):
    cut = 1 / np.sqrt(inputs)
    assert 0.95 * cut < np.abs(kernel).max() <= cut
    # A normal that is cut at 2 has 0.8796 of its standard deviation.
    np.testing.assert_allclose(kernel.std(), 0.8796 * cut / 2, rtol=0.02)
    assert not bias.any()
  with pytest.raises(ValueError, match='start=.normal'):
    base.mlp((1,), (1,), ((1, 3e-3),), 0.1, 'normal')


def test_ensemble_stacks_independent_members():
  network = critics.q_ensemble((2, 1), (4,), 3)
  params = jax.jit(network.init)(_KEY)
  inputs = np.ones((5, 2), np.float32), np.ones((5, 1), np.float32)
  q = np.asarray(jax.jit(network.apply)(params, *inputs))
  assert q.shape == (3, 5)
  single = jax.jit(critics.scalar((2, 1), (4,)).apply)
  for k in range(3):
    np.testing.assert_array_equal(q[k], single(params[k], *inputs))
  assert len({float(x) for x in q[:, 0]}) == 3


def test_actor_clips_log_std():
  network = actors.tanh_gaussian_actor((2,), 3, (4,))
  params = jax.jit(network.init)(_KEY)
  apply = jax.jit(network.apply)
  inputs = np.float32(np.random.default_rng(0).normal(size=(50, 2)))
  assert apply(params, inputs[:5]).mean.shape == (5, 3)
  heads = [
    np.max(np.abs(leaf)) for layer in _layers(params)[1:] for leaf in layer
  ]
  assert max(heads) <= 1e-3
  big = jax.tree.map(lambda x: np.float32(1e4) * np.asarray(x), params)
  log_std = np.asarray(apply(big, inputs).log_std)
  assert log_std.min() == -20.0 and log_std.max() == 2.0
  low = actors.tanh_gaussian_actor((2,), 3, (4,), max_log_std=0.0)
  log_std = np.asarray(jax.jit(low.apply)(big, inputs).log_std)
  assert log_std.min() == -20.0 and log_std.max() == 0.0


def test_actor_has_two_corrections_of_the_tanh():
  inputs = np.ones((5, 2), np.float32)
  make = lambda *correction: actors.tanh_gaussian_actor(
    (2,), 3, (4,), **dict(zip(['tanh_correction'], correction))
  )
  params = jax.jit(make().init)(_KEY)
  of = lambda network: type(jax.eval_shape(network.apply, params, inputs))
  for name, kind in distributions.TANH_NORMALS.items():
    assert of(make(name)) is kind
  assert of(make()) is distributions.TanhNormal
  with pytest.raises(ValueError, match='tanh_correction=.none'):
    make('none')


# The product of Gaussians.

_product = jax.jit(context.product_of_gaussians)


def test_product_by_hand():
  # Precisions 1/0.5 = 2 and 1/0.25 = 4: variance 1/6, mean (2 * 1 + 4 * 4)/6.
  posterior = _product(
    np.float32([[1.0], [4.0]]),
    np.float32([[0.5], [0.25]]),
    np.ones(2, np.float32),
  )
  np.testing.assert_allclose(posterior.variance, [1 / 6], rtol=1e-6)
  np.testing.assert_allclose(posterior.mean, [3.0], rtol=1e-6)


def test_product_of_one_is_itself():
  mean, variance = np.float32([[0.3, -2.0]]), np.float32([[0.7, 1.9]])
  posterior = _product(mean, variance, np.ones(1, np.float32))
  np.testing.assert_allclose(posterior.mean, mean[0], rtol=1e-6)
  np.testing.assert_allclose(posterior.variance, variance[0], rtol=1e-6)


def test_product_of_equals_divides_the_variance():
  posterior = _product(
    np.full((7, 2), 1.5, np.float32),
    np.full((7, 2), 2.1, np.float32),
    np.ones(7, np.float32),
  )
  np.testing.assert_allclose(posterior.mean, [1.5, 1.5], rtol=1e-6)
  np.testing.assert_allclose(posterior.variance, [0.3, 0.3], rtol=1e-6)


def test_product_ignores_masked_and_order():
  rng = np.random.default_rng(0)
  mean = np.float32(rng.normal(size=(5, 2)))
  variance = np.float32(rng.uniform(0.1, 2.0, (5, 2)))
  kept = np.array([0, 3])
  alone = _product(mean[kept], variance[kept], np.ones(2, np.float32))
  mask = np.float32([1.0, 0.0, 0.0, 1.0, 0.0])
  for order in ([0, 1, 2, 3, 4], [4, 3, 1, 0, 2]):
    order = np.array(order)
    among = _product(mean[order], variance[order], mask[order])
    np.testing.assert_allclose(among.mean, alone.mean, rtol=1e-6)
    np.testing.assert_allclose(among.variance, alone.variance, rtol=1e-6)


def test_product_of_nothing_is_the_prior():
  ones = np.ones((2, 3, 4), np.float32)
  mask = np.float32([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
  posterior = _product(np.float32(5.0) * ones, np.float32(0.1) * ones, mask)
  posterior = jax.device_get(posterior)
  np.testing.assert_array_equal(posterior.mean[0], np.zeros(4))
  np.testing.assert_array_equal(posterior.variance[0], np.ones(4))
  np.testing.assert_allclose(posterior.mean[1], np.full(4, 5.0), rtol=1e-6)
  gradient = np.asarray(
    jax.jit(
      jax.grad(
        lambda m: jnp.sum(
          context.product_of_gaussians(m, 0.1 * ones, mask).mean
        )
      )
    )(ones)
  )
  assert np.all(np.isfinite(gradient)) and not np.any(gradient[0])


def test_product_clips_tiny_variances():
  posterior = _product(
    np.ones((1, 1), np.float32),
    np.zeros((1, 1), np.float32),
    np.ones(1, np.float32),
  )
  np.testing.assert_allclose(posterior.variance, [1e-7], rtol=1e-6)


@pytest.mark.parametrize('use_next', [False, True])
def test_set_encoder_against_numpy(use_next):
  network = context.set_encoder(3, 2, 2, (6,), use_next)
  params = _shaken(jax.jit(network.init)(_KEY))
  rng = np.random.default_rng(2)
  n = 5
  s, a, r, s2 = (
    rng.normal(size=shape) for shape in ((n, 3), (n, 2), (n,), (n, 3))
  )
  mask = np.array([1.0, 1.0, 0.0, 1.0, 1.0])
  f32 = lambda x: np.float32(x)
  posterior = jax.jit(network.apply)(
    params, Transition(f32(s), f32(a), f32(r), f32(r), f32(s2)), f32(mask)
  )
  (w0, b0), (w1, b1) = _layers(params)
  precision, weighted = np.zeros(2), np.zeros(2)
  for i in range(n):
    if not mask[i]:
      continue
    x = np.concatenate([s[i], a[i], [r[i]]] + ([s2[i]] if use_next else []))
    out = np.maximum(x @ w0 + b0, 0) @ w1 + b1
    variance = np.maximum(np.log1p(np.exp(out[2:])), 1e-7)
    precision += 1 / variance
    weighted += out[:2] / variance
  np.testing.assert_allclose(posterior.variance, 1 / precision, rtol=1e-4)
  np.testing.assert_allclose(
    posterior.mean, weighted / precision, rtol=1e-4, atol=1e-5
  )
