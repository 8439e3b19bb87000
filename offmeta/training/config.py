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
import re
import sys
from typing import Any, Literal, get_args

from offmeta import limits
from offmeta.algorithms import (
  ALGORITHMS,
  pearl as pearl_lib,
  sac as sac_lib,
  smac as smac_lib,
)
from offmeta.types import Visits

# Of the offline data: a PEARL run's replay (SMAC's), one SAC learner per task
# with its whole training history (MACAW's, BOReL's, FOCAL's), or the family's
# scripted policy (Sawyer's).
Source = Literal['pearl', 'sac', 'script']
SOURCES = get_args(Source)
# Which `log_size` transitions: around the end of the log's first quarter for
# 'middle' (MACAW's ablation of data quality), all of them for 'all'.
Slice = Literal['first', 'middle', 'last', 'all']
# Of matrix products: inputs with 23, 10 and 7 bits; sums, parameters and
# statistics are float32 in all. TensorFloat-32 exists on GPUs only.
Precision = Literal['float32', 'tensorfloat32', 'bfloat16']
PRECISIONS = get_args(Precision)

# What counts updates and what a batch holds, in any algorithm's settings:
# where these whole numbers declare no limit of their own, they are counts.
_SIZES = ('num_updates', 'num_tasks', 'query_size', 'context_size')
# Of a variant, which is the name of a folder and of a file.
_NAME = re.compile(r'\w[\w.-]*')
_MOST_BYTES = 100  # of it; file systems take 255, with what is added to it


@dataclasses.dataclass(frozen=True)
class FamilyConfig:
  """Environment family and its tasks."""

  name: str = 'point_robot'  # key of offmeta.envs.FAMILIES
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  task_list: str = 'default'  # a published list, or 'random:SEED'
  # First so many of the list's training tasks.
  num_train: limits.SideBySide = 32
  num_test: limits.SideBySide = 20  # first so many of its test tasks


@dataclasses.dataclass(frozen=True)
class SpecialistsConfig:
  """One SAC learner per task; all numbers are per learner."""

  # In all (arXiv 1812.05905: 1 to 10 million).
  env_steps: limits.Count = 1_000_000
  # Of them uniform (its release: 1000 to 10,000).
  initial_steps: limits.CountOrZero = 10_000
  steps_per_iteration: limits.Count = 1000  # before sac.num_updates updates
  num_evaluations: limits.Count = 20  # spread evenly over the training
  num_episodes: limits.Count = 10  # per evaluation
  sac: sac_lib.Config = sac_lib.Config()


@dataclasses.dataclass(frozen=True)
class CollectConfig:
  """How the offline dataset comes about."""

  dataset: str = ''  # path of an existing dataset; '' generates one
  test_dataset: str = ''  # of the held-out tasks, with `dataset`; '': none
  source: Source = 'pearl'
  # 'script': per task; all are kept (Sawyer: 3750).
  script_episodes: limits.Count = 50
  specialists: SpecialistsConfig = SpecialistsConfig()  # 'sac'
  seed: limits.Seed = 0
  # Of gathering and training the behaviour policy.
  iterations: limits.Count = 50
  initial_steps: limits.Count = 2000  # per task with the untrained policy
  gather: Visits = Visits(clear_context=True, rewards='true')
  log_slice: Slice = 'last'  # part of each log that is kept
  log_size: limits.Count = 1200  # transitions per task for the losses
  # Last so many of the context buffer; 0: from the log.
  context_size: limits.CountOrZero = 0
  behaviour: pearl_lib.Config = pearl_lib.Config()


