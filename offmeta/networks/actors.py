"""Policies."""

from collections.abc import Sequence

import jax.numpy as jnp

from offmeta.networks import base
from offmeta.networks.distributions import Normal, TanhNormal
from offmeta.types import Network

LOG_STD_RANGE = (-20.0, 2.0)


def tanh_gaussian_actor(
  input_sizes: Sequence[int],
  action_size: int,
  hidden: Sequence[int],
  hidden_bias: float = 0.0,
) -> Network:
  """apply(params, *inputs [..., .]) -> TanhNormal [..., A].

  State-dependent log standard deviation, clipped to [-20, 2]; heads start in
  U(+-1e-3) (spec smac 2.1).
  """
  heads = ((action_size, 1e-3), (action_size, 1e-3))
  body = base.mlp(input_sizes, hidden, heads, hidden_bias)

  def apply(params, *inputs):
    mean, log_std = body.apply(params, *inputs)
    return TanhNormal(mean, jnp.clip(log_std, *LOG_STD_RANGE))

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
