"""Multilayer perceptrons, their initialisers, and ensembles."""

from collections.abc import Sequence
import functools
import math
from typing import NamedTuple

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp

from offmeta.types import Array, Network


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _bfloat16_product(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
  """Two float32 matrices, multiplied over one axis of each -> float32.

  Operands are rounded to bfloat16, sums are float32. The derivatives are
  products of the same kind, so that backward passes of any order multiply
  bfloat16 with bfloat16: jax's own would multiply float32 cotangents with
  bfloat16 operands, which a GPU does in float32. Rounding counts as the
  identity. No forward mode (jvp).
  """
  return lax.dot_general(
    a.astype(jnp.bfloat16),
    b.astype(jnp.bfloat16),
    (((axis_a,), (axis_b,)), ((), ())),
    preferred_element_type=jnp.float32,
  )


def _product_forward(a, b, axis_a, axis_b):
  return _bfloat16_product(a, b, axis_a, axis_b), (a, b)


def _product_backward(axis_a, axis_b, operands, g):
  """Cotangents [like a], [like b] of the result's g [free of a, free of b].

  The axis that g shares with an operand goes where that operand has it: a
  transposed operand gets a transposed cotangent.
  """
  a, b = operands
  free_a, free_b = 1 - axis_a, 1 - axis_b
  if axis_a == 1:
    to_a = _bfloat16_product(g, b, 1, free_b)
  else:
    to_a = _bfloat16_product(b, g, free_b, 1)
  if axis_b == 0:
    to_b = _bfloat16_product(a, g, free_a, 0)
  else:
    to_b = _bfloat16_product(g, a, 0, free_a)
  return to_a, to_b


_bfloat16_product.defvjp(_product_forward, _product_backward)


def product(
  x: Array, kernel: Array, dimension_numbers, precision=None
) -> Array:
  """`lax.dot_general` for the layers of networks: [..., I], [I, O] -> [..., O].

  When traced under `jax.default_matmul_precision('bfloat16')`, operands are
  rounded to bfloat16 and the result is float32, in derivatives too. jax's own
  meaning of that setting depends on the device: it does nothing on a CPU. Any
  other setting is handed on. It belongs around updates only: acting and
  physics stay at float32.

  Args:
    x: [..., I], float32.
    kernel: [I, O], float32.
    dimension_numbers: as `nn.Dense` gives them: last axis of x, first of
      kernel.
    precision: of this product alone; anything but None outdoes the setting.

  Raises:
    ValueError: bfloat16 and other dimension numbers.
  """
  ambient = jax.config.jax_default_matmul_precision
  if ambient != 'bfloat16' or precision is not None:
    return lax.dot_general(x, kernel, dimension_numbers, precision=precision)
  if dimension_numbers != (((x.ndim - 1,), (0,)), ((), ())):
    raise ValueError(
      f'product: dimension numbers {dimension_numbers}; bfloat16 products'
      ' are made for nn.Dense, which contracts the last axis of x with the'
      ' first of kernel'
    )
  rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
  return _bfloat16_product(rows, kernel, 1, 0).reshape(
    x.shape[:-1] + kernel.shape[1:]
  )


# The only linear layer: networks that make an `nn.Dense` of their own would
# escape the setting of the precision.
dense = functools.partial(nn.Dense, dot_general=product)


def uniform(bound: float):
  """Initialiser U(-bound, bound)."""

  def init(key, shape, dtype=jnp.float32):
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init


def orthogonal(key, shape, dtype=jnp.float32):
  """Initialiser: an orthogonal matrix, for one learner after the other.

  jaxlib's batched QR decomposition on a CPU waits inside a thread of XLA's
  pool for other threads of that pool. Learners side by side on as many devices
  as there are cores stood still in it in every second start (jaxlib 0.10.2).
  """
  one = lambda key: nn.initializers.orthogonal()(key, shape, dtype)
  return jax.custom_batching.sequential_vmap(one)(key)


def rlkit_hidden(key, shape, dtype=jnp.float32):
  """Initialiser U(+-1/sqrt(output width)).

  The released PEARL and SMAC code means the input width but reads the first
  axis of a torch weight, which is the output width.
  """
  bound = shape[-1] ** -0.5
  return jax.random.uniform(key, shape, dtype, -bound, bound)


def truncated_normal(key, shape, dtype=jnp.float32):
  """Initialiser: N(0, 1 / (4 inputs)), cut at two standard deviations.

  mbrl-lib's, which UNICORN's decoders start with.
  """
  std = 0.5 * shape[0] ** -0.5
  return std * jax.random.truncated_normal(key, -2.0, 2.0, shape, dtype)


class Head(NamedTuple):
  """A linear layer that is read.

  Attributes:
    size: output width.
    bound: weights and biases start in U(-bound, bound).
    zero_bias: biases start at 0 instead.
  """

  size: int
  bound: float
  zero_bias: bool = False


class MLP(nn.Module):
  """ReLU layers, then linear heads.

  Attributes:
    hidden: widths of the ReLU layers.
    heads: the linear layers after them.
    hidden_bias: value of the hidden biases at the start (0 in rlkit's SMAC,
      0.1 in PEARL's first release).
    start: 'rlkit', all as above and in `rlkit_hidden`; or 'truncated_normal'
      for all weights, with biases of 0.
  """

  hidden: Sequence[int]
  heads: Sequence[Head]
  hidden_bias: float = 0.0
  start: str = 'rlkit'

  @nn.compact
  def __call__(self, *inputs):
    rlkit, zeros = self.start == 'rlkit', nn.initializers.zeros
    x = jnp.concatenate(inputs, axis=-1)
    for width in self.hidden:
      x = nn.relu(
        dense(
          width,
          kernel_init=rlkit_hidden if rlkit else truncated_normal,
          bias_init=nn.initializers.constant(self.hidden_bias)
          if rlkit
          else zeros,
        )(x)
      )
    outputs = tuple(
      dense(
        head.size,
        kernel_init=uniform(head.bound) if rlkit else truncated_normal,
        bias_init=uniform(head.bound)
        if rlkit and not head.zero_bias
        else zeros,
      )(x)
      for head in self.heads
    )
    return outputs[0] if len(outputs) == 1 else outputs


def mlp(
  input_sizes: Sequence[int],
  hidden: Sequence[int],
  heads: Sequence[Head | tuple[int, float]],
  hidden_bias: float = 0.0,
  start: str = 'rlkit',
) -> Network:
  """A perceptron over the concatenation of its inputs.

  Args:
    input_sizes: last-axis size of each input.
    hidden: widths of the ReLU layers.
    heads: one per output.
    hidden_bias: initial hidden biases.
    start: of weights and biases, see `MLP`.

  Returns:
    A Network; apply(params, *inputs [..., input_sizes[i]]) gives [..., width]
    for one head and a tuple of them for several.

  Raises:
    ValueError: an unknown start.
  """
  if start not in ('rlkit', 'truncated_normal'):
    raise ValueError(f'start={start!r}; choose "rlkit" or "truncated_normal"')
  heads = tuple(Head(*head) for head in heads)
  module = MLP(tuple(hidden), heads, hidden_bias, start)

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
