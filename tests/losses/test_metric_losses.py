"""Metric and divergence losses against loops and by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from offmeta.losses import divergence, metric

_RNG = np.random.default_rng(0)


def _normal(*shape):
  return np.float32(_RNG.normal(size=shape))


# One program each; outside jit, jax compiles one per operation and shape.
_distance_metric = jax.jit(metric.distance_metric)
_club_bound = jax.jit(metric.club_bound)


# Distances between tasks.


def _pairs(z, task_id):
  """A loop over unordered pairs."""
  z, sums, counts = np.asarray(z, np.float64), [0.0, 0.0], [0, 0]
  for i in range(len(z)):
    for j in range(i + 1, len(z)):
      distance = np.mean((z[i] - z[j]) ** 2)
      other = int(task_id[i] != task_id[j])
      cost = 1 / (distance + 0.1) if other else np.sqrt(distance + 1e-3)
      sums[other] += cost
      counts[other] += 1
  return [s / (n + 1e-3) for s, n in zip(sums, counts)]


@pytest.mark.parametrize(
  'task_id', [(0, 1, 0, 2, 1, 0, 3), (5, 5, 5), (4, 2), (3,)]
)
def test_distance_metric_against_a_loop(task_id):
  z = _normal(len(task_id), 4)
  np.testing.assert_allclose(
    _distance_metric(z, np.array(task_id)), _pairs(z, task_id), rtol=1e-5
  )


def test_distance_metric_by_hand():
  # D = (0.3^2 + 0.1^2) / 2 = 0.05: sqrt(0.051) / 1.001 = 0.2256060 for a pair
  # of one task, 1 / 0.15 / 1.001 = 6.6600067 for one of two.
  z = np.float32([[0.1, 0.2], [0.4, 0.1]])
  np.testing.assert_allclose(
    _distance_metric(z, np.array([7, 7])), [0.2256060, 0.0], rtol=1e-5
  )
  np.testing.assert_allclose(
    _distance_metric(z, np.array([7, 8])), [0.0, 6.6600067], rtol=1e-5
  )


@pytest.mark.parametrize('task_id', [(0, 1, 2), (1, 1, 1)])
def test_distance_metric_is_finite_where_latents_are_equal(task_id):
  """Also without pairs of one task, or of two."""
  z = np.ones((3, 2), np.float32)
  value, gradient = jax.jit(
    jax.value_and_grad(
      lambda z: sum(metric.distance_metric(z, jnp.array(task_id)))
    )
  )(z)
  assert np.isfinite(value) and np.all(np.isfinite(gradient))


def test_distance_metric_pulls_and_pushes():
  z = _normal(3, 2)
  gradient = jax.jit(
    jax.grad(lambda z: sum(metric.distance_metric(z, jnp.array([0, 0, 1]))))
  )
  for _ in range(200):
    z -= 0.05 * np.asarray(gradient(z))
  near, far = np.linalg.norm(z[0] - z[1]), np.linalg.norm(z[0] - z[2])
  assert near < 0.2 and far > 1.5


def test_distance_metric_over_four_devices():
  """Pairs of all devices; gradients averaged are those of one device."""
  z, task_id = _normal(8, 3), np.array([0, 1, 0, 2, 1, 3, 3, 0])
  weight = _normal(3, 3)

  def loss(weight, z, task_id, axis_name=None):
    same, other = metric.distance_metric(
      jnp.tanh(z @ weight), task_id, axis_name
    )
    return 2.0 * same + other

  def shared(weight, z, task_id):
    out = jax.value_and_grad(loss)(weight, z, task_id, 'task')
    return jax.lax.pmean(out, 'task')

  split = lambda x: x.reshape((4, 2) + x.shape[1:])
  value, gradient = jax.pmap(
    shared, axis_name='task', in_axes=(None, 0, 0), out_axes=None
  )(weight, split(z), split(task_id))
  expected, slope = jax.jit(jax.value_and_grad(loss))(weight, z, task_id)
  np.testing.assert_allclose(value, expected, rtol=1e-6)
  np.testing.assert_allclose(gradient, slope, rtol=1e-5, atol=1e-6)


# What a latent tells, and what it predicts.


def test_gaussian_nll_against_scipy():
  x, mean, variance = _normal(5, 2), _normal(5, 2), np.exp(_normal(5, 2))
  expected = -stats.norm(mean, np.sqrt(variance)).logpdf(x)
  np.testing.assert_allclose(
    jax.jit(metric.gaussian_nll)(x, mean, variance),
    expected - 0.5 * np.log(2 * np.pi),
    rtol=1e-4,
    atol=1e-6,
  )


def test_club_bound_against_a_loop_over_pairs():
  z, mean, variance = (
    _normal(2, 4, 3),
    _normal(2, 4, 3),
    np.exp(_normal(2, 4, 3)),
  )
  mask = np.array([[1, 0, 1, 1], [1, 1, 0, 0]])
  bound = np.asarray(_club_bound(z, mean, variance, np.float32(mask)))
  for t in range(2):
    rows = np.flatnonzero(mask[t])
    cost = lambda j, i: np.mean((z[t, j] - mean[t, i]) ** 2 / variance[t, i])
    matched = np.mean([cost(i, i) for i in rows])
    shuffled = np.mean([cost(j, i) for i in rows for j in rows])
    np.testing.assert_allclose(bound[t], shuffled - matched, rtol=1e-5)


def test_club_bound_sees_dependence_only():
  x = _normal(1, 500, 1)
  one, every = np.ones_like(x), np.ones((1, 500), np.float32)
  bound = lambda z: np.asarray(_club_bound(z, x, one, every))[0]
  # z = x: mean_ij (x_j - x_i)^2 = 2 var(x).
  np.testing.assert_allclose(bound(x), 2 * np.var(x), rtol=1e-4)
  assert abs(bound(_normal(1, 500, 1))) < 0.3
  np.testing.assert_allclose(bound(np.full_like(x, 3.0)), 0.0, atol=1e-4)
  assert np.asarray(_club_bound(x, x, one, 0.0 * every))[0] == 0.0


def test_club_bound_trains_the_encoder_alone():
  arguments = _normal(2, 4, 3), _normal(2, 4, 3), np.exp(_normal(2, 4, 3))
  gradients = jax.device_get(
    jax.jit(
      jax.grad(
        lambda *a: jnp.sum(metric.club_bound(*a, jnp.ones((2, 4)))), (0, 1, 2)
      )
    )(*arguments)
  )
  assert np.any(gradients[0] != 0)
  assert not np.any(gradients[1]) and not np.any(gradients[2])


def test_cross_entropy_by_hand():
  # log(e^1 + e^0 + e^2) - 2 = 0.4076060; log 3 for equal logits.
  np.testing.assert_allclose(
    jax.jit(metric.cross_entropy)(
      np.float32([[1.0, 0.0, 2.0], [4.0, 4.0, 4.0]]), np.array([2, 1])
    ),
    [0.4076060, np.log(3)],
    rtol=1e-5,
  )


# The divergence from the behaviour policy.


def test_dual_kl_by_hand():
  # softplus(0) = ln 2 = 0.6931472, softplus(1) = 1.3132617:
  # 1 - 0.6931472 + ln 1.3132617 = 0.5793667.
  dual_kl = jax.jit(divergence.dual_kl)
  zero, one, low = np.float32([[0.0], [1.0], [-200.0]])
  np.testing.assert_allclose(dual_kl(zero, one), [0.5793667], rtol=1e-5)
  assert np.isfinite(dual_kl(zero, low))


def test_dual_kl_reaches_the_divergence():
  """Maximised over one number per action it is KL(own || logged)."""
  own, logged = np.array([0.7, 0.2, 0.1]), np.array([0.2, 0.3, 0.5])
  mean = lambda c: (
    jnp.sum(own * jnp.log(jax.nn.softplus(c)))
    - jnp.sum(logged * jax.nn.softplus(c))
    + 1.0
  )
  best = np.log(np.expm1(np.float32(own / logged)))
  slope, pairs = jax.jit(
    lambda c: (
      jax.grad(mean)(c),
      divergence.dual_kl(jnp.repeat(c, 3), jnp.tile(c, 3)),
    )
  )(best)
  np.testing.assert_allclose(slope, np.zeros(3), atol=1e-6)
  # One pair of (logged, own) actions each: 9 of them, weighted.
  np.testing.assert_allclose(
    logged @ np.asarray(pairs).reshape(3, 3) @ own,
    np.sum(own * np.log(own / logged)),
    rtol=1e-5,
  )


def test_slope_penalty_by_hand():
  slope = np.float32([[3.0, 4.0], [0.6, 0.0], [0.0, 0.0]])
  penalty, gradient = jax.jit(
    lambda s: (
      divergence.slope_penalty(s),
      jax.grad(lambda s: jnp.sum(divergence.slope_penalty(s)))(s),
    )
  )(slope)
  np.testing.assert_allclose(penalty, [16.0, 0.0, 0.0], rtol=1e-6)
  assert np.all(np.isfinite(gradient))


def test_next_weight_ascends():
  next_weight = jax.jit(divergence.next_weight)
  step = lambda d: next_weight(np.float32(50.0), np.float32(d), 0.05, 2.0)
  np.testing.assert_allclose(step(0.3), 50.5, rtol=1e-6)
  np.testing.assert_allclose(step(-0.2), 49.5, rtol=1e-6)


_ones = functools.partial(np.ones, dtype=np.float32)
_COLUMN = _ones((3, 1))


@pytest.mark.parametrize(
  'call',
  [
    lambda: metric.distance_metric(_COLUMN, _ones((3, 1))),
    lambda: metric.distance_metric(_ones(3), _ones(3)),
    lambda: metric.distance_metric(_COLUMN, _ones(4)),
    lambda: metric.gaussian_nll(_COLUMN, _ones(3), _ones(3)),
    lambda: metric.gaussian_nll(_ones(3), _ones(3), _COLUMN),
    lambda: metric.club_bound(*[_ones((2, 3, 1))] * 3, _ones((2, 3, 1))),
    lambda: metric.club_bound(
      _ones((2, 3, 1)), *[_ones((2, 1, 1))] * 2, _ones((2, 3))
    ),
    lambda: metric.cross_entropy(_COLUMN, np.zeros((3, 1), int)),
    lambda: divergence.dual_kl(_COLUMN, _ones(3)),
    lambda: divergence.next_weight(_ones(1), _ones(()), 0.05, 1.0),
  ],
)
def test_wrong_shapes_raise(call):
  with pytest.raises(AssertionError):
    call()
