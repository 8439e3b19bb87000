"""Networks made for one step of gradient descent (MACAW).

A network has *parameters*, which are trained, and *weights*, the kernel and
bias of each layer, which it computes with; `generate` makes weights of
parameters. In the weight-transform layer the weights of d_in * d_out + d_out
entries are H z + b, with a latent z and a matrix H of 100 times their size.

A gradient step on z, H and b needs no new H: with G the loss' gradient in the
weights and steps a,

  z' = z - a_z H^T G,  H' = H - a_H G z^T,  b' = b - a_b G,
  H' z' + b' = H z' + b - (a_H z.z' + a_b) G,

so that tasks which are adapted side by side share one H. `step` computes this
exactly and can be differentiated, to any order by reverse mode.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from offmeta.networks import base
from offmeta.types import Array, Params

Weights = Any  # pytree of {'kernel': [I, O], 'bias': [O]}


class Layer(NamedTuple):
  """A linear layer, or several.

  Attributes:
    init: (key) -> params, dicts of tensors.
    generate: (params) -> weights.
    step: (params, gradient, steps) -> weights. `gradient` is the gradient of
      a loss in the weights, `steps` has the tree of the parameters and scalar
      leaves. The result is `generate(params - steps * (gradient of the loss
      in the parameters))`.
  """

  init: Callable[..., Params]
  generate: Callable[..., Weights]
  step: Callable[..., Weights]


class AdaptableNetwork(NamedTuple):
  """A network of such layers.

  Attributes:
    init, generate, step: see `Layer`.
    apply_generated: (weights, *inputs) -> outputs.
  """

  init: Callable[..., Params]
  generate: Callable[..., Weights]
  step: Callable[..., Weights]
  apply_generated: Callable[..., Any]

  def apply(self, params: Params, *inputs) -> Any:
    """Outputs under parameters; generate once where they are used often."""
    return self.apply_generated(self.generate(params), *inputs)


def _times(x: Array, kernel: Array) -> Array:
  """[..., I] times [I, O]."""
  return base.product(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


def wlinear(inputs: int, outputs: int, latent_size: int) -> Layer:
  """The weight-transform layer (MACAW).

  Latent ~ N(0, 1/outputs^2); kernel (H, [Z, P]) and bias (b, [P]) ~
  U(+-1/sqrt(Z)), with P = inputs * outputs + outputs.
  """
  size = inputs * outputs
  uniform = base.uniform(latent_size**-0.5)

  def init(key):
    keys = jax.random.split(key, 3)
    return {
      'latent': jax.random.normal(keys[0], (latent_size,)) / outputs,
      'kernel': uniform(keys[1], (latent_size, size + outputs)),
      'bias': uniform(keys[2], (size + outputs,)),
    }

  def unpack(flat):
    return {'kernel': flat[:size].reshape(inputs, outputs), 'bias': flat[size:]}

  def generate(params):
    return unpack(_times(params['latent'], params['kernel']) + params['bias'])

  def step(params, gradient, steps):
    flat = jnp.append(gradient['kernel'], gradient['bias'])
    latent = params['latent'] - steps['latent'] * _times(
      flat, params['kernel'].T
    )
    along = steps['kernel'] * jnp.sum(latent * params['latent'])
    return unpack(
      _times(latent, params['kernel'])
      + params['bias']
      - (along + steps['bias']) * flat
    )

  return Layer(init, generate, step)


def bias_linear(inputs: int, outputs: int, latent_size: int = 0) -> Layer:
  """A linear layer with a transformed extra bias (an ablation of MACAW).

  y = x W + b + u U: latent u ~ N(0, 1/outputs^2), transform U [O, O] Xavier
  normal, W and b torch's default. `latent_size` is not used.
  """
  del latent_size
  plain = dense(inputs, outputs)

  def init(key):
    keys = jax.random.split(key, 3)
    return {
      'latent': jax.random.normal(keys[0], (outputs,)) / outputs,
      'transform': jax.nn.initializers.normal(outputs**-0.5)(
        keys[1], (outputs, outputs)
      ),
      **plain.init(keys[2]),
    }

  def generate(params):
    extra = _times(params['latent'], params['transform'])
    return {'kernel': params['kernel'], 'bias': params['bias'] + extra}

  def step(params, gradient, steps):
    latent = params['latent'] - steps['latent'] * _times(
      gradient['bias'], params['transform'].T
    )
    along = steps['transform'] * jnp.sum(latent * params['latent'])
    new = plain.step(params, gradient, steps)
    extra = _times(latent, params['transform']) - along * gradient['bias']
    return {'kernel': new['kernel'], 'bias': new['bias'] + extra}

  return Layer(init, generate, step)


def dense(inputs: int, outputs: int, latent_size: int = 0) -> Layer:
  """A plain linear layer, all in U(+-1/sqrt(inputs)) as torch's default.

  `latent_size` is not used.
  """
  del latent_size
  uniform = base.uniform(inputs**-0.5)

  def init(key):
    keys = jax.random.split(key)
    return {
      'kernel': uniform(keys[0], (inputs, outputs)),
      'bias': uniform(keys[1], (outputs,)),
    }

  def step(params, gradient, steps):
    return {
      name: params[name] - steps[name] * gradient[name]
      for name in ('kernel', 'bias')
    }

  return Layer(init, lambda params: params, step)


LAYERS = {'wlinear': wlinear, 'bias_linear': bias_linear, 'dense': dense}


def only_latent(steps: Params) -> Params:
  """Step sizes with 0 for all but the layers' latents."""
  return jax.tree.map_with_path(
    lambda path, x: x if path[-1].key == 'latent' else jnp.zeros_like(x), steps
  )


