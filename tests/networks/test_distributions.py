"""TanhNormal and Gaussian against scipy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from offmeta.networks import distributions
from offmeta.networks.distributions import (
  Gaussian,
  ShiftedTanhNormal,
  TanhNormal,
)


def _reference(action, mean, log_std):
  """log density of tanh(x), x normal, by the change of variables."""
  x = np.arctanh(action)
  log_prob = stats.norm.logpdf(x, mean, np.exp(log_std))
  return np.sum(log_prob - np.log1p(-np.square(action)), axis=-1)


# One program each; outside jit, jax compiles one per operation and shape.
_log_prob = jax.jit(lambda m, s, action: TanhNormal(m, s).log_prob(action))
_sample = jax.jit(lambda m, s, noise: TanhNormal(m, s).sample(noise))
_sample_shifted = jax.jit(
  lambda m, s, noise: ShiftedTanhNormal(m, s).sample(noise)
)


def test_log_prob_against_scipy():
  rng = np.random.default_rng(0)
  mean = rng.normal(size=(6, 3))
  log_std = rng.uniform(-2.0, 1.0, (6, 3))
  action = rng.uniform(-0.98, 0.98, (6, 3))
  log_prob = _log_prob(*map(np.float32, (mean, log_std, action)))
  np.testing.assert_allclose(
    log_prob, _reference(action, mean, log_std), rtol=2e-5, atol=2e-5
  )


def test_density_integrates_to_one():
  one = TanhNormal(np.float32([0.4]), np.float32([-0.3]))
  density = jax.jit(jax.vmap(lambda a: jnp.exp(one.log_prob(a))))
  grid = np.tanh(np.linspace(-6, 6, 4001))
  mass = integrate.trapezoid(density(np.float32(grid)[:, None]), grid)
  assert abs(mass - 1.0) < 1e-3


def test_edge_actions_are_clipped_to_a_documented_value():
  mean, log_std = np.float32([[0.2], [0.0]])
  both = jax.jit(
    jax.value_and_grad(lambda m, a: TanhNormal(m, log_std).log_prob(a))
  )
  for sign in (-1.0, 1.0):
    value, gradient = both(mean, np.float32([sign]))
    assert np.isfinite(value)
    # Float32 rounds 0.999999 to 1 - 17 * 2^-24.
    edge = sign * (1.0 - 17 * 2.0**-24)
    np.testing.assert_allclose(
      value, _reference(np.array([edge]), 0.2, 0.0), rtol=1e-3
    )
    assert np.all(np.isfinite(gradient))


def test_sample_and_its_log_prob():
  of = np.float32([[0.3, -0.5]]), np.float32([[-0.7, 0.1]])
  action, log_prob = _sample(*of, np.float32([[0.5, -0.8]]))
  # tanh(0.3 + 0.5 e^-0.7), tanh(-0.5 - 0.8 e^0.1)
  expected = np.tanh([[0.3 + 0.5 * np.exp(-0.7), -0.5 - 0.8 * np.exp(0.1)]])
  np.testing.assert_allclose(action, expected, rtol=1e-6)
  np.testing.assert_allclose(log_prob, _log_prob(*of, action), rtol=1e-5)
  np.testing.assert_array_equal(
    jax.jit(lambda m, s: TanhNormal(m, s).mode())(*of),
    _sample(*of, np.zeros((1, 2), np.float32))[0],
  )


def test_sample_is_not_clipped():
  # Before the tanh 20: log N(20; 0, 1) - 2 (ln 2 - 20) = -200.919 + 38.614.
  action, log_prob = _sample(*np.float32([[0.0], [0.0], [20.0]]))
  assert np.asarray(action)[0] == 1.0
  np.testing.assert_allclose(log_prob, -162.30523, rtol=1e-6)


def test_shifted_tanh_correction():
  """log(1 - a^2 + 1e-6), as in PEARL's first release, in float64 numpy."""
  rng = np.random.default_rng(2)
  mean, log_std, noise = [
    rng.uniform(*bounds, (7, 2)) for bounds in ((-3, 3), (-2, 1), (-1, 1))
  ]
  arrays = [np.float32(x) for x in (mean, log_std, noise)]
  action, log_prob = _sample_shifted(*arrays)
  x = mean + np.exp(log_std) * noise
  expected = stats.norm.logpdf(x, mean, np.exp(log_std)) - np.log(
    1 - np.tanh(x) ** 2 + 1e-6
  )
  np.testing.assert_allclose(log_prob, expected.sum(-1), rtol=1e-4, atol=1e-4)
  exact, _ = _sample(*arrays)
  np.testing.assert_array_equal(action, exact)


