"""What config files share, and how one is made of its own differences.

A family's data, evaluation and seeds are the same for all algorithms. An
algorithm's file lists what it changes in the whole experiment, by size:

  SIZES = {
      'all': {'macaw': {...}},  # every profile of every family
      'cpu': {'macaw': {...}},
      'smoke': {'macaw': {...}},  # further than 'cpu'
      'paper': {'finetune': {'iterations': 500}},
  }
  FAMILIES = {'ant_dir': {'all': {...}, 'cpu': {...}}}  # further than SIZES
  get_config = base.config_of('macaw', SIZES, FAMILIES, data='sac')

Every part may be left out. Whatever no file lists has the defaults of
`offmeta.training.config` and of the algorithm. `experiments.compare` runs any
such file; `ABLATIONS` in it (name -> changes to the experiment) are for it.
"""

from collections.abc import Callable, Mapping
import inspect
from typing import Any

import ml_collections
from ml_collections import config_dict

from experiments.configs import manipulation, point_robot, recipes, robots
from offmeta import envs
from offmeta.training import config as configs

Changes = Mapping[str, Any]  # nested, to ExperimentConfig
Profiles = Mapping[str, Changes]  # name of a size -> what it changes further

FAMILIES: dict[str, tuple[Changes, Profiles]] = {
  **point_robot.FAMILIES,
  **robots.FAMILIES,
  **manipulation.FAMILIES,
}
# Which parts of an algorithm's file make up a profile, the last one winning.
_LAYERS = {
  'smoke': ('all', 'cpu', 'smoke'),
  'cpu': ('all', 'cpu'),
  'paper': ('all', 'paper'),
}


def family_parts(family: str) -> tuple[Changes, Profiles]:
  """What a family's experiment is for any algorithm.

  Args:
    family: a key of FAMILIES.

  Returns:
    (changes, profiles): family, data, evaluation, seeds; see `make_config`.

  Raises:
    ValueError: an unknown family; names the known ones.
  """
  if family not in FAMILIES:
    raise ValueError(
      f'no config for family {family!r}; known: {", ".join(FAMILIES)}'
    )
  return FAMILIES[family]


def config_of(
  algorithm: str,
  sizes: Profiles = {},
  families: Mapping[str, Profiles] = {},
  data: str = '',
  robot_data: str = '',
) -> Callable[..., ml_collections.ConfigDict]:
  """The `get_config` of an algorithm's file; see the module's example.

  Args:
    algorithm: key of offmeta.algorithms.ALGORITHMS by the time of the call.
    sizes: 'all', 'cpu', 'smoke', 'paper' -> changes to the experiment, which
      win over the family's.
    families: family -> the same; wins over `sizes` of the same name.
    data: source of the offline data, of `offmeta.training.config.SOURCES`;
      '' for the family's own.
    robot_data: the same, for robots.

  Returns:
    family -> configuration with its size profiles under 'profiles'; for every
    family that has a configuration.
  """
  for parts in (sizes, *families.values()):
    unknown = set(parts) - {'all', *_LAYERS}
    if unknown:
      raise ValueError(
        f'{algorithm}: no size {", ".join(sorted(unknown))}; known: all,'
        f' {", ".join(_LAYERS)}'
      )

  def get_config(family: str = 'point_robot') -> ml_collections.ConfigDict:
    changes, profiles = family_parts(family)
    return make_config(
      *_with_parts(
        {**changes, 'algorithm': algorithm},
        profiles,
        _from_source(family in robots.FAMILIES and robot_data or data, family),
        sizes,
        families.get(family, {}),
      )
    )

  return get_config


def data_config(family: str, source: str = '') -> ml_collections.ConfigDict:
  """For the phase `collect` alone: data that all algorithms can share.

  Args:
    family: a key of FAMILIES.
    source: as `data` of `config_of`.
  """
  return make_config(
    *_with_parts(*family_parts(family), _from_source(source, family))
  )


def _from_source(source: str, family: str) -> Profiles:
  """What a source needs besides the sizes in the families' files."""
  if not source:
    return {}
  robot = family in robots.FAMILIES
  collect = {'all': {'source': source}}
  if source == 'sac':
    whole = {'log_slice': 'all', 'context_size': 0}
    collect = {
      'all': {**collect['all'], **whole},
      'cpu': robots.SAC_LOGS if robot else {},
      'smoke': whole,
    }
  elif source == 'pearl' and robot:
    collect |= {'cpu': robots.PEARL_LOGS, 'smoke': robots.PEARL_SMOKE_LOGS}
  return {name: {'collect': part} for name, part in collect.items()}


def _with_parts(
  changes: Changes, profiles: Profiles, *parts: Profiles
) -> tuple[Changes, Profiles]:
  """(changes, profiles) of a family with what files change by size."""

  def merged(base, *layers):
    for layer in layers:
      for part in parts:
        base = recipes.merge(base, part.get(layer, {}))
    return base

  return merged(changes, 'all'), {
    name: merged(base, *_LAYERS[name]) for name, base in profiles.items()
  }


def make_config(
  changes: Changes, profiles: Profiles
) -> ml_collections.ConfigDict:
  """What a config file's `get_config` returns.

  Args:
    changes: nested, what differs from ExperimentConfig's defaults.
    profiles: name -> what that size changes further.
  """
  values = configs.to_dict(configs.from_dict(changes))
  family = values['family']
  family['options'] = _unset_options(family['name']) | family['options']
  config = ml_collections.ConfigDict(values)
  config.profiles = ml_collections.ConfigDict(profiles)
  return config


def _unset_options(family: str) -> dict[str, config_dict.FieldReference]:
  """What the command line may set further: None in the type of the default.

  `configuration.resolve` drops what stays None, so that defaults stand in the
  factory only. All defaults of None are those of whole numbers. Empty for
  unknown families and for factories that take any option.
  """
  if family not in envs.FAMILIES:
    return {}
  parameters = inspect.signature(envs.FAMILIES[family]).parameters.values()
  if any(p.kind is p.VAR_KEYWORD for p in parameters):
    return {}
  return {
    p.name: config_dict.placeholder(
      int if p.default is None else type(p.default)
    )
    for p in parameters
    if p.default is not p.empty
  }
