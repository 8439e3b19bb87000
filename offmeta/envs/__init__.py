"""Task families by name.

Importing this package imports no simulator: Brax and MuJoCo are imported when
a family that needs them is made.
"""

from collections.abc import Callable
import inspect
from typing import Any

from offmeta.envs.ant import AntDir, AntGoal
from offmeta.envs.base import (
  concatenate_tasks,
  num_tasks,
  take_tasks,
)
from offmeta.envs.cheetah import CheetahDir, CheetahVel
from offmeta.envs.hopper_params import HopperParams
from offmeta.envs.humanoid import HumanoidDir
from offmeta.envs.manipulation import Manipulation
from offmeta.envs.point_robot import PointRobot, SparsePointRobot
from offmeta.envs.walker_params import WalkerParams
from offmeta.types import EnvFamily

FAMILIES: dict[str, Callable[..., EnvFamily]] = {
  'ant_dir': AntDir,
  'ant_goal': AntGoal,
  'cheetah_dir': CheetahDir,
  'cheetah_vel': CheetahVel,
  'hopper_params': HopperParams,
  'humanoid_dir': HumanoidDir,
  'manipulation': Manipulation,
  'point_robot': PointRobot,
  'sparse_point_robot': SparsePointRobot,
  'walker_params': WalkerParams,
}


def make(name: str, **options: Any) -> EnvFamily:
  """Makes a family.

  Args:
    name: a key of FAMILIES.
    **options: keyword arguments of its factory.

  Raises:
    ValueError: unknown name, option or value; the message has the known ones.
  """
  if name not in FAMILIES:
    raise ValueError(
      f'unknown family {name!r}; known: {", ".join(sorted(FAMILIES))}'
    )
  parameters = inspect.signature(FAMILIES[name]).parameters
  takes_any = any(
    p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()
  )
  unknown = sorted(set(options) - set(parameters))
  if unknown and not takes_any:
    raise ValueError(
      f'unknown option {", ".join(map(repr, unknown))} of family {name!r}; '
      f'known: {", ".join(sorted(parameters)) or "none"}'
    )
  return FAMILIES[name](**options)


def register(name: str, factory: Callable[..., EnvFamily]) -> None:
  """Adds a family of your own: factory(**options) -> EnvFamily.

  Raises:
    ValueError: the name is taken.
  """
  if name in FAMILIES:
    raise ValueError(f'family {name!r} is already registered')
  FAMILIES[name] = factory


__all__ = [
  'FAMILIES',
  'concatenate_tasks',
  'make',
  'num_tasks',
  'register',
  'take_tasks',
]