def test_the_corrections_part_where_the_tanh_saturates():
  log_prob = lambda kind: (
    lambda mean: kind(mean, jnp.zeros(1)).sample(jnp.zeros(1))[1]
  )
  at = np.float32([8.0])
  # 1 - tanh(8)^2 = 4.50e-7: ln((4.50e-7 + 1e-6) / 4.50e-7) = 1.17, in float32.
  exact, shifted = [
    jax.device_get(jax.value_and_grad(log_prob(kind))(at))
    for kind in (TanhNormal, ShiftedTanhNormal)
  ]
  np.testing.assert_allclose(exact[0] - shifted[0], 1.17, atol=0.1)
  np.testing.assert_allclose(exact[1], 2.0, rtol=1e-4)
  # 2 * 4.50e-7 / 1.45e-6 = 0.62, in float32 0.53.
  np.testing.assert_allclose(shifted[1], 0.62, atol=0.15)
  near = np.float32([[0.5], [0.0], [0.0]])
  np.testing.assert_allclose(
    _sample(*near)[1], _sample_shifted(*near)[1], atol=1e-5
  )


def test_gradients_flow_into_sample_and_log_prob():
  def both(mean, log_std):
    action, log_prob = TanhNormal(mean, log_std).sample(jnp.array([0.7]))
    return jnp.sum(action), log_prob

  action, log_prob = jax.jit(jax.jacobian(both, (0, 1)))(
    *np.float32([[0.1], [-0.2]])
  )
  x = 0.1 + np.exp(-0.2) * 0.7
  # d tanh(x) / d mean = 1 - tanh^2; d / d log_std = that * std * noise.
  slope = 1 - np.tanh(x) ** 2
  np.testing.assert_allclose(
    np.ravel(action), [slope, slope * np.exp(-0.2) * 0.7], rtol=1e-5
  )
  # log_prob = const - log_std - log(1 - tanh(x)^2): 2 tanh(x) per unit of x.
  into_x = 2 * np.tanh(x)
  np.testing.assert_allclose(
    np.ravel(log_prob), [into_x, into_x * np.exp(-0.2) * 0.7 - 1], rtol=1e-5
  )


def test_log_prob_wrong_shapes_raise():
  column = np.zeros((3, 1), np.float32)
  distribution = TanhNormal(column, column)
  with pytest.raises(AssertionError):
    distribution.log_prob(np.zeros(3, np.float32))


def test_gaussian_sample():
  # 1 + sqrt(4) * 0.5, -1 + 3 * -1: the field is a variance.
  z, of_prior = jax.jit(
    lambda mean, variance, noise, other: (
      Gaussian(mean, variance).sample(noise),
      distributions.standard_normal((2,)).sample(other),
    )
  )(*np.float32([[1.0, -1.0], [4.0, 9.0], [0.5, -1.0], [0.3, 2.0]]))
  np.testing.assert_allclose(z, [2.0, -4.0])
  np.testing.assert_array_equal(of_prior, np.array([0.3, 2.0], np.float32))


def test_task_noise_is_a_function_of_the_key():
  keys = jax.random.split(jax.random.key(0), 4)
  task_noise = jax.jit(distributions.task_noise, static_argnums=1)
  noise = np.asarray(task_noise(keys, (5, 2)))
  assert noise.shape == (4, 5, 2)
  np.testing.assert_array_equal(task_noise(keys[2:], (5, 2)), noise[2:])
  many = np.asarray(task_noise(jax.random.split(keys[0], 200), (50,)))
  assert abs(many.mean()) < 0.04 and abs(many.std() - 1) < 0.04
