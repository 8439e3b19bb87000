"""A recurrent belief over the task, and the decoder that trains it.

After VariBAD (arXiv 1910.08348) and BOReL's release. All
layers but the GRU's start like PyTorch's: U(+-1/sqrt(inputs)), biases too. The
embedding of a reward needs that: with zero biases it would only tell its sign
from its size.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp

from offmeta.networks import base
from offmeta.types import Array, Key, Network, Params


class BeliefEncoder(NamedTuple):
  """A GRU over steps, and the Gaussian that its state stands for.

  Attributes:
    init: (key) -> params.
    advance: (params, hidden [..., H], next observation [..., T, O], action
      [..., T, A], reward [..., T], mask [..., T]) -> hidden state [..., T, H]
      after each step; where the mask is 0 it stays what it was. The history
      begins with a state of zeros.
    read: (params, hidden [..., H]) -> mean and log-variance, [..., 2 Z].
  """

  init: Callable[[Key], Params]
  advance: Callable[..., Array]
  read: Callable[[Params, Array], Array]


def _linear(width: int, num_inputs: int, use_bias: bool = True) -> nn.Module:
  start = base.uniform(num_inputs**-0.5)
  return base.dense(
    width, use_bias=use_bias, kernel_init=start, bias_init=start
  )


class _Embed(nn.Module):
  """relu(W_i x_i + b_i) of each input, concatenated."""

  widths: Sequence[int]

  @nn.compact
  def __call__(self, *inputs):
    return jnp.concatenate(
      [
        nn.relu(_linear(width, x.shape[-1])(x))
        for width, x in zip(self.widths, inputs, strict=True)
      ],
      axis=-1,
    )


def _gru_cell(gates: Array, from_hidden: Array, hidden: Array) -> Array:
  """One step, as PyTorch has it.

  r = s(x_r + h_r), u = s(x_u + h_u), n = tanh(x_n + r * h_n), and the result is
  (1 - u) n + u h.

  Args:
    gates: (x_r, x_u, x_n) [..., 3 H], a linear layer of the input.
    from_hidden: (h_r, h_u, h_n) [..., 3 H], a linear layer of the state.
    hidden: h [..., H].
  """
  x_reset, x_update, x_new = jnp.split(gates, 3, axis=-1)
  h_reset, h_update, h_new = jnp.split(from_hidden, 3, axis=-1)
  reset = jax.nn.sigmoid(x_reset + h_reset)
  update = jax.nn.sigmoid(x_update + h_update)
  new = jnp.tanh(x_new + reset * h_new)
  return (1.0 - update) * new + update * hidden


def belief_encoder(
  observation_size: int,
  action_size: int,
  latent_size: int,
  hidden_size: int,
  embedding_sizes: Sequence[int],
) -> BeliefEncoder:
  """The encoder q(z | history).

  Embeddings and input gates of all steps are computed at once; only the
  recurrent product runs step by step.

  Args:
    observation_size: O, with all that is appended to it.
    action_size: A.
    latent_size: Z.
    hidden_size: H; both weights of the GRU start orthogonal, biases at 0.
    embedding_sizes: widths for next observation, action and reward.
  """
  embed = _Embed(tuple(embedding_sizes))
  gate = lambda: base.dense(3 * hidden_size, kernel_init=base.orthogonal)
  modules = {
    'embed': (embed, (observation_size, action_size, 1)),
    'input': (gate(), (sum(embedding_sizes),)),
    'recurrent': (gate(), (hidden_size,)),
    'heads': (_linear(2 * latent_size, hidden_size), (hidden_size,)),
  }

  def init(key):
    return {
      name: module.init(
        jax.random.fold_in(key, i), *[jnp.zeros((n,)) for n in sizes]
      )
      for i, (name, (module, sizes)) in enumerate(modules.items())
    }

  def run(params, name, *inputs):
    return modules[name][0].apply(params[name], *inputs)

  def advance(params, hidden, next_observation, action, reward, mask):
    inputs = run(params, 'embed', next_observation, action, reward[..., None])
    gates = run(params, 'input', inputs)

    def step(hidden, at):
      gates, counts = at
      after = _gru_cell(gates, run(params, 'recurrent', hidden), hidden)
      hidden = jnp.where(counts[..., None] > 0, after, hidden)
      return hidden, hidden

    in_time = (jnp.moveaxis(gates, -2, 0), jnp.moveaxis(mask, -1, 0))
    _, steps = jax.lax.scan(step, hidden, in_time)
    return jnp.moveaxis(steps, 0, -2)

  return BeliefEncoder(
    init=init,
    advance=advance,
    read=lambda params, hidden: run(params, 'heads', hidden),
  )


class _RewardDecoder(nn.Module):
  """See `reward_decoder`."""

  hidden: Sequence[int]
  embedding_sizes: Sequence[int]
  whole_step: bool

  @nn.compact
  def __call__(self, latent, observation, action, next_observation):
    observation_width, action_width = self.embedding_sizes
    embed = _linear(observation_width, observation.shape[-1])
    step = [nn.relu(embed(next_observation))]
    if self.whole_step:
      step.append(nn.relu(embed(observation)))
      step.append(nn.relu(_linear(action_width, action.shape[-1])(action)))
    step = jnp.concatenate(step, axis=-1)
    # The first layer of (z, step) is a sum: one product per latent and one
    # per step instead of one per pair.
    size = latent.shape[-1] + step.shape[-1]
    of_latent = _linear(self.hidden[0], size, use_bias=False)(latent)
    of_step = _linear(self.hidden[0], size)(step)
    x = nn.relu(of_latent[..., :, None, :] + of_step[..., None, :, :])
    for width in self.hidden[1:]:
      x = nn.relu(_linear(width, x.shape[-1])(x))
    return _linear(1, x.shape[-1])(x)[..., 0]


def reward_decoder(
  observation_size: int,
  action_size: int,
  latent_size: int,
  hidden: Sequence[int],
  embedding_sizes: Sequence[int],
  whole_step: bool,
) -> Network:
  """apply(params, z, s, a, s') -> rewards of all pairs of latents and steps.

  The inputs are latents [..., D, Z] and steps [..., T, O], [..., T, A] and
  [..., T, O], the result is [..., D, T]. A perceptron on z and embeddings of
  the step.

  Args:
    observation_size, action_size, latent_size: O, A, Z.
    hidden: widths of the ReLU layers.
    embedding_sizes: widths for observations (s and s' share theirs) and
      actions.
    whole_step: whether the reward may depend on s and a; False: on s' alone.
  """
  module = _RewardDecoder(tuple(hidden), tuple(embedding_sizes), whole_step)
  sizes = (latent_size, observation_size, action_size, observation_size)

  def init(key):
    return module.init(key, *[jnp.zeros((1, size)) for size in sizes])

  return Network(init=init, apply=module.apply)
