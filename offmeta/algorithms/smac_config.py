"""SMAC's settings: hyper-parameters, and every switch that leaves the release.

Defaults are the authors' released configuration (spec smac 3.1). Named
combinations of the switches: `experiments/configs/recipes.py`.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class OfflineConfig:
  """The meta-training stage on fixed data."""

  num_updates: int = 50_000  # gradient steps in all
  num_tasks: int = 4  # meta-batch
  query_size: int = 128  # RL transitions per task
  context_size: int = 64  # encoder transitions per task


@dataclasses.dataclass(frozen=True)
class OnlineConfig:
  """The self-supervised stage."""

  num_updates: int = 16_000  # gradient steps per iteration (4000 x 4)
  num_tasks: int = 4  # meta-batch
  query_size: int = 256  # RL transitions per task
  context_size: int = 64  # encoder transitions per task
  task_repeat: int = 4  # consecutive updates on the same tasks
  context: str = 'transitions'  # uniform; 'offline'; 'episodes': Exploration
  sequence_size: int = 400  # 'episodes': longest exploration sequence
  offline_share: float = 0.3  # 'episodes': tasks with an offline context
  # Of the RL transitions, how many were collected online. -1: drawn uniformly
  # from all there are (released), so that the share grows.
  online_share: float = -1.0


@dataclasses.dataclass(frozen=True)
class SacActorConfig:
  """The actor of `actor='sac'`: PEARL's (spec smac 3.3)."""

  entropy_weight: float = 1.0  # alpha; reward_scale sets the temperature
  entropy_in_target: bool = True  # -alpha log pi in the TD target
  mean_weight: float = 1e-3  # on the squared policy means before the tanh
  log_std_weight: float = 1e-3  # on the squared policy log-std


@dataclasses.dataclass(frozen=True)
class Config:
  """Hyper-parameters (spec smac 3.1: release defaults)."""

  latent_size: int = 5  # dimensions of z
  encoder_hidden: tuple[int, ...] = (200, 200, 200)
  decoder_hidden: tuple[int, ...] = (64, 64)
  critic_hidden: tuple[int, ...] = (300, 300, 300)
  actor_hidden: tuple[int, ...] = (300, 300, 300)
  context_lr: float = 3e-4  # encoder and decoder, one Adam
  critic_lr: float = 3e-4
  actor_lr: float = 3e-4
  discount: float = 0.99
  target_rate: float = 0.005  # polyak step, every update
  reward_scale: float = 5.0  # multiplies the reward in the TD target only
  kl_weight: float = 0.1  # on the posterior's KL to the prior
  kl_over_tasks: str = 'mean'  # 'mean' (SMAC) or 'sum' (their PEARL)
  encoder_loss: str = 'reward'  # that reaches z: 'reward', 'q' or 'both'
  actor: str = 'awac'  # or 'sac', in both phases
  awac_temperature: float = 100.0  # beta, in units of scaled Q; inf: cloning
  awac_weight: float = 1.0  # on the AWAC term, both phases
  online_q_weight: float = 1.0  # on -min Q(s, pi(s)) beside it, online only
  sac: SacActorConfig = SacActorConfig()  # the other actor
  independent_next_latent: bool = True  # own z sample for the next action
  use_next_observation: bool = False  # in the context (dynamics families)
  latent_resample_period: int = 1  # steps per z while acting; 0: episode
  train_context_online: bool = False  # encoder and decoder after the switch
  label_with: str = 'snapshot'  # 'snapshot' at the switch, or 'current'
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
  'encoder_loss',
  'actor',
  'use_next_observation',
  'latent_resample_period',
  'offline',
)

_CHOICES = {
  'kl_over_tasks': ('mean', 'sum'),
  'encoder_loss': ('reward', 'q', 'both'),
  'actor': ('awac', 'sac'),
  'label_with': ('snapshot', 'current'),
}


def validate(config: Config):
  """Checks what types alone cannot.

  Raises:
    ValueError: names the setting and what it takes.
  """
  for name, choices in _CHOICES.items():
    _check_choice(name, getattr(config, name), choices)
  _check_stages(config)
  if config.train_context_online and config.label_with == 'current':
    raise ValueError(
      'smac: train_context_online with label_with="current" would train the'
      ' decoder on its own drifting labels; use label_with="snapshot"'
    )
  if not config.awac_temperature > 0:
    raise ValueError(
      f'smac.awac_temperature={config.awac_temperature}: must be positive;'
      ' inf weighs all actions alike'
    )
  weights = {
    'awac_weight': config.awac_weight,
    'online_q_weight': config.online_q_weight,
    'sac.entropy_weight': config.sac.entropy_weight,
  }
  for name, value in weights.items():
    if not value >= 0:
      raise ValueError(f'smac.{name}={value}: must not be negative')
  if config.actor == 'awac' and not (
    config.awac_weight or config.online_q_weight
  ):
    raise ValueError(
      'smac: awac_weight and online_q_weight are both 0, so nothing would'
      ' train the actor'
    )


def _check_choice(name: str, value: str, choices: tuple[str, ...]):
  if value not in choices:
    raise ValueError(f'smac.{name}={value!r}; choose one of {choices}')


def _check_stages(config: Config):
  for stage in ('offline', 'online'):
    for name in ('num_updates', 'num_tasks', 'query_size', 'context_size'):
      value = getattr(getattr(config, stage), name)
      if value < 1:
        raise ValueError(
          f'smac.{stage}.{name}: must be at least 1, not {value}'
        )
  online = config.online
  _check_choice(
    'online.context', online.context, ('transitions', 'episodes', 'offline')
  )
  for name in ('task_repeat', 'sequence_size'):
    if getattr(online, name) < 1:
      raise ValueError(
        f'smac.online.{name}: must be at least 1, not {getattr(online, name)}'
      )
  if not 0 <= online.offline_share <= 1:
    raise ValueError(
      f'smac.online.offline_share={online.offline_share}: from 0 to 1'
    )
  if online.online_share != -1 and not 0 <= online.online_share <= 1:
    raise ValueError(
      f'smac.online.online_share={online.online_share}: from 0 to 1, or -1'
      ' for uniform draws from all data'
    )
