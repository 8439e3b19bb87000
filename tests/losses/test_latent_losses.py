"""KL divergences by hand and by Monte Carlo."""

import jax
import numpy as np
import pytest
from scipy import stats

from offmeta.losses import latent

# One program each; outside jit, jax compiles one per operation and shape.
_to_standard_normal = jax.jit(latent.kl_to_standard_normal)
_between = jax.jit(latent.kl_between)


def test_kl_to_standard_normal_by_hand():
  # 0.5 (4 + 1 - 1 - ln 4) = 2 - ln 2 = 1.3068528, plus 0 for N(0, 1);
  # 0.5 (0.25 + 0 - 1 - ln 0.25) = -0.375 + ln 2 = 0.3181472, plus
  # 0.5 (1 + 9 - 1) = 4.5.
  kl = _to_standard_normal(
    np.float32([[1.0, 0.0], [0.0, -3.0]]), np.float32([[4.0, 1.0], [0.25, 1.0]])
  )
  np.testing.assert_allclose(kl, [1.3068528, 4.8181472], rtol=1e-6)


def test_kl_to_standard_normal_by_monte_carlo():
  mean, variance = np.array([0.7, -0.2]), np.array([0.3, 1.8])
  posterior = stats.multivariate_normal(mean, np.diag(variance), seed=0)
  x = posterior.rvs(400_000)
  log_ratio = posterior.logpdf(x) - stats.multivariate_normal(
    np.zeros(2), np.eye(2)
  ).logpdf(x)
  error = log_ratio.std() / np.sqrt(len(x))
  kl = _to_standard_normal(mean, variance)
  assert abs(float(kl) - log_ratio.mean()) < 4 * error


def test_kl_between_by_hand():
  # Ratio 2 / 0.5 = 4, distance (3 - 1)^2 / 0.5 = 8:
  # 0.5 (4 + 8 - 1 - ln 4) = 5.5 - ln 2 = 4.8068528.
  kl = _between(
    np.float32([3.0]), np.float32([2.0]), np.float32([1.0]), np.float32([0.5])
  )
  np.testing.assert_allclose(kl, 4.8068528, rtol=1e-6)


def test_kl_between_by_monte_carlo():
  p = stats.multivariate_normal([0.7, -0.2], np.diag([0.3, 1.8]), seed=1)
  q = stats.multivariate_normal([-0.1, 0.4], np.diag([0.9, 0.7]))
  x = p.rvs(400_000)
  log_ratio = p.logpdf(x) - q.logpdf(x)
  kl = _between(
    *[np.float32(a) for a in ([0.7, -0.2], [0.3, 1.8], [-0.1, 0.4], [0.9, 0.7])]
  )
  assert abs(float(kl) - log_ratio.mean()) < 4 * log_ratio.std() / np.sqrt(
    len(x)
  )


def test_kl_identities():
  rng = np.random.default_rng(0)
  mean = np.float32(rng.normal(size=(4, 3)))
  variance = np.float32(rng.uniform(0.1, 3.0, (4, 3)))
  np.testing.assert_allclose(
    _between(mean, variance, mean, variance), 0.0, atol=1e-6
  )
  np.testing.assert_allclose(
    _between(mean, variance, 0 * mean, 0 * variance + 1.0),
    _to_standard_normal(mean, variance),
    rtol=1e-5,
  )
  np.testing.assert_array_equal(
    _to_standard_normal(np.zeros((2, 3)), np.ones((2, 3))),
    [0.0, 0.0],
  )


@pytest.mark.parametrize(
  'call',
  [
    lambda: latent.kl_to_standard_normal(np.ones((3, 2)), np.ones(2)),
    lambda: latent.kl_to_standard_normal(np.ones((3, 1)), np.ones(3)),
    lambda: latent.kl_between(*[np.ones((3, 2))] * 3, np.ones((3, 1))),
    lambda: latent.kl_between(np.ones((3,)), *[np.ones((3, 1))] * 3),
  ],
)
def test_wrong_shapes_raise(call):
  with pytest.raises(AssertionError):
    call()
