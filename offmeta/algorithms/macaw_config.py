"""MACAW's settings: hyper-parameters, and every switch that leaves the release.

Defaults are the authors' released configuration for the four locomotion
families (spec macaw 8, 'standard.json').
"""

import dataclasses

from offmeta.networks import weight_transform


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
  """Training on one task's own data after adaptation (spec macaw 6.3)."""

  lr: float = 1e-5  # one Adam for the value, one for the policy
  value_updates: int = 100  # per round of collecting
  policy_updates: int = 200
  batch_size: int = 256


@dataclasses.dataclass(frozen=True)
class Config:
  """Hyper-parameters (spec macaw 8, 'standard.json')."""

  hidden: tuple[int, ...] = (100, 100, 100)  # of policy and value
  head_hidden: int = 32  # of the advantage head
  layer: str = 'wlinear'  # or 'bias_linear' (the ablation), 'dense'
  latent_size: int = 100  # of the weight-transform layers
  head_relu_on_action: bool = True  # release: the head sees actions above 0
  action_std: float = 0.2  # of the policy, fixed
  discount: float = 0.99
  policy_lr: float = 1e-4
  value_lr: float = 1e-5
  step_size_lr: float = 1e-3  # of step sizes and advantage coefficient
  inner_policy_lr: float = 1e-3  # at the start
  inner_value_lr: float = 1e-3  # at the start
  advantage_coef: float = 0.01  # lambda at the start; 0: no advantage head
  temperature: float = 1.0  # of standardised advantages
  max_weight: float = 20.0
  adv_std_eps: float = 0.0  # added to the standard deviation of advantages
  target_rate: float = 0.1  # share of the adapted value in its target
  adapt: str = 'all'  # parameters, or 'latent_only' (as the paper describes)
  bootstrap_terminal: str = 'release'  # V at the episode's end, or 'none'
  mask_bootstrap_on_death: bool = False  # no V after a true termination
  train_inner_sampling: str = 'contiguous'  # or 'uniform', as at meta-test
  disjoint_batches: bool = False  # inner and outer rows differ; 'uniform' only
  outer_norm: str = 'n_train'  # divide by all tasks, or by the 'meta_batch'
  stride: int = 7  # every so-manieth logged step is used
  # Inner batches, at meta-test too, from a part of each log (4.5): 'first',
  # 'middle' or 'last' `context_rows` in a row, without stride.
  context_part: str = 'all'
  context_rows: int = 100_000
  num_updates: int = 1_000_000
  num_tasks: int = 5  # meta-batch
  context_size: int = 256  # of the inner batch
  query_size: int = 256  # of the outer batch
  task_loop: str = 'scan'  # one task after the other, or 'vmap'
  finetune: FinetuneConfig = FinetuneConfig()


def validate(config: Config):
  """Checks the values of switches.

  Raises:
    ValueError: names the switch and what it takes.
  """
  known = {
    'layer': tuple(weight_transform.LAYERS),
    'adapt': ('all', 'latent_only'),
    'bootstrap_terminal': ('release', 'none'),
    'train_inner_sampling': ('contiguous', 'uniform'),
    'outer_norm': ('n_train', 'meta_batch'),
    'task_loop': ('scan', 'vmap'),
    'context_part': ('all', 'first', 'middle', 'last'),
  }
  for name, values in known.items():
    if getattr(config, name) not in values:
      raise ValueError(
        f'macaw: {name}={getattr(config, name)!r}; choose one of {values}'
      )
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
