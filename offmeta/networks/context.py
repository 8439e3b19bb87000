"""Encoders of a set of transitions into a Gaussian over the task latent."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from offmeta.networks import base
from offmeta.networks.distributions import Gaussian
from offmeta.types import Array, Network, Transition

MIN_VARIANCE = 1e-7


def product_of_gaussians(
    mean: Array, variance: Array, mask: Array
) -> Gaussian:
  """Product of N independent Gaussian factors, without a prior factor.

  Specs: smac 2.1 "Posterior", PEARL A1.2.

  Args:
    mean: [..., N, Z].
    variance: [..., N, Z], clipped below at 1e-7.
    mask: [..., N], 0 removes a factor. With every factor removed the result
      is the prior N(0, I).

  Returns:
    Gaussian [..., Z].
  """
  precision = mask[..., None] / jnp.maximum(variance, MIN_VARIANCE)
  total = jnp.sum(precision, axis=-2)
  # No factor at all: precision 1 and mean 0, the prior.
  empty = jnp.logical_not(jnp.any(mask > 0, axis=-1))[..., None]
  total = jnp.where(empty, 1.0, total)
  return Gaussian(jnp.sum(precision * mean, axis=-2) / total, 1.0 / total)


def set_encoder(
    observation_size: int,
    action_size: int,
    latent_size: int,
    hidden: Sequence[int],
    use_next_observation: bool = False,
    hidden_bias: float = 0.0,
) -> Network:
  """apply(params, context [..., N], mask [..., N]) -> Gaussian [..., Z].

  One perceptron per transition on (observation, action, raw reward), plus the
  next observation for dynamics families; variance = softplus(raw).
  """
  sizes = [observation_size, action_size, 1]
  if use_next_observation:
    sizes.append(observation_size)
  body = base.mlp(sizes, hidden, ((2 * latent_size, 3e-3),), hidden_bias)

  def apply(params, context: Transition, mask: Array) -> Gaussian:
    inputs = [context.observation, context.action, context.reward[..., None]]
    if use_next_observation:
      inputs.append(context.next_observation)
    mean, raw = jnp.split(body.apply(params, *inputs), 2, axis=-1)
    return product_of_gaussians(mean, jax.nn.softplus(raw), mask)

  return Network(init=body.init, apply=apply)
