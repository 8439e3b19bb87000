"""Scalar-valued networks: critics, values, reward decoders."""

from collections.abc import Sequence

from offmeta.networks import base
from offmeta.types import Network


def scalar(
  input_sizes: Sequence[int],
  hidden: Sequence[int],
  hidden_bias: float = 0.0,
  zero_last_bias: bool = False,
) -> Network:
  """apply(params, *inputs [..., .]) -> [...]; last layer in U(+-3e-3).

  With `zero_last_bias` its bias starts at 0.
  """
  body = base.mlp(
    input_sizes, hidden, (base.Head(1, 3e-3, zero_last_bias),), hidden_bias
  )

  def apply(params, *inputs):
    return body.apply(params, *inputs)[..., 0]

  return Network(init=body.init, apply=apply)


def q_ensemble(
  input_sizes: Sequence[int],
  hidden: Sequence[int],
  size: int = 2,
  hidden_bias: float = 0.0,
  zero_last_bias: bool = False,
) -> Network:
  """apply(params, *inputs [..., .]) -> [K, ...], members as `scalar`."""
  return base.ensemble(
    scalar(input_sizes, hidden, hidden_bias, zero_last_bias), size
  )
