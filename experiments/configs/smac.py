"""SMAC experiments: get_config('point_robot'), get_config('ant_dir'), ...

Each family's file lists what differs from the defaults of
`offmeta.training.config.ExperimentConfig` (the published sizes), and each
size profile what differs from the family's own.
"""

from collections.abc import Mapping
import inspect
from typing import Any

import ml_collections
from ml_collections import config_dict

from experiments.configs import manipulation, point_robot, robots
from offmeta import envs
from offmeta.training import config as configs

FAMILIES = {
    **point_robot.FAMILIES,
    **robots.FAMILIES,
    **manipulation.FAMILIES,
}


def make_config(
    changes: Mapping[str, Any], profiles: Mapping[str, Mapping[str, Any]]
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

  `launch.resolve` drops what stays None, so that defaults stand in the
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
          int if p.default is None else type(p.default))
      for p in parameters if p.default is not p.empty}


def get_config(family: str = 'point_robot') -> ml_collections.ConfigDict:
  """The configuration of a family, with its size profiles under 'profiles'.

  Raises:
    ValueError: an unknown family; names the known ones.
  """
  if family not in FAMILIES:
    raise ValueError(
        f'no config for family {family!r}; known: {", ".join(FAMILIES)}')
  return make_config(*FAMILIES[family])
