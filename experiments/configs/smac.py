"""SMAC experiments: get_config('point_robot'), get_config('ant_dir'), ...

Each family's file lists what differs from the defaults of
`offmeta.training.config.ExperimentConfig` (the published sizes), and each
size profile what differs from the family's own.
"""

import ml_collections

from experiments.configs import base, recipes

FAMILIES = base.FAMILIES
ABLATIONS = recipes.ABLATIONS  # name -> changes to the whole experiment


def get_config(family: str = 'point_robot') -> ml_collections.ConfigDict:
  """The configuration of a family, with its size profiles under 'profiles'.

  Raises:
    ValueError: an unknown family; names the known ones.
  """
  return base.make_config(*base.smac_parts(family))
