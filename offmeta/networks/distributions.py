"""Distributions as NamedTuples of arrays."""

import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from offmeta.types import Array, Key

_LOG_2PI = math.log(2.0 * math.pi)
# Dataset actions are pulled inside the open interval before atanh, so that
# the log-likelihood of an action of exactly +-1 is finite.
ACTION_LIMIT = 0.999999
_SHIFT = 1e-6  # of `ShiftedTanhNormal`


def normal_log_prob(x: Array, mean: Array, log_std: Array) -> Array:
  """log N(x; mean, exp(log_std)), elementwise, broadcasting shapes [...]."""
  residual = (x - mean) * jnp.exp(-log_std)
  return -0.5 * (jnp.square(residual) + _LOG_2PI) - log_std


class Normal(NamedTuple):
  """Diagonal Gaussian over actions, not squashed; event axis last.

  Attributes:
    mean: [..., A].
    std: [..., A] or a scalar.
  """

  mean: Array
  std: Array | float

  def log_prob(self, action: Array) -> Array:
    """Log-probability [...] of actions [..., A]."""
    chex.assert_equal_shape([action, self.mean])
    return jnp.sum(
      normal_log_prob(action, self.mean, jnp.log(self.std)), axis=-1
    )

  def sample(self, noise: Array) -> Array:
    """mean + std * noise [..., A], from standard normal noise [..., A]."""
    return self.mean + self.std * noise

  def entropy(self) -> Array:
    """In nats, [...]."""
    each = 0.5 * (1.0 + _LOG_2PI) + jnp.log(self.std)
    return jnp.sum(jnp.broadcast_to(each, self.mean.shape), axis=-1)


class TanhNormal(NamedTuple):
  """tanh of a diagonal Gaussian; event axis last.

  Attributes:
    mean: [..., A] before the tanh.
    log_std: [..., A].
  """

  mean: Array
  log_std: Array

  def mode(self) -> Array:
    """tanh(mean) [..., A], what is called the deterministic action."""
    return jnp.tanh(self.mean)

  def sample(self, noise: Array) -> tuple[Array, Array]:
    """Reparameterised sample.

    Args:
      noise: [..., A], standard normal.

    Returns:
      Action [..., A] and its log-probability [...], computed from the value
      before the tanh, so no clipping takes part. Gradients flow into both.
    """
    pre_tanh = self.mean + jnp.exp(self.log_std) * noise
    return jnp.tanh(pre_tanh), self._log_prob_pre_tanh(pre_tanh)

  def log_prob(self, action: Array) -> Array:
    """Log-probability [...] of actions [..., A] in [-1, 1].

    Actions are clipped to +-0.999999 before atanh, so +-1 is finite.
    """
    chex.assert_equal_shape([action, self.mean])
    return self._log_prob_pre_tanh(
      jnp.arctanh(jnp.clip(action, -ACTION_LIMIT, ACTION_LIMIT))
    )

  def _log_prob_pre_tanh(self, x: Array) -> Array:
    log_jacobian = 2.0 * (math.log(2.0) - x - jax.nn.softplus(-2.0 * x))
    log_prob = normal_log_prob(x, self.mean, self.log_std) - log_jacobian
    return jnp.sum(log_prob, axis=-1)


class ShiftedTanhNormal(TanhNormal):
  """TanhNormal with the tanh correction log(1 - a^2 + 1e-6).

  What PEARL's first release and the codes that descend from it compute.
  Where the tanh saturates the density is too small and its gradient too weak:
  log_prob of the mode at mean 8 is 1.2 less.
  """

  __slots__ = ()

  def _log_prob_pre_tanh(self, x: Array) -> Array:
    log_jacobian = jnp.log(1.0 - jnp.square(jnp.tanh(x)) + _SHIFT)
    log_prob = normal_log_prob(x, self.mean, self.log_std) - log_jacobian
    return jnp.sum(log_prob, axis=-1)


# How a squashed action's log-probability is corrected for the tanh.
TANH_NORMALS = {'exact': TanhNormal, 'shifted': ShiftedTanhNormal}


class Gaussian(NamedTuple):
  """Diagonal Gaussian over a latent.

  Attributes:
    mean: [..., Z].
    variance: [..., Z].
  """

  mean: Array
  variance: Array

  def sample(self, noise: Array) -> Array:
    """Reparameterised sample [..., Z] from standard normal noise [..., Z]."""
    return self.mean + jnp.sqrt(self.variance) * noise


def standard_normal(shape: tuple[int, ...]) -> Gaussian:
  """N(0, I) with the given shape."""
  return Gaussian(jnp.zeros(shape), jnp.ones(shape))


def task_noise(keys: Key, shape: tuple[int, ...]) -> Array:
  """Standard normal noise [M, *shape], one key [M] per task slot.

  Drawn per slot, so that one device and many draw the same numbers.
  """
  return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
