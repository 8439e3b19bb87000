"""The tiny run as a config file, for tests of the command."""

import ml_collections
import tiny_run

from offmeta.training import config as configs


def get_config():
  """Every setting, and a profile that changes none."""
  return ml_collections.ConfigDict(
    {**configs.to_dict(tiny_run.make_config()), 'profiles': {'smoke': {}}}
  )
