"""Planar hopper with hidden masses, inertias, damping and friction.

Tasks, reward and sources are those of `random_params.py`. Observation [11]:
height of the root's joint in metres (1.25 m at the start; gym's q[1], which
Brax's XML counts from 0), pitch and three joint angles (5 numbers in all),
then the six velocities clipped to +-10. The episode terminates when the
height falls to 0.7 m, the pitch leaves (-0.2, 0.2) rad, or a pitch, joint
angle or velocity reaches 100. Only the foot touches the floor.
"""

from typing import ClassVar

import jax.numpy as jnp

from offmeta.envs import random_params, simulator as simulators
from offmeta.types import Array


class HopperParams(random_params.RandomParams):
  """The family; see `RandomParams` for options and task lists."""

  name: ClassVar[str] = 'hopper_params'
  xml_name: ClassVar[str] = 'hopper'

  def _healthy(self, physics: simulators.Physics) -> Array:
    upright = (self._root_height(physics) > 0.7) & (jnp.abs(physics.q[2]) < 0.2)
    state = jnp.concatenate([physics.q[2:], physics.qd])
    return upright & jnp.all(jnp.abs(state) < 100.0)
