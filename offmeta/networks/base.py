"""Multilayer perceptrons, their initialisers, and ensembles."""

from collections.abc import Sequence

from flax import linen as nn
import jax
import jax.numpy as jnp

from offmeta.types import Network


def uniform(bound: float):
  """Initialiser U(-bound, bound)."""

  def init(key, shape, dtype=jnp.float32):
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init


def rlkit_hidden(key, shape, dtype=jnp.float32):
  """Initialiser U(+-1/sqrt(output width)).

  The released PEARL and SMAC code means the input width but reads the first
  axis of a torch weight, which is the output width (specs: smac 2.1, A1.1).
  """
  bound = shape[-1] ** -0.5
  return jax.random.uniform(key, shape, dtype, -bound, bound)


class MLP(nn.Module):
  """ReLU layers, then linear heads.

  Attributes:
    hidden: widths of the ReLU layers.
    heads: (output width, bound) per linear head; weights and biases of a
      head are drawn from U(-bound, bound).
    hidden_bias: value of the hidden biases at the start (0 in rlkit's SMAC,
      0.1 in PEARL's first release).
  """

  hidden: Sequence[int]
  heads: Sequence[tuple[int, float]]
  hidden_bias: float = 0.0

  @nn.compact
  def __call__(self, *inputs):
    x = jnp.concatenate(inputs, axis=-1)
    for width in self.hidden:
      bias = nn.initializers.constant(self.hidden_bias)
      x = nn.relu(nn.Dense(width, kernel_init=rlkit_hidden, bias_init=bias)(x))
    outputs = tuple(
        nn.Dense(size, kernel_init=uniform(bound), bias_init=uniform(bound))(x)
        for size, bound in self.heads
    )
    return outputs[0] if len(outputs) == 1 else outputs


def mlp(
    input_sizes: Sequence[int],
    hidden: Sequence[int],
    heads: Sequence[tuple[int, float]],
    hidden_bias: float = 0.0,
) -> Network:
  """A perceptron over the concatenation of its inputs.

  Args:
    input_sizes: last-axis size of each input.
    hidden: widths of the ReLU layers.
    heads: (width, initial bound) per output.
    hidden_bias: initial hidden biases.

  Returns:
    A Network; apply(params, *inputs [..., input_sizes[i]]) gives [..., width]
    for one head and a tuple of them for several.
  """
  module = MLP(tuple(hidden), tuple(heads), hidden_bias)

  def init(key):
    return module.init(key, *[jnp.zeros((size,)) for size in input_sizes])

  return Network(init=init, apply=module.apply)


def ensemble(network: Network, size: int) -> Network:
  """`size` copies of a network with their own parameters.

  Parameters are a tuple of `size` trees and the members run one after the
  other: separate matrix products are faster on CPU than one batched product.
  Outputs are stacked in front: [K, ...].
  """

  def init(key):
    return tuple(network.init(k) for k in jax.random.split(key, size))

  def apply(params, *inputs):
    return jnp.stack([network.apply(p, *inputs) for p in params])

  return Network(init=init, apply=apply)
