"""Advantages of steps in the order in which they took place."""

import chex
import jax
import jax.numpy as jnp

from offmeta import parallel
from offmeta.types import Array


def generalized(
  reward: Array,
  discount: Array,
  ends: Array,
  value: Array,
  next_value: Array,
  gamma: float,
  decay: float,
) -> Array:
  """GAE(gamma, lambda), no gradient (arXiv 1506.02438, equation 16).

  A_t = delta_t + gamma lambda A_{t+1}, without the second term where an episode
  ends and after the last step, where the rest is V(s') alone:
  delta = r + gamma discount V(s') - V(s). At a time limit the discount is 1 and
  s' the true last observation, so that it is bootstrapped there.

  Args:
    reward: [..., T].
    discount: [..., T], 0 at a true termination.
    ends: [..., T], 1 where an episode ends, for whatever reason.
    value: V(s) [..., T].
    next_value: V(s') [..., T].
    gamma: discount factor.
    decay: lambda; 0: one step, 1: discounted sums to the end.

  Returns:
    [..., T], detached.

  Raises:
    AssertionError: shapes differ.
  """
  chex.assert_equal_shape([reward, discount, ends, value, next_value])
  delta = reward + gamma * discount * next_value - value

  def step(later, row):
    delta, end = row
    advantage = delta + gamma * decay * (1.0 - end) * later
    return advantage, advantage

  in_front = lambda x: jnp.moveaxis(x, -1, 0)
  _, advantage = jax.lax.scan(
    step,
    jnp.zeros_like(delta[..., 0]),
    (in_front(delta), in_front(ends)),
    reverse=True,
  )
  return jax.lax.stop_gradient(jnp.moveaxis(advantage, 0, -1))


def standardise(
  advantage: Array, axis_name: str | None = None, eps: float = 1e-8
) -> Array:
  """(A - mean) / (std + eps) over all entries of all devices, no gradient.

  Args:
    advantage: [...], any rank; as many on every device.
    axis_name: device axis.
    eps: added to the standard deviation, which divides by n.
  """
  mean = parallel.pmean(jnp.mean(advantage), axis_name)
  centred = advantage - mean
  variance = parallel.pmean(jnp.mean(jnp.square(centred)), axis_name)
  return jax.lax.stop_gradient(centred / (jnp.sqrt(variance) + eps))
