"""SMAC experiments: get_config('point_robot'), get_config('ant_dir'), ..."""

import ml_collections

from experiments.configs import base, recipes, smac_families

ABLATIONS = recipes.ABLATIONS  # name -> changes to the whole experiment


def get_config(family: str = 'point_robot') -> ml_collections.ConfigDict:
  """The configuration of a family, with its size profiles under 'profiles'.

  Raises:
    ValueError: an unknown family; names the known ones.
  """
  return base.make_config(*smac_families.parts(family))
