"""Planar walker with hidden masses, inertias, damping and friction.

Tasks, reward and sources are those of `random_params.py`. Observation [17]:
height of the root's joint in metres (1.25 m at the start; gym's q[1], which
Brax's XML counts from 0), pitch and six joint angles (8 numbers in all), then
the nine velocities clipped to +-10. The episode terminates when the height
leaves (0.8, 2.0) m or the pitch (-1, 1) rad. Torso and feet touch the floor.
"""

from typing import ClassVar

import jax.numpy as jnp

from offmeta.envs import random_params, simulator as simulators
from offmeta.types import Array


class WalkerParams(random_params.RandomParams):
  """The family; see `RandomParams` for options and task lists."""

  name: ClassVar[str] = 'walker_params'
  xml_name: ClassVar[str] = 'walker2d'

  def _healthy(self, physics: simulators.Physics) -> Array:
    height, pitch = self._root_height(physics), physics.q[2]
    return (0.8 < height) & (height < 2.0) & (jnp.abs(pitch) < 1.0)
