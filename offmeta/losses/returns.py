"""Monte-Carlo returns of logged episodes."""

import chex
import jax
import jax.numpy as jnp

from offmeta.types import Array, Transition


def annotate(
  log: Transition, valid: Array, discount: float
) -> dict[str, Array]:
  """What is known about the rest of each step's episode.

  An episode begins where `extras['time']` is 0 and ends before the next
  one, or with the log: what follows the log's end is not known.

  Args:
    log: leaves [W, ...], in the order in which steps took place; extras hold
      'time' [W], the step within the episode.
    valid: [W], 1 where the log holds a step, a prefix of ones.
    discount: gamma.

  Returns:
    Leaves [W, ...] to add to the extras, 0 where nothing is valid:
    'return_to_go' (mc), the discounted sum of rewards to the episode's end;
    'last_observation' [W, O], the next observation of the episode's last
    step; 'bootstrap' (Gamma), gamma to the power of the steps that remain,
    this one included, so that mc + Gamma V(last_observation) bootstraps;
    'last_discount', 0 if the episode ended in a true termination, else 1.
  """
  valid = valid > 0
  follows = jnp.append(valid[1:] & (log.extras['time'][1:] > 0), False)

  def step(carry, row):
    reward, next_observation, end_discount, goes_on = row
    value, power, last, last_discount = carry
    value = reward + discount * jnp.where(goes_on, value, 0.0)
    power = discount * jnp.where(goes_on, power, 1.0)
    last = jnp.where(goes_on, last, next_observation)
    last_discount = jnp.where(goes_on, last_discount, end_discount)
    new = (value, power, last, last_discount)
    return new, new

  start = (
    jnp.zeros(()),
    jnp.ones(()),
    jnp.zeros_like(log.next_observation[0]),
    jnp.ones(()),
  )
  _, rows = jax.lax.scan(
    step,
    start,
    (log.reward, log.next_observation, log.discount, follows),
    reverse=True,
  )
  names = ('return_to_go', 'bootstrap', 'last_observation', 'last_discount')
  return {
    name: jnp.where(valid.reshape((-1,) + (1,) * (leaf.ndim - 1)), leaf, 0.0)
    for name, leaf in zip(names, rows)
  }


def bootstrapped(
  return_to_go: Array, bootstrap: Array, last_value: Array
) -> Array:
  """mc + Gamma V(s_T), no gradient (as MACAW's release computes targets).

  Args:
    return_to_go: mc [...].
    bootstrap: Gamma [...], 0 where nothing is added.
    last_value: V(s_T) [...].

  Returns:
    [...], detached.

  Raises:
    AssertionError: shapes differ.
  """
  chex.assert_equal_shape([return_to_go, bootstrap, last_value])
  return jax.lax.stop_gradient(return_to_go + bootstrap * last_value)