def _stack(sizes: Sequence[int], layer: str, latent_size: int) -> Layer:
  """Layers between consecutive sizes; trees are tuples."""
  if layer not in LAYERS:
    raise ValueError(f'no layer {layer!r}; choose one of {", ".join(LAYERS)}')
  layers = [LAYERS[layer](i, o, latent_size) for i, o in zip(sizes, sizes[1:])]

  def init(key):
    return tuple(
      part.init(jax.random.fold_in(key, i)) for i, part in enumerate(layers)
    )

  def generate(params):
    return tuple(part.generate(p) for part, p in zip(layers, params))

  def step(params, gradient, steps):
    return tuple(
      part.step(*given) for part, *given in zip(layers, params, gradient, steps)
    )

  return Layer(init, generate, step)


def _affine(weights: Weights, x: Array) -> Array:
  return _times(x, weights['kernel']) + weights['bias']


def _forward(weights: Weights, x: Array) -> tuple[Array, Array]:
  """ReLU layers and a linear one: (output, last hidden layer before ReLU)."""
  hidden = x
  for layer in weights[:-1]:
    hidden = _affine(layer, x)
    x = jax.nn.relu(hidden)
  return _affine(weights[-1], x), hidden


def value_network(
  input_size: int,
  hidden: Sequence[int],
  layer: str = 'wlinear',
  latent_size: int = 100,
) -> AdaptableNetwork:
  """apply_generated(weights, x [..., I]) -> [...] (MACAW's value).

  Args:
    input_size: I.
    hidden: widths of the ReLU layers.
    layer: key of `LAYERS`.
    latent_size: of a weight-transform layer.

  Raises:
    ValueError: there is no such layer.
  """
  stack = _stack((input_size, *hidden, 1), layer, latent_size)
  return AdaptableNetwork(
    *stack, lambda weights, x: _forward(weights, x)[0][..., 0]
  )


def policy_network(
  input_size: int,
  action_size: int,
  hidden: Sequence[int],
  head_hidden: int = 0,
  layer: str = 'wlinear',
  latent_size: int = 100,
  relu_on_action: bool = True,
) -> AdaptableNetwork:
  """A mean action, and a head that predicts advantages (MACAW's policy).

  `apply_generated(weights, x [..., I])` gives tanh means [..., A];
  `apply_generated(weights, x, action [..., A])` gives (means, advantages
  [...]). The head reads the last hidden layer before its ReLU, beside the
  action.

  Args:
    input_size: I.
    action_size: A.
    hidden: widths of the ReLU layers.
    head_hidden: width of the head's ReLU layer; 0: no head.
    layer: key of `LAYERS`.
    latent_size: of a weight-transform layer.
    relu_on_action: the released head puts a ReLU over its whole input, so
      that it does not see negative actions; False: over the hidden layer only.

  Raises:
    ValueError: there is no such layer.
  """
  stacks = {
    'trunk': _stack((input_size, *hidden, action_size), layer, latent_size)
  }
  if head_hidden:
    stacks['head'] = _stack(
      (hidden[-1] + action_size, head_hidden, 1), layer, latent_size
    )

  def init(key):
    return {
      name: stack.init(jax.random.fold_in(key, i))
      for i, (name, stack) in enumerate(stacks.items())
    }

  def generate(params):
    return {name: stacks[name].generate(params[name]) for name in stacks}

  def step(params, gradient, steps):
    return {
      name: stack.step(params[name], gradient[name], steps[name])
      for name, stack in stacks.items()
    }

  def apply(weights, x, action=None):
    mean, hidden = _forward(weights['trunk'], x)
    mean = jnp.tanh(mean)
    if action is None:
      return mean
    read = jax.nn.relu(hidden)
    seen = jax.nn.relu(action) if relu_on_action else action
    advantage, _ = _forward(
      weights['head'], jnp.concatenate([read, seen], axis=-1)
    )
    return mean, advantage[..., 0]

  return AdaptableNetwork(init, generate, step, apply)
