"""SMAC's settings: hyper-parameters, and every switch that leaves the release.

Defaults are the authors' released configuration but for
`DIFFERENCES`. Named combinations of the switches:
`experiments/configs/recipes.py`.
"""

import dataclasses
from typing import Literal

from offmeta import limits

# Settings whose defaults are not the release's: (here, released, why).
DIFFERENCES = {
  'zero_last_bias': (
    False,
    True,
    "rlkit's older rule, as in PEARL's first release;"
    ' published results of this package were measured so',
  ),
}


@dataclasses.dataclass(frozen=True)
class OfflineConfig:
  """The meta-training stage on fixed data."""

  num_updates: limits.Count = 50_000  # gradient steps in all
  num_tasks: limits.Count = 4  # meta-batch
  query_size: limits.Count = 128  # query transitions per task
  context_size: limits.Count = 64  # encoder transitions per task


@dataclasses.dataclass(frozen=True)
class OnlineConfig:
  """The self-supervised stage."""

  num_updates: limits.Count = 16_000  # gradient steps per iteration (4000 x 4)
  num_tasks: limits.Count = 4  # meta-batch
  query_size: limits.Count = 256  # query transitions per task
  context_size: limits.Count = 64  # encoder transitions per task
  task_repeat: limits.Count = 4  # consecutive updates on the same tasks
  # 'transitions': uniform; 'episodes': types.Exploration.
  context: Literal['transitions', 'episodes', 'offline'] = 'transitions'
  sequence_size: limits.Count = 400  # 'episodes': longest exploration sequence
  offline_share: limits.Share = 0.3  # 'episodes': tasks with an offline context
  # Share of queries that were collected online. -1: drawn uniformly
  # from all there are (released), so that the share grows.
  online_share: limits.Number = -1.0


@dataclasses.dataclass(frozen=True)
class SacActorConfig:
  """The actor of `actor='sac'`: PEARL's."""

  # Alpha; reward_scale sets the temperature.
  entropy_weight: limits.Weight = 1.0
  entropy_in_target: bool = True  # -alpha log pi in the TD target
  # On the squared policy means before the tanh.
  mean_weight: limits.Weight = 1e-3
  log_std_weight: limits.Weight = 1e-3  # on the squared policy log-std


@dataclasses.dataclass(frozen=True)
class Config:
  """Hyper-parameters (defaults: the release's)."""

  latent_size: limits.Width = 5  # dimensions of z
  encoder_hidden: limits.Widths = (200, 200, 200)
  decoder_hidden: limits.Widths = (64, 64)
  critic_hidden: limits.Widths = (300, 300, 300)
  actor_hidden: limits.Widths = (300, 300, 300)
  # Else U(+-3e-3), of a policy's mean U(+-1e-3).
  zero_last_bias: bool = False
  context_lr: limits.Weight = 3e-4  # encoder and decoder, one Adam
  critic_lr: limits.Weight = 3e-4
  actor_lr: limits.Weight = 3e-4
  discount: limits.Share = 0.99
  target_rate: limits.PositiveShare = 0.005  # polyak step, every update
  # Multiplies the reward in the TD target only.
  reward_scale: limits.Positive = 5.0
  kl_weight: limits.Weight = 0.1  # on the posterior's KL to the prior
  # 'mean' (SMAC) or 'sum' (their PEARL).
  kl_over_tasks: Literal['mean', 'sum'] = 'mean'
  # That reaches z.
  encoder_loss: Literal['reward', 'q', 'both'] = 'reward'
  actor: Literal['awac', 'sac'] = 'awac'  # or 'sac', in both phases
  # Beta, in units of scaled Q; inf: cloning.
  awac_temperature: limits.PositiveOrInf = 100.0
  awac_weight: limits.Weight = 1.0  # on the AWAC term, both phases
  # On -min Q(s, pi(s)) beside it, online only.
  online_q_weight: limits.Weight = 1.0
  sac: SacActorConfig = SacActorConfig()  # the other actor
  independent_next_latent: bool = True  # own z sample for the next action
  use_next_observation: bool = False  # in the context (dynamics families)
  # Steps per z while acting; 0: episode.
  latent_resample_period: limits.CountOrZero = 1
  train_context_online: bool = False  # encoder and decoder after the switch
  # 'snapshot': at the phase switch.
  label_with: Literal['snapshot', 'current'] = 'snapshot'
  offline: OfflineConfig = OfflineConfig()
  online: OnlineConfig = OnlineConfig()


# What an online variant inherits from the offline phase that it starts from:
# shapes, how the policies act, and what that phase was trained by.
VARIANT_FIXED = (
  'latent_size',
  'encoder_hidden',
  'decoder_hidden',
  'critic_hidden',
  'actor_hidden',
  'zero_last_bias',
  'encoder_loss',
  'actor',
  'use_next_observation',
  'latent_resample_period',
  'offline',
)


def validate(config: Config):
  """Checks what types alone cannot.

  Raises:
    ValueError: names the setting and what it takes.
  """
  limits.check(config, 'smac')
  if config.train_context_online and config.label_with == 'current':
    raise ValueError(
      'smac: train_context_online with label_with="current" would train the'
      ' decoder on its own drifting labels; use label_with="snapshot"'
    )
  online_share = config.online.online_share
  if online_share != -1 and not 0 <= online_share <= 1:
    raise ValueError(
      f'smac.online.online_share: must be from 0 to 1, or -1 for uniform draws'
      f' from all data, not {online_share}'
    )
  if config.actor == 'awac' and not (
    config.awac_weight or config.online_q_weight
  ):
    raise ValueError(
      'smac: awac_weight and online_q_weight are both 0, so nothing would'
      ' train the actor'
    )
