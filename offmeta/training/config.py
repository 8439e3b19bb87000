"""The experiment as one frozen dataclass.

No default stands in two places: the fields below and those of the
algorithms' own `Config` are the only ones; config files list differences.

In files and on the command line the algorithm's settings are the group of its
name: {'algorithm': 'macaw', 'macaw': {'discount': 0.9}}.
"""

from collections.abc import Mapping
import dataclasses
import hashlib
import json
from typing import Any

from offmeta.algorithms import (
  ALGORITHMS,
  pearl as pearl_lib,
  sac as sac_lib,
  smac as smac_lib,
)
from offmeta.types import Visits


@dataclasses.dataclass(frozen=True)
class FamilyConfig:
  """Environment family and its tasks."""

  name: str = 'point_robot'  # key of offmeta.envs.FAMILIES
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  task_list: str = 'default'  # a published list, or 'random:SEED'
  num_train: int = 32  # first so many of the list's training tasks
  num_test: int = 20  # first so many of its test tasks


@dataclasses.dataclass(frozen=True)
class SpecialistsConfig:
  """One SAC learner per task; all numbers are per learner."""

  env_steps: int = 1_000_000  # in all (arXiv 1812.05905: 1 to 10 million)
  initial_steps: int = 10_000  # of them uniform (its release: 1000 to 10,000)
  steps_per_iteration: int = 1000  # before sac.num_updates updates
  num_evaluations: int = 20  # spread evenly over the training
  num_episodes: int = 10  # per evaluation
  sac: sac_lib.Config = sac_lib.Config()


@dataclasses.dataclass(frozen=True)
class CollectConfig:
  """How the offline dataset comes about (spec smac 3.3)."""

  dataset: str = ''  # path of an existing dataset; '' generates one
  test_dataset: str = ''  # of the held-out tasks, with `dataset`; '': none
  source: str = 'pearl'  # of SOURCES
  script_episodes: int = 50  # 'script': per task; all are kept (Sawyer: 3750)
  specialists: SpecialistsConfig = SpecialistsConfig()  # 'sac'
  seed: int = 0
  iterations: int = 50  # of gathering and training the behaviour policy
  initial_steps: int = 2000  # per task with the untrained policy
  gather: Visits = Visits(clear_encoder_buffer=True, rewards='true')
  rl_slice: str = 'last'  # part of each log that is kept, of SLICES
  rl_size: int = 1200  # transitions per task for the losses
  encoder_size: int = 0  # last so many of the encoder buffer; 0: rl slice
  behaviour: pearl_lib.Config = pearl_lib.Config()


@dataclasses.dataclass(frozen=True)
class OnlineConfig:
  """The self-supervised phase."""

  iterations: int = 501
  share_encoder_buffer: bool = True  # one buffer for both roles (Ant script)
  gather: Visits = Visits()
  headline: str = 'smac'  # the variant reported as `online_*`
  oracle: str = 'oracle'  # the variant reported as `oracle`; '': none
  # name -> {'description': str, and what it changes in ExperimentConfig}
  variants: Mapping[str, Mapping[str, Any]] = dataclasses.field(
    default_factory=dict
  )


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
  """Online fine-tuning in each held-out task (spec macaw 6.3)."""

  iterations: int = 0  # of an episode and the updates after it (500); 0: none
  burn_in: int = 25  # episodes before the first update
  context_size: int = 256  # random transitions behind the first, offline step
  num_episodes: int = 3  # per evaluation
  every_iterations: int = 1  # between evaluations


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
  """The meta-test protocol (spec smac 1.3) and when it is run."""

  num_repeats: int = 4
  num_steps: int = 600  # per repetition
  num_prior_episodes: int = 2  # before the first adaptation
  context_size: int = 256  # of offline contexts
  num_train_tasks: int = 10  # training tasks scored during training
  every_updates: int = 5000  # offline: updates between evaluations
  every_iterations: int = 1  # online: iterations between evaluations


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
  """Everything that decides the numbers of a run."""

  family: FamilyConfig = FamilyConfig()
  collect: CollectConfig = CollectConfig()
  algorithm: str = 'smac'  # key of offmeta.algorithms.ALGORITHMS
  settings: Any = smac_lib.Config()  # its Config; the group of its name
  online: OnlineConfig = OnlineConfig()
  finetune: FinetuneConfig = FinetuneConfig()
  evaluation: EvaluationConfig = EvaluationConfig()
  seed: int = 0
  first_seed: int = 0  # learners first_seed, first_seed + 1, ... of that seed
  num_seeds: int = 5
  chunk: int = 500  # updates per compiled call (metrics are their mean)
  matmul_precision: str = 'float32'  # of the networks in updates: PRECISIONS


