"""Actor losses. Leading shape [...] throughout."""

import chex
import jax
import jax.numpy as jnp

from offmeta import parallel
from offmeta.types import Array


def softmax_advantage_weights(
  advantage: Array, temperature: float, axis_name: str | None = None
) -> Array:
  """count * softmax(A / temperature) over *all* entries, no gradient.

  As in SMAC's release, one softmax over the whole flattened [tasks x batch],
  over all devices when `axis_name` is given. The weights have mean 1.

  Args:
    advantage: [...], any rank.
    temperature: AWAC's beta, in units of the (scaled) Q function.
    axis_name: collective axis over which tasks are sharded.

  Returns:
    [...], detached.
  """
  logits = jax.lax.stop_gradient(advantage) / temperature
  logits = logits - parallel.pmax(jnp.max(logits), axis_name)
  weights = jnp.exp(logits)
  total = parallel.psum(jnp.sum(weights), axis_name)
  count = advantage.size * parallel.axis_size(axis_name)
  return jax.lax.stop_gradient(weights * (count / total))


def exponential_advantage_weights(
  advantage: Array,
  mask: Array,
  max_weight: float = 20.0,
  temperature: float = 1.0,
  std_eps: float = 0.0,
) -> Array:
  """exp(standardised A / temperature), at most max_weight; no gradient.

  As in MACAW's release, standardised over the batch of one task, with n - 1 in
  the standard deviation. Where that is 0 or unknown (one entry), all weights
  are 1; the release divides by it.

  Args:
    advantage: [..., B], raw; each row is a batch of its own.
    mask: [..., B], 1 where an entry counts.
    max_weight: upper bound of a weight; there is no lower one.
    temperature: divides the standardised advantage.
    std_eps: added to the standard deviation.

  Returns:
    [..., B], detached; of entries that do not count too.

  Raises:
    AssertionError: shapes differ.
  """
  chex.assert_equal_shape([advantage, mask])
  count = jnp.sum(mask, axis=-1, keepdims=True)
  centred = advantage - masked_mean(advantage, mask)[..., None]
  square = jnp.sum(mask * jnp.square(centred), axis=-1, keepdims=True)
  std = jnp.sqrt(square / jnp.maximum(count - 1.0, 1.0)) + std_eps
  scaled = centred / jnp.where(std > 0, std, 1.0) / temperature
  return jax.lax.stop_gradient(
    jnp.exp(jnp.minimum(scaled, jnp.log(max_weight)))
  )


def masked_mean(values: Array, mask: Array) -> Array:
  """Mean [...] of the entries of values [..., B] that count; 0 of none.

  Raises:
    AssertionError: shapes differ.
  """
  chex.assert_equal_shape([values, mask])
  return jnp.sum(mask * values, axis=-1) / jnp.maximum(
    jnp.sum(mask, axis=-1), 1.0
  )


def weighted_log_likelihood(log_prob: Array, weight: Array) -> Array:
  """-w log pi(a|s) [...]; no gradient into w (AWAC, arXiv 2006.09359).

  Raises:
    AssertionError: shapes differ.
  """
  chex.assert_equal_shape([log_prob, weight])
  return -jax.lax.stop_gradient(weight) * log_prob


def clipped_surrogate(
  log_prob: Array, old_log_prob: Array, advantage: Array, clip: float
) -> Array:
  """-min(rho A, clip(rho, 1 - clip, 1 + clip) A) [...] (PPO, equation 7).

  Args:
    log_prob: of the actions, under the policy that is trained, [...].
    old_log_prob: the same under the policy that took them; no gradient.
    advantage: A [...]; no gradient.
    clip: how far the ratio rho may move away from 1 before it stops to pay.

  Raises:
    AssertionError: shapes differ.
  """
  chex.assert_equal_shape([log_prob, old_log_prob, advantage])
  stop = jax.lax.stop_gradient
  ratio = jnp.exp(log_prob - stop(old_log_prob))
  clipped = jnp.clip(ratio, 1.0 - clip, 1.0 + clip)
  return -jnp.minimum(ratio * stop(advantage), clipped * stop(advantage))


def soft_policy(
  log_prob: Array, q_value: Array, temperature: Array | float = 1.0
) -> Array:
  """alpha log pi(a|s) - Q(s, a) [...] (SAC; PEARL has alpha 1).

  Raises:
    AssertionError: shapes differ.
  """
  chex.assert_equal_shape([log_prob, q_value])
  return temperature * log_prob - q_value


def output_penalty(
  mean: Array, log_std: Array, mean_weight: float, log_std_weight: float
) -> Array:
  """Mean squares of an actor's outputs, weighted, as in PEARL's release.

  Args:
    mean, log_std: [...], before the tanh.
    mean_weight, log_std_weight: of each.
  """
  return mean_weight * jnp.mean(jnp.square(mean)) + log_std_weight * jnp.mean(
    jnp.square(log_std)
  )


def soft_value_target(
  log_prob: Array, q_value: Array, temperature: Array | float = 1.0
) -> Array:
  """Q(s, a) - alpha log pi(a|s) [...], no gradient (SAC and PEARL).

  Raises:
    AssertionError: shapes differ.
  """
  chex.assert_equal_shape([log_prob, q_value])
  return jax.lax.stop_gradient(q_value - temperature * log_prob)


def temperature_loss(
  temperature: Array, log_prob: Array, target_entropy: float
) -> Array:
  """-alpha (log pi(a|s) + target entropy) [...] (SAC, arXiv 1812.05905, 6).

  Descending it raises alpha while the entropy is below its target. No
  gradient flows into log pi.

  Args:
    temperature: alpha, [].
    log_prob: [...].
    target_entropy: in nats.

  Raises:
    AssertionError: the temperature is not a scalar.
  """
  chex.assert_rank(temperature, 0)
  return -temperature * jax.lax.stop_gradient(log_prob + target_entropy)