@dataclasses.dataclass(frozen=True)
class OnlineConfig:
  """The self-supervised phase."""

  iterations: limits.Count = 501
  share_buffer: bool = True  # one buffer for both roles (Ant script)
  gather: Visits = Visits()
  headline: str = 'smac'  # the variant reported as `online_*`
  oracle: str = 'oracle'  # the variant reported as `oracle`; '': none
  # name -> {'description': str, and what it changes in ExperimentConfig}
  variants: Mapping[str, Mapping[str, Any]] = dataclasses.field(
    default_factory=dict
  )


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
  """Online fine-tuning in each held-out task (as MACAW's release does)."""

  # Of an episode and the updates after it (500); 0: none.
  iterations: limits.CountOrZero = 0
  burn_in: limits.Count = 25  # episodes before the first update
  # Random transitions behind the first, offline step.
  context_size: limits.Count = 256
  num_episodes: limits.Count = 3  # per evaluation
  every_iterations: limits.Count = 1  # between evaluations


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
  """The meta-test protocol and when it is run."""

  num_repeats: limits.Count = 4
  num_steps: limits.Count = 600  # per repetition
  num_prior_episodes: limits.CountOrZero = 2  # before the first adaptation
  context_size: limits.Count = 256  # of offline contexts
  num_train_tasks: limits.Count = 10  # training tasks scored during training
  every_updates: limits.Count = 5000  # offline: updates between evaluations
  every_iterations: limits.Count = 1  # online: iterations between evaluations


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
  seed: limits.Seed = 0
  # Learners first_seed, first_seed + 1, ... of that seed.
  first_seed: limits.Seed = 0
  num_seeds: limits.SideBySide = 5
  # Updates per compiled call (metrics are their mean).
  chunk: limits.Count = 500
  matmul_precision: Precision = 'float32'  # of the networks in updates


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
    value = _float(key, value) if good else value
  else:
    good = isinstance(value, type(default))
  if not good:
    raise ConfigError(
      f'config.{key}: {value!r} is {type(value).__name__}, but'
      f' {type(default).__name__} is needed (default {default!r})'
    )
  return value


def _float(key: str, value: float) -> float:
  """A number as a float, or ConfigError."""
  try:
    return float(value)
  except OverflowError as error:
    raise ConfigError(
      f'config.{key}: a whole number above {sys.float_info.max:.2g} in size,'
      ' which is more than a float holds'
    ) from error


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


def _with_algorithm(config: ExperimentConfig, name: Any) -> ExperimentConfig:
  """`config` with the default settings of another algorithm, if it is one."""
  if name is None or name == config.algorithm:
    return config
  _check_type('algorithm', name, config.algorithm)
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


def validate(config: ExperimentConfig):
  """Checks what types alone cannot.

  Raises:
    ConfigError: names the key, the value and what would be accepted.
  """
  _check(config, 'config')
  if config.first_seed + config.num_seeds > limits.MOST_SEED + 1:
    raise ConfigError(
      f'config.first_seed: {config.num_seeds} seeds from {config.first_seed} on'
      f' go beyond the last one, {limits.MOST_SEED}'
    )
  for option in config.family.options:
    if not isinstance(option, str):
      raise ConfigError(
        f'config.family.options: {option!r} is {type(option).__name__}, but'
        ' names of options are text'
      )
  _validate_collect(config.collect)
  if config.online.variants:
    _validate_online(config)


def _check(config: ExperimentConfig, where: str):
  """Every setting by itself, then what the algorithm says of its own."""
  own = f'{where}.{config.algorithm}'
  try:
    limits.check(dataclasses.replace(config, settings=None), where)
    limits.check(config.settings, own)
    _check_sizes(config.settings, own)
  except ValueError as error:
    raise ConfigError(str(error)) from error
  try:
    ALGORITHMS[config.algorithm].validate(config.settings)
  except ValueError as error:
    raise ConfigError(f'{where}: {error}') from error
  for name in ('collect', 'online'):
    gather = getattr(config, name).gather
    if not gather.prior_steps + gather.posterior_steps:
      raise ConfigError(
        f'{where}.{name}.gather: prior_steps and posterior_steps are both 0, so'
        ' nothing would be gathered'
      )


