"""MACAW's settings: hyper-parameters, and every switch that leaves the release.

Defaults are the authors' released configuration for the four locomotion
families ('standard.json' of the release).
"""

import dataclasses
from typing import Literal

from offmeta import limits

# Settings whose defaults are not the release's: (here, released, why).
DIFFERENCES = {}


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
  """Training on one task's own data after adaptation."""

  lr: limits.Weight = 1e-5  # one Adam for the value, one for the policy
  value_updates: limits.Count = 100  # per round of collecting
  policy_updates: limits.Count = 200
  batch_size: limits.Count = 256


@dataclasses.dataclass(frozen=True)
class Config:
  """Hyper-parameters (defaults: the release's 'standard.json')."""

  hidden: limits.Widths = (100, 100, 100)  # of policy and value
  head_hidden: limits.Width = 32  # of the advantage head
  # 'bias_linear' is the ablation.
  layer: Literal['wlinear', 'bias_linear', 'dense'] = 'wlinear'
  latent_size: limits.Width = 100  # of the weight-transform layers
  head_relu_on_action: bool = True  # release: the head sees actions above 0
  action_std: limits.Positive = 0.2  # of the policy, fixed
  discount: limits.Share = 0.99
  policy_lr: limits.Weight = 1e-4
  value_lr: limits.Weight = 1e-5
  step_size_lr: limits.Weight = 1e-3  # of step sizes and advantage coefficient
  inner_policy_lr: limits.Weight = 1e-3  # at the start
  inner_value_lr: limits.Weight = 1e-3  # at the start
  # Lambda at the start; 0: no advantage head.
  advantage_coef: limits.Weight = 0.01
  temperature: limits.Positive = 1.0  # of standardised advantages
  max_weight: limits.PositiveOrInf = 20.0
  # Added to the standard deviation of advantages.
  adv_std_eps: limits.Weight = 0.0
  # Share of the adapted value in its target.
  target_rate: limits.PositiveShare = 0.1
  # Parameters; 'latent_only' as the paper describes.
  adapt: Literal['all', 'latent_only'] = 'all'
  # 'release': V at the episode's end.
  bootstrap_terminal: Literal['release', 'none'] = 'release'
  mask_bootstrap_on_death: bool = False  # no V after a true termination
  # 'uniform': as at meta-test.
  train_inner_sampling: Literal['contiguous', 'uniform'] = 'contiguous'
  disjoint_batches: bool = False  # inner and outer rows differ; 'uniform' only
  # Divide by all tasks, or by the meta-batch.
  outer_norm: Literal['n_train', 'meta_batch'] = 'n_train'
  stride: limits.Count = 7  # every `stride`-th logged step is used
  # Inner batches, at meta-test too, from a part of each log: 'first',
  # 'middle' or 'last' `context_rows` in a row, without stride.
  context_part: Literal['all', 'first', 'middle', 'last'] = 'all'
  context_rows: limits.Count = 100_000
  num_updates: limits.Count = 1_000_000
  num_tasks: limits.Count = 5  # meta-batch
  context_size: limits.Count = 256  # of the inner batch
  query_size: limits.Count = 256  # of the outer batch
  # 'scan': one task after the other.
  task_loop: Literal['scan', 'vmap'] = 'scan'
  finetune: FinetuneConfig = FinetuneConfig()


def validate(config: Config):
  """Checks the values of switches.

  Raises:
    ValueError: names the switch and what it takes.
  """
  limits.check(config, 'macaw')
  if config.adapt == 'latent_only' and config.layer == 'dense':
    raise ValueError(
      "macaw: adapt='latent_only' with layer='dense', which has no latent"
    )
  if config.disjoint_batches and config.train_inner_sampling != 'uniform':
    raise ValueError(
      "macaw: disjoint_batches needs train_inner_sampling='uniform'"
    )
  if config.context_part != 'all' and (
    config.context_rows < config.context_size
  ):
    raise ValueError(
      f'macaw: context_rows={config.context_rows} are fewer than'
      f' context_size={config.context_size}'
    )
  if config.disjoint_batches and config.context_part != 'all':
    raise ValueError(
      'macaw: disjoint_batches with contexts from a part of the log; set'
      " context_part='all'"
    )
