"""Losses on the posterior over the task latent."""

import chex
import jax.numpy as jnp

from offmeta.types import Array


def kl_to_standard_normal(mean: Array, variance: Array) -> Array:
  """KL(N(mean, variance) || N(0, I)), summed over the latent.

  Closed form 0.5 (s2 + mu^2 - 1 - log s2).

  Args:
    mean: [..., Z].
    variance: [..., Z].

  Returns:
    [...].

  Raises:
    AssertionError: shapes differ.
  """
  chex.assert_equal_shape([mean, variance])
  kl = 0.5 * (variance + jnp.square(mean) - 1.0 - jnp.log(variance))
  return jnp.sum(kl, axis=-1)


def kl_between(
  mean_p: Array, variance_p: Array, mean_q: Array, variance_q: Array
) -> Array:
  """KL(p || q) of diagonal Gaussians [..., Z], summed over the latent [...].

  Raises:
    AssertionError: shapes differ.
  """
  chex.assert_equal_shape([mean_p, variance_p, mean_q, variance_q])
  ratio = variance_p / variance_q
  distance = jnp.square(mean_p - mean_q) / variance_q
  return 0.5 * jnp.sum(ratio + distance - 1.0 - jnp.log(ratio), axis=-1)