def _check_sizes(settings: Any, where: str):
  """Counts that declare no limit, in all groups; only whole numbers."""
  declared = limits.declared(type(settings))
  for field in dataclasses.fields(settings):
    value = getattr(settings, field.name)
    if dataclasses.is_dataclass(value):
      _check_sizes(value, f'{where}.{field.name}')
    elif field.name not in _SIZES or field.name in declared:
      continue
    elif type(value) is int:
      limits.require(value, limits.COUNT, f'{where}.{field.name}')


def _validate_collect(config: CollectConfig):
  """What has to go together in the phase `collect`."""
  if config.test_dataset and not config.dataset:
    raise ConfigError(
      'config.collect.test_dataset: only together with'
      ' config.collect.dataset; otherwise both are made'
    )
  gather = config.gather
  if not limits.chosen(gather, 'rewards', 'true'):
    raise ConfigError(
      'config.collect.gather.rewards: the behaviour policy has no decoder;'
      ' only "true"'
    )
  if gather.clear_context and not (
    gather.prior_steps or gather.posterior_to_context
  ):
    raise ConfigError(
      'config.collect.gather: clear_context without prior_steps or'
      ' posterior_to_context would leave nothing for contexts'
    )


def _validate_online(config: ExperimentConfig):
  """The variants of the online phase."""
  names = config.online.variants
  if not ALGORITHMS[config.algorithm].online_variants:
    raise ConfigError(
      f'config.online.variants: {config.algorithm} has no online phase on'
      ' the training tasks; set them to {}'
    )
  for name, changes in names.items():
    _check_form(name, changes, config.algorithm)
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
    _validate_variant(config, name)


def _check_form(name: Any, changes: Any, algorithm: str):
  """Whether this is a variant at all."""
  where = f'config.online.variants.{name}'
  if not isinstance(name, str) or not _NAME.fullmatch(name):
    raise ConfigError(
      f'config.online.variants: {name!r} is to be the name of a folder; only'
      ' letters, digits, "_", "-" and ".", not first'
    )
  if len(name.encode()) > _MOST_BYTES:
    raise ConfigError(
      f"config.online.variants: '{name[:20]}...' is to be the name of a folder"
      f' and has {len(name.encode())} bytes; at most {_MOST_BYTES}'
    )
  if not isinstance(changes, Mapping):
    raise ConfigError(
      f'{where}: {changes!r}, but a group is needed: a description, and the'
      ' settings that it changes'
    )
  if not isinstance(changes.get('description', ''), str):
    raise ConfigError(
      f'{where}.description: {changes["description"]!r} is no text'
    )
  if changes.get('algorithm', algorithm) != algorithm:
    raise ConfigError(
      f'{where}.algorithm: {changes["algorithm"]!r}; a variant changes the'
      f' online phase of {algorithm}, not config.algorithm'
    )
  online = changes.get('online', {})
  if isinstance(online, Mapping) and 'variants' in online:
    raise ConfigError(f'{where}: a variant cannot have variants')


def _validate_variant(config: ExperimentConfig, name: str):
  """One variant, whose form is right, against what it starts from."""
  changed = variant(config, name)
  _check(changed, f'config of variant {name!r}')
  gather = changed.online.gather
  if gather.clear_context:
    raise ConfigError(
      f'config.online.gather.clear_context of variant {name!r}:'
      ' labels need the offline part of the context buffer; only False'
    )
  for part in ALGORITHMS[config.algorithm].variant_fixed:
    if getattr(changed.settings, part) != getattr(config.settings, part):
      raise ConfigError(
        f'config.online.variants.{name}: a variant cannot change'
        f' config.{config.algorithm}.{part}'
      )
  for field in dataclasses.fields(config):
    part = field.name
    if part not in ('settings', 'online') and (
      getattr(changed, part) != getattr(config, part)
    ):
      raise ConfigError(
        f'config.online.variants.{name}: a variant changes the online'
        f' phase only, not config.{part}'
      )
