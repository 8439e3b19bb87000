"""SMAC experiments: get_config('point_robot'), get_config('ant_dir'), ...

Each family's file lists what differs from the defaults of
`offmeta.training.config.ExperimentConfig` (the published sizes), and each
size profile what differs from the family's own.
"""

from collections.abc import Mapping
from typing import Any

import ml_collections

from experiments.configs import manipulation, point_robot, robots
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
  config = ml_collections.ConfigDict(
      configs.to_dict(configs.from_dict(changes)))
  config.profiles = ml_collections.ConfigDict(profiles)
  return config


def get_config(family: str = 'point_robot') -> ml_collections.ConfigDict:
  """The configuration of a family, with its size profiles under 'profiles'.

  Raises:
    ValueError: an unknown family; names the known ones.
  """
  if family not in FAMILIES:
    raise ValueError(
        f'no config for family {family!r}; known: {", ".join(FAMILIES)}')
  return make_config(*FAMILIES[family])
