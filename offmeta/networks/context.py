"""Encoders of a set of transitions into a task latent, and models of it."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from offmeta.networks import base
from offmeta.networks.distributions import Gaussian
from offmeta.types import Array, Network, Transition

MIN_VARIANCE = 1e-7
_VARIANCE_RANGE = (0.1, 10.0)  # of `transition_encoder`'s own noise
_LOG_VARIANCE_BOUNDS = (-10.0, 0.5)  # of `gaussian_model`, at the start


def product_of_gaussians(mean: Array, variance: Array, mask: Array) -> Gaussian:
  """Product of N independent Gaussian factors, without a prior factor.

  As in the releases of PEARL and SMAC.

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


def masked_mean(points: Array, mask: Array) -> Array:
  """Mean [..., Z] of the points [..., N, Z] that count; 0 of none.

  Args:
    points: [..., N, Z].
    mask: [..., N].
  """
  count = jnp.sum(mask, axis=-1)[..., None]
  return jnp.sum(mask[..., None] * points, axis=-2) / jnp.maximum(count, 1.0)


def _columns(
  context: Transition, use_next_observation: bool, use_terminal: bool = False
) -> list[Array]:
  """What an encoder reads of each transition."""
  columns = [context.observation, context.action, context.reward[..., None]]
  if use_next_observation:
    columns.append(context.next_observation)
  if use_terminal:
    columns.append(1.0 - context.discount[..., None])
  return columns


def set_encoder(
  observation_size: int,
  action_size: int,
  latent_size: int,
  hidden: Sequence[int],
  use_next_observation: bool = False,
  hidden_bias: float = 0.0,
  zero_last_bias: bool = False,
) -> Network:
  """apply(params, context [..., N], mask [..., N]) -> Gaussian [..., Z].

  One perceptron per transition on (observation, action, raw reward), plus the
  next observation for dynamics families; variance = softplus(raw). With
  `zero_last_bias` the biases of its last layer start at 0.
  """
  sizes = [observation_size, action_size, 1]
  if use_next_observation:
    sizes.append(observation_size)
  head = base.Head(2 * latent_size, 3e-3, zero_last_bias)
  body = base.mlp(sizes, hidden, (head,), hidden_bias)

  def apply(params, context: Transition, mask: Array) -> Gaussian:
    inputs = _columns(context, use_next_observation)
    mean, raw = jnp.split(body.apply(params, *inputs), 2, axis=-1)
    return product_of_gaussians(mean, jax.nn.softplus(raw), mask)

  return Network(init=body.init, apply=apply)


def transition_encoder(
  observation_size: int,
  action_size: int,
  latent_size: int,
  hidden: Sequence[int],
  use_next_observation: bool = False,
  use_terminal: bool = False,
  stochastic: bool = False,
  hidden_bias: float = 0.0,
) -> Network:
  """apply(params, context [..., N], noise [..., N, Z]) -> [..., N, Z].

  A point in (-1, 1) for each transition; `masked_mean` makes them one latent.
  FOCAL and CSRO: tanh of a perceptron; the noise is not read. UNICORN,
  `stochastic`: tanh of a sample around it, with one
  learned variance per dimension, which starts at 1 and is clipped to
  [0.1, 10].
  """
  sizes = [observation_size, action_size, 1]
  sizes += [observation_size] * use_next_observation + [1] * use_terminal
  head = base.Head(latent_size, 3e-3)
  body = base.mlp(sizes, hidden, (head,), hidden_bias)

  def init(key):
    params = {'point': body.init(key)}
    if stochastic:
      params['log_variance'] = jnp.zeros((latent_size,))
    return params

  def apply(params, context: Transition, noise: Array) -> Array:
    inputs = _columns(context, use_next_observation, use_terminal)
    point = body.apply(params['point'], *inputs)
    if stochastic:
      variance = jnp.clip(jnp.exp(params['log_variance']), *_VARIANCE_RANGE)
      point += jnp.sqrt(variance) * noise
    return jnp.tanh(point)

  return Network(init=init, apply=apply)


def bounded_gaussian(
  input_sizes: Sequence[int],
  output_size: int,
  hidden: Sequence[int],
  hidden_bias: float = 0.0,
) -> Network:
  """apply(params, *inputs [..., .]) -> Gaussian [..., output_size].

  CSRO's p(z | s, a), as released: mean = tanh(raw), variance =
  softplus(tanh(raw)), between 0.31 and 1.31.
  """
  body = base.mlp(
    input_sizes, hidden, (base.Head(2 * output_size, 3e-3),), hidden_bias
  )

  def apply(params, *inputs) -> Gaussian:
    mean, raw = jnp.split(jnp.tanh(body.apply(params, *inputs)), 2, axis=-1)
    return Gaussian(mean, jax.nn.softplus(raw))

  return Network(init=body.init, apply=apply)


def gaussian_model(
  input_sizes: Sequence[int],
  output_size: int,
  hidden: Sequence[int],
  hidden_bias: float = 0.0,
  start: str = 'rlkit',
) -> Network:
  """apply(params, *inputs [..., .]) -> (Gaussian [..., output_size], spread).

  UNICORN's decoder, as released: the log-variance is squeezed softly
  between bounds that are learned too, one pair per output; spread [] is the
  sum of (upper - lower), which a loss should keep small. `start`: see
  `base.MLP`.
  """
  body = base.mlp(
    input_sizes, hidden, (base.Head(2 * output_size, 3e-3),), hidden_bias, start
  )
  low, high = _LOG_VARIANCE_BOUNDS

  def init(key):
    return {
      'body': body.init(key),
      'low': jnp.full((output_size,), low, jnp.float32),
      'high': jnp.full((output_size,), high, jnp.float32),
    }

  def apply(params, *inputs):
    mean, raw = jnp.split(body.apply(params['body'], *inputs), 2, axis=-1)
    # high - softplus(high - x), then low + softplus(x - low); the gradient in
    # a bound that is far away would cancel if written so.
    raw = -jnp.logaddexp(-params['high'], -raw)
    raw = jnp.logaddexp(params['low'], raw)
    spread = jnp.sum(params['high'] - params['low'])
    return Gaussian(mean, jnp.exp(raw)), spread

  return Network(init=init, apply=apply)