# Of the offline data: a PEARL run's replay (SMAC's), one SAC learner per task
# with its whole life in order (MACAW's, BOReL's, FOCAL's), or the family's
# scripted policy (Sawyer's).
SOURCES = ('pearl', 'sac', 'script')
# Which `rl_size` transitions: around the end of the log's first quarter for
# 'middle' (spec macaw 4.5), all of them for 'all'.
SLICES = ('first', 'middle', 'last', 'all')

_SIZES = (
  'num_updates',
  'num_tasks',
  'query_size',
  'context_size',
  'num_envs',
  'num_steps',
  'num_epochs',
  'num_minibatches',
)

# Of matrix products: inputs with 23, 10 and 7 bits; sums, parameters and
# statistics are float32 in all. TensorFloat-32 exists on GPUs only.
PRECISIONS = ('float32', 'tensorfloat32', 'bfloat16')


class ConfigError(ValueError):
  """A configuration that cannot be run; the message names the key."""


def to_dict(config: Any) -> Any:
  """A dataclass as nested plain dictionaries."""
  if dataclasses.is_dataclass(config):
    return {
      _key(config, field.name): to_dict(getattr(config, field.name))
      for field in dataclasses.fields(config)
    }
  if isinstance(config, Mapping):
    return {key: to_dict(value) for key, value in config.items()}
  return config


def _key(config: Any, field: str) -> str:
  """What a field is called outside."""
  named = isinstance(config, ExperimentConfig) and field == 'settings'
  return config.algorithm if named else field


def _check_type(key: str, value: Any, default: Any) -> Any:
  """`value` in the type of `default`, or ConfigError."""
  if isinstance(default, tuple) and isinstance(value, (list, tuple)):
    return tuple(value)
  if isinstance(default, Mapping) and isinstance(value, Mapping):
    return to_dict(value)
  if isinstance(default, bool) or isinstance(value, bool):
    good = isinstance(default, bool) and isinstance(value, bool)
  elif isinstance(default, float):
    good = isinstance(value, (int, float))
    value = float(value) if good else value
  else:
    good = isinstance(value, type(default))
  if not good:
    raise ConfigError(
      f'config.{key}: {value!r} is {type(value).__name__}, but'
      f' {type(default).__name__} is needed (default {default!r})'
    )
  return value


def from_dict(values: Mapping, default: Any = None, prefix: str = '') -> Any:
  """The dataclass that `values` describe.

  Args:
    values: nested dictionaries; missing keys keep their default.
    default: dataclass instance that supplies types and defaults.
    prefix: dotted path, for messages.

  Raises:
    ConfigError: an unknown key or a value of the wrong type.
  """
  default = ExperimentConfig() if default is None else default
  if isinstance(default, ExperimentConfig):
    default = _with_algorithm(default, values.get('algorithm'))
  known = {
    _key(default, field.name): field.name
    for field in dataclasses.fields(default)
  }
  changes = {}
  for name, value in values.items():
    key = f'{prefix}{name}'
    if name not in known:
      raise ConfigError(
        f'config.{key}: unknown key; known here: {", ".join(sorted(known))}'
      )
    field = known[name]
    current = getattr(default, field)
    if dataclasses.is_dataclass(current):
      if not isinstance(value, Mapping):
        raise ConfigError(f'config.{key}: expected a group of keys')
      changes[field] = from_dict(value, current, f'{key}.')
    else:
      changes[field] = _check_type(key, value, current)
  return dataclasses.replace(default, **changes)


def _with_algorithm(
  config: ExperimentConfig, name: str | None
) -> ExperimentConfig:
  """`config` with the default settings of another algorithm, if it is one."""
  if name is None or name == config.algorithm:
    return config
  if name not in ALGORITHMS:
    raise ConfigError(
      f'config.algorithm: no algorithm {name!r}; known:'
      f' {", ".join(sorted(ALGORITHMS))}'
    )
  return dataclasses.replace(
    config, algorithm=name, settings=ALGORITHMS[name].config()
  )


def variant(config: ExperimentConfig, name: str) -> ExperimentConfig:
  """The configuration of one online variant."""
  changes = {
    key: value
    for key, value in config.online.variants[name].items()
    if key != 'description'
  }
  return from_dict(changes, config)


def config_hash(config: ExperimentConfig) -> str:
  """Twelve hexadecimal digits that name the configuration."""
  text = json.dumps(to_dict(config), sort_keys=True, default=list)
  return hashlib.sha256(text.encode()).hexdigest()[:12]


def _positive(config: Any, prefix: str, names: tuple[str, ...]):
  for name in names:
    if getattr(config, name) < 1:
      raise ConfigError(
        f'config.{prefix}{name}: must be at least 1, not'
        f' {getattr(config, name)}'
      )


