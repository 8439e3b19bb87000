"""FLOPs of an update by formula: multiply-adds of matrix products only."""

from collections.abc import Sequence
import itertools
import math
from typing import NamedTuple

from offmeta.algorithms import pearl, sac, smac
from offmeta.types import EnvSpec, Stage


class Evaluation(NamedTuple):
  """One network's share of an update.

  A matrix product of an [N, i] input with an [i, o] weight is 2 N i o FLOP;
  its weight gradient is as much again, and so is its input gradient.

  Attributes:
    network: for the reader.
    layers: (inputs, outputs) of each dense layer; heads are one layer.
    batch: N, rows.
    copies: networks of this shape.
    weight_gradient: whether the weights are trained here.
    input_gradient: whether a gradient flows on into the input.
  """

  network: str
  layers: tuple[tuple[int, int], ...]
  batch: int
  copies: int = 1
  weight_gradient: bool = False
  input_gradient: bool = False

  def flop(self) -> float:
    """Of the matrix products."""
    weights = sum(i * o for i, o in self.layers)
    first = math.prod(self.layers[0])
    passes = weights * (1 + self.weight_gradient)
    if self.input_gradient:
      passes += weights
    elif self.weight_gradient:  # nobody asks for the first layer's input
      passes += weights - first
    return 2.0 * self.batch * self.copies * passes


def context_rows(stage: Stage) -> int:
  """Rows that the encoder sees in one update, masked ones included."""
  batch = stage.batch
  size = batch.context_size
  if batch.context == 'episodes':
    size = max(size, batch.sequence_size)
  return batch.num_tasks * size


def _query_rows(stage: Stage) -> int:
  return stage.batch.num_tasks * stage.batch.query_size


def _layers(
    inputs: int, hidden: Sequence[int], outputs: int
) -> tuple[tuple[int, int], ...]:
  return tuple(itertools.pairwise((inputs, *hidden, outputs)))


class _Shapes(NamedTuple):
  """Dense layers of the networks that SMAC and PEARL share."""

  encoder: tuple
  decoder: tuple
  critic: tuple
  actor: tuple


def _shapes(spec: EnvSpec, config: smac.Config | pearl.Config) -> _Shapes:
  o, a, z = spec.observation_size, spec.action_size, config.latent_size
  entry = o + a + 1 + (o if config.use_next_observation else 0)
  return _Shapes(
      encoder=_layers(entry, config.encoder_hidden, 2 * z),
      decoder=_layers(o + a + z, config.decoder_hidden, 1),
      critic=_layers(o + a + z, config.critic_hidden, 1),
      actor=_layers(o + z, config.actor_hidden, 2 * a),
  )


def smac_evaluations(
    spec: EnvSpec, config: smac.Config, stage: Stage
) -> list[Evaluation]:
  """What `smac.losses` evaluates in one update of a stage."""
  online = stage.name == 'online'
  trained = not online or config.train_context_online
  net, rows = _shapes(spec, config), _query_rows(stage)
  q_gradient = config.actor == 'sac' or (
      online and config.online_q_weight != 0)
  into_z = config.encoder_loss != 'reward' and trained
  return [
      Evaluation('encoder', net.encoder, context_rows(stage), 1, trained),
      Evaluation('decoder', net.decoder, rows, 1, trained,
                 config.encoder_loss != 'q' and trained),
      Evaluation('actor, next action', net.actor, rows),
      Evaluation('target critics', net.critic, rows, 2),
      Evaluation('critics', net.critic, rows, 2, True, into_z),
      Evaluation('actor', net.actor, rows, 1, True),
      Evaluation('critics, own action', net.critic, rows, 2, False,
                 q_gradient),
  ]


def pearl_evaluations(
    spec: EnvSpec, config: pearl.Config, stage: Stage
) -> list[Evaluation]:
  """What `pearl.critic_losses` and `actor_losses` evaluate in one update."""
  net, rows = _shapes(spec, config), _query_rows(stage)
  value = _layers(
      spec.observation_size + config.latent_size, config.value_hidden, 1)
  decoder = [Evaluation('decoder', net.decoder, rows, 1, True, True)]
  return [
      Evaluation('encoder', net.encoder, context_rows(stage), 1, True),
      *(decoder if config.train_decoder else []),
      Evaluation('target value', value, rows),
      Evaluation('critics', net.critic, rows, 2, True,
                 config.backprop_q_into_encoder),
      Evaluation('actor', net.actor, rows, 1, True),
      Evaluation('critics, own action', net.critic, rows, 2, False, True),
      Evaluation('value', value, rows, 1, True),
  ]


def sac_evaluations(
    spec: EnvSpec, config: sac.Config, stage: Stage
) -> list[Evaluation]:
  """What `sac.losses` evaluates in one update."""
  o, a, rows = spec.observation_size, spec.action_size, _query_rows(stage)
  critic = _layers(o + a, config.critic_hidden, 1)
  actor = _layers(o, config.actor_hidden, 2 * a)
  return [
      Evaluation('actor, next action', actor, rows),
      Evaluation('target critics', critic, rows, 2),
      Evaluation('critics', critic, rows, 2, True),
      Evaluation('actor', actor, rows, 1, True),
      Evaluation('critics, own action', critic, rows, 2, False, True),
  ]


# Algorithms whose updates can be measured.
EVALUATIONS = {
    'pearl': pearl_evaluations,
    'sac': sac_evaluations,
    'smac': smac_evaluations,
}
