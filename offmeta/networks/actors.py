"""Policies."""

from collections.abc import Sequence

import jax.numpy as jnp

from offmeta.networks import base
from offmeta.networks.distributions import TANH_NORMALS, Normal
from offmeta.types import Network

MIN_LOG_STD = -20.0


def tanh_gaussian_actor(
  input_sizes: Sequence[int],
  action_size: int,
  hidden: Sequence[int],
  hidden_bias: float = 0.0,
  zero_last_bias: bool = False,
  max_log_std: float = 2.0,
  tanh_correction: str = 'exact',
) -> Network:
  """apply(params, *inputs [..., .]) -> TanhNormal [..., A].

  State-dependent log standard deviation, clipped below at -20; heads start in
  U(+-1e-3), as in SMAC's release.

  Args:
    input_sizes: last-axis size of each input.
    action_size: A.
    hidden: widths of the ReLU layers.
    hidden_bias: initial hidden biases.
    zero_last_bias: the mean's bias starts at 0 (that of log-std does not, as in
      SMAC's release).
    max_log_std: log-std is clipped above at this.
    tanh_correction: key of `distributions.TANH_NORMALS`.

  Raises:
    ValueError: an unknown correction.
  """
  if tanh_correction not in TANH_NORMALS:
    raise ValueError(
      f'tanh_correction={tanh_correction!r}; choose one of'
      f' {tuple(TANH_NORMALS)}'
    )
  distribution = TANH_NORMALS[tanh_correction]
  heads = (
    base.Head(action_size, 1e-3, zero_last_bias),
    base.Head(action_size, 1e-3),
  )
  body = base.mlp(input_sizes, hidden, heads, hidden_bias)

  def apply(params, *inputs):
    mean, log_std = body.apply(params, *inputs)
    return distribution(mean, jnp.clip(log_std, MIN_LOG_STD, max_log_std))

  return Network(init=body.init, apply=apply)


def gaussian_actor(
  input_sizes: Sequence[int],
  action_size: int,
  hidden: Sequence[int],
  initial_std: float,
) -> Network:
  """apply(params, *inputs [..., .]) -> Normal [..., A].

  The mean is squashed into [-1, 1], samples are not. One standard deviation per
  action, the same in all states, starts at `initial_std` and is learnt.
  """
  body = base.mlp(input_sizes, hidden, ((action_size, 1e-3),))

  def init(key):
    log_std = jnp.full((action_size,), jnp.log(jnp.float32(initial_std)))
    return {'mean': body.init(key), 'log_std': log_std}

  def apply(params, *inputs):
    mean = jnp.tanh(body.apply(params['mean'], *inputs))
    std = jnp.broadcast_to(jnp.exp(params['log_std']), mean.shape)
    return Normal(mean, std)

  return Network(init=init, apply=apply)