def validate(config: ExperimentConfig):
  """Checks what types alone cannot.

  Raises:
    ConfigError: names the key, the value and what would be accepted.
  """
  _positive(config, '', ('num_seeds', 'chunk'))
  if config.first_seed < 0:
    raise ConfigError(
      f'config.first_seed: must be at least 0, not {config.first_seed}'
    )
  if config.matmul_precision not in PRECISIONS:
    raise ConfigError(
      f'config.matmul_precision: {config.matmul_precision!r}; choose one of'
      f' {", ".join(PRECISIONS)}'
    )
  _positive(config.family, 'family.', ('num_train', 'num_test'))
  _positive(
    config.evaluation,
    'evaluation.',
    (
      'num_repeats',
      'num_steps',
      'context_size',
      'num_train_tasks',
      'every_updates',
      'every_iterations',
    ),
  )
  _positive(
    config.finetune,
    'finetune.',
    ('burn_in', 'context_size', 'num_episodes', 'every_iterations'),
  )
  if config.finetune.iterations < 0:
    raise ConfigError(
      'config.finetune.iterations: must be at least 0, not'
      f' {config.finetune.iterations}'
    )
  _positive(config.collect, 'collect.', ('rl_size', 'script_episodes'))
  if config.collect.source not in SOURCES:
    raise ConfigError(
      f'config.collect.source: {config.collect.source!r}; choose one of'
      f' {", ".join(SOURCES)}'
    )
  if config.collect.test_dataset and not config.collect.dataset:
    raise ConfigError(
      'config.collect.test_dataset: only together with'
      ' config.collect.dataset; otherwise both are made'
    )
  if config.collect.rl_slice not in SLICES:
    raise ConfigError(
      f'config.collect.rl_slice: {config.collect.rl_slice!r}; choose'
      f' one of {", ".join(SLICES)}'
    )
  _check_settings(config, 'config')
  if config.online.variants:
    _validate_online(config)


def _check_settings(config: ExperimentConfig, where: str):
  """What can be said of any algorithm's settings, and what it says itself."""
  _check_sizes(config.settings, f'{where}.{config.algorithm}')
  try:
    ALGORITHMS[config.algorithm].validate(config.settings)
  except ValueError as error:
    raise ConfigError(f'{where}: {error}') from error


def _check_sizes(settings: Any, where: str):
  """Counts of updates and of what a batch holds, in all groups."""
  for field in dataclasses.fields(settings):
    value = getattr(settings, field.name)
    if dataclasses.is_dataclass(value):
      _check_sizes(value, f'{where}.{field.name}')
    elif field.name in _SIZES and value < 1:
      raise ConfigError(
        f'{where}.{field.name}: must be at least 1, not {value}'
      )


def _validate_online(config: ExperimentConfig):
  """The variants of the online phase."""
  names = config.online.variants
  entry = ALGORITHMS[config.algorithm]
  if not entry.online_variants:
    raise ConfigError(
      f'config.online.variants: {config.algorithm} has no online phase on'
      ' the training tasks; set them to {}'
    )
  for role in ('headline', 'oracle'):
    name = getattr(config.online, role)
    if role == 'oracle' and not name:  # there is none
      continue
    if name not in names:
      raise ConfigError(
        f'config.online.{role}: no variant {name!r}; known:'
        f' {", ".join(sorted(names))}'
      )
  for name in names:
    changed = variant(config, name)
    _check_settings(changed, f'config of variant {name!r}')
    if changed.online.gather.rewards not in ('decoder', 'true'):
      raise ConfigError(
        f'config.online.gather.rewards of variant {name!r}:'
        f' {changed.online.gather.rewards!r}; choose "decoder" or "true"'
      )
    if changed.online.gather.clear_encoder_buffer:
      raise ConfigError(
        f'config.online.gather.clear_encoder_buffer of variant {name!r}:'
        ' labels need the offline part of the encoder buffer; only False'
      )
    for part in entry.variant_fixed:
      if getattr(changed.settings, part) != getattr(config.settings, part):
        raise ConfigError(
          f'config.online.variants.{name}: a variant cannot change'
          f' config.{config.algorithm}.{part}'
        )
    for part in (
      'family',
      'collect',
      'finetune',
      'evaluation',
      'algorithm',
      'seed',
      'first_seed',
      'num_seeds',
      'chunk',
      'matmul_precision',
    ):
      if getattr(changed, part) != getattr(config, part):
        raise ConfigError(
          f'config.online.variants.{name}: a variant changes the online'
          f' phase only, not config.{part}'
        )
