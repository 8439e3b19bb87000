"""Temporal-difference targets and errors. Leading shape [...] throughout."""

import chex
import jax
import jax.numpy as jnp

from offmeta.types import Array


def td_target(
  reward: Array,
  discount: Array,
  next_value: Array,
  gamma: float,
  reward_scale: float = 1.0,
) -> Array:
  """reward_scale * r + gamma * discount * V(s'), no gradient.

  As in the releases of SMAC and PEARL.

  Args:
    reward: [...], raw.
    discount: [...], 0 at a true termination.
    next_value: [...].
    gamma: discount factor.
    reward_scale: multiplies the reward here and nowhere else.

  Returns:
    [...], detached.

  Raises:
    AssertionError: shapes differ.
  """
  chex.assert_equal_shape([reward, discount, next_value])
  target = reward_scale * reward + gamma * discount * next_value
  return jax.lax.stop_gradient(target)


def clipped_squared_error(
  prediction: Array, old: Array, target: Array, clip: float
) -> Array:
  """max((V - y)^2, (V_old + clip(V - V_old, -clip, clip) - y)^2) [...].

  PPO's clipped value loss: no gradient once V is further than `clip` from
  V_old on the way to the target. It is in units of the (scaled) return.

  Args:
    prediction: V [...].
    old: V_old [...], before the update; no gradient.
    target: y [...]; no gradient.
    clip: see above.

  Raises:
    AssertionError: shapes differ.
  """
  chex.assert_equal_shape([prediction, old, target])
  old, target = jax.lax.stop_gradient((old, target))
  near = old + jnp.clip(prediction - old, -clip, clip)
  return jnp.maximum(jnp.square(prediction - target), jnp.square(near - target))


def squared_error(prediction: Array, target: Array) -> Array:
  """(prediction - target)^2 [...]; gradients flow into both.

  Raises:
    AssertionError: shapes differ ([B, 1] against [B] never broadcasts).
  """
  chex.assert_equal_shape([prediction, target])
  return jnp.square(prediction - target)


def ensemble_squared_error(predictions: Array, target: Array) -> Array:
  """Sum over members of (Q_k - y)^2.

  Args:
    predictions: [K, ...].
    target: [...].

  Returns:
    [...]; its mean is MSE(Q_1, y) + ... + MSE(Q_K, y).

  Raises:
    AssertionError: predictions[0] and target differ in shape.
  """
  chex.assert_equal_shape([predictions[0], target])
  return jnp.sum(jnp.square(predictions - target[None]), axis=0)
