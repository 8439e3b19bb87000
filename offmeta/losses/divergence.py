"""The divergence from the behaviour policy, estimated by a dual critic.

BRAC (arXiv 1911.11361) as FOCAL uses it: a critic
c(s, a, z) tells the policy's actions from logged ones. Leading shape [...]
throughout.
"""

import chex
import jax
import jax.numpy as jnp

from offmeta.types import Array


def dual_kl(logged: Array, own: Array) -> Array:
  """Dhat = -softplus(c(a_logged)) + log(softplus(c(a_own)) + 1e-8) + 1.

  Its mean, maximised over c, is KL(policy || behaviour). Gradients flow into
  both arguments.

  Args:
    logged: [...], c at the logged action.
    own: [...], c at an action of the policy, in the same state.

  Returns:
    [...].

  Raises:
    AssertionError: shapes differ.
  """
  chex.assert_equal_shape([logged, own])
  return 1.0 - jax.nn.softplus(logged) + jnp.log(jax.nn.softplus(own) + 1e-8)


def slope_penalty(slope: Array) -> Array:
  """max(|slope| - 1, 0)^2 with |slope| = sqrt(1e-8 + sum of squares).

  Args:
    slope: [..., K], the gradient of c in a mixed action; in the released code
      the value of c itself, K = 1.

  Returns:
    [...].
  """
  norm = jnp.sqrt(1e-8 + jnp.sum(jnp.square(slope), axis=-1))
  return jnp.square(jnp.maximum(norm - 1.0, 0.0))


def next_weight(
  weight: Array, divergence: Array, target: float, rate: float
) -> Array:
  """Dual ascent on alpha (Dhat - target): alpha + rate * (Dhat - target).

  It is not bounded here; users clip what they use, as released.

  Args:
    weight: alpha, [].
    divergence: mean of Dhat, [].
    target: the divergence at which alpha stays.
    rate: step size.

  Raises:
    AssertionError: not scalars.
  """
  chex.assert_rank([weight, divergence], 0)
  return weight + rate * jax.lax.stop_gradient(divergence - target)
