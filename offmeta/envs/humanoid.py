"""Humanoid that walks in a hidden direction.

Source: `humanoid_dir.py` of oyster and SMAC, on Brax's humanoid: r = 1.25 v_xy
. (cos, sin) - 0.1 sum(c^2) + 5 with v_xy the displacement of the centre of
mass over one control step of 0.015 s and c = 0.4 a the torque command (the
original divides by the physics step, of which there are five, and weighs the
quotient by 0.25). 200 steps, start q and qd +- U(0.01). The episode terminates
when the root's height leaves [1, 2] m or the state is not finite.

Differs from the original: no contact cost (at most 10 per step, usually tiny)
and no contact forces in the observation (Brax computes none), inertias of
links as matrices; so 244 instead of 376 numbers, Brax's. Euler instead of RK4,
only the feet touch the floor, and 'spring' and 'positional' have Brax's
stronger gears.

Task: {'angle': []} in radians. Features: [v_x, v_y] in m/s.
"""

from typing import Any, ClassVar
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import numpy as np

from offmeta.envs import base, brax_family, render, simulator as simulators
from offmeta.types import Array, Key, Task

_DT = 0.015  # seconds per control step, in every backend
_N_FRAMES = {'spring': 10, 'positional': 10, 'generalized': 5, 'mjx': 5}
_STRONG_GEAR = (350,) * 11 + (100,) * 6  # Brax's: trunk and legs, then arms
_RESET_NOISE = 0.01
_HEALTHY_HEIGHT = (1.0, 2.0)  # metres
_FORWARD_WEIGHT, _CONTROL_WEIGHT, _SURVIVE_REWARD = 1.25, 0.1, 5.0


class HumanoidDir(brax_family.BraxFamily):
  """The family.

  Task lists: 'smac' (50/5), also under the name 'default', and 'pearl'
  (100/30), uniform draws over the full circle; 'csro' (40 equally spaced,
  every fourth tests: 30/10); 'ood' (ours: train U(0, 3/2 pi), test U(3/2 pi,
  2 pi), 100/30).

  The sizes are those of the authors' code. The draws are ours, with the seed
  of their other families: oyster does not seed this one, and SMAC's list is
  not public.
  """

  name: ClassVar[str] = 'humanoid_dir'

  def __init__(
    self,
    *,
    backend: str = 'spring',
    episode_length: int = 200,
    n_frames: int | None = None,
    solver_iterations: int | None = None,
    ls_iterations: int | None = None,
  ):
    """Makes the family.

    Args:
      backend: one of `simulator.BACKENDS`.
      episode_length: time limit in steps.
      n_frames: physics steps per control step; None takes the backend's.
      solver_iterations: Newton iterations of mjx; None means 4 (Brax: 1).
      ls_iterations: line-search iterations of mjx; None means 8 (Brax: 4).

    Raises:
      ValueError: an unknown value; the message names the known ones.
    """
    base.require_choice('backend', backend, simulators.BACKENDS)
    simulator = simulators.make_simulator(
      _model_xml(backend),
      backend,
      _N_FRAMES[backend] if n_frames is None else n_frames,
      _DT,
      solver_iterations,
      ls_iterations,
    )
    self._max_control = simulator.model.actuator_ctrlrange[:, 1].astype(
      np.float32
    )
    self._mass, self._centre, self._inertia = _link_inertias(
      simulator.system, backend
    )
    super().__init__(
      simulator,
      observation_size=244,
      feature_size=2,
      episode_length=episode_length,
      terminates=True,
      reset_noise=_RESET_NOISE,
      options={},
    )

  def sample_tasks(self, key: Key, num_tasks: int) -> Task:
    """Fresh directions {'angle': [num_tasks]} ~ U(0, 2 pi)."""
    return {'angle': jax.random.uniform(key, (num_tasks,), maxval=2 * np.pi)}

  def _task_lists(self) -> base.TaskLists:
    smac = lambda: base.uniform_list('angle', 2.0 * np.pi, 50, 5)
    return {
      'default': smac,
      'smac': smac,
      'pearl': lambda: base.uniform_list('angle', 2.0 * np.pi, 100, 30),
      'csro': lambda: base.split_interleaved(
        'angle', np.linspace(0.0, 2.0 * np.pi, 40, endpoint=False)
      ),
      'ood': base.ood_angles,
    }

  def _start(self, key: Key) -> tuple[Array, Array]:
    q, qd = brax_family.uniform_start(self.simulator, key, _RESET_NOISE)
    return brax_family.with_unit_quaternion(q), qd

  def _control(self, action: Array) -> Array:
    return self._max_control * action

  def _healthy(self, physics: simulators.Physics) -> Array:
    low, high = _HEALTHY_HEIGHT
    return (low <= physics.q[2]) & (physics.q[2] <= high)

  def _centres(self, links: simulators.Links) -> tuple[Array, Array]:
    """Centres of mass: of the links from their origins [L, 3], and of all [3].

    The former are arms in world axes, the latter a position.
    """
    arms = jnp.sum(links.rotation * self._centre[:, None], axis=-1)
    return arms, jnp.average(links.position + arms, 0, self._mass)

  def _observe(self, physics: simulators.Physics, action: Array) -> Array:
    """[244]: Brax's.

    Height, rotation and joints (22), velocities (23), inertia about the common
    centre of mass and mass of each link (11 x 10), velocity of its centre of
    mass times its share of the mass and angular velocity (11 x 6), torques
    of the motors (23).
    """
    links = self.simulator.links(physics)
    arms, centre = self._centres(links)
    turned = jnp.einsum(
      'lij,ljk,lmk->lim',
      links.rotation,
      self._inertia,
      links.rotation,
      precision='highest',
    )
    away = links.position + arms - centre
    squares = jnp.sum(jnp.square(away), -1)[:, None, None] * jnp.eye(3)
    steiner = squares - away[:, :, None] * away[:, None]
    inertia = turned + self._mass[:, None, None] * steiner
    share = (self._mass / self._mass.sum())[:, None]
    velocity = links.velocity + jnp.cross(links.angular_velocity, arms)
    motors = self.simulator.system.actuator
    torques = (
      jnp.zeros_like(physics.qd)
      .at[motors.qd_id]
      .set(motors.gear * self._control(action))
    )
    return jnp.concatenate(
      [
        physics.q[2:],
        physics.qd,
        jnp.hstack([inertia.reshape(-1, 9), self._mass[:, None]]).ravel(),
        jnp.hstack([share * velocity, links.angular_velocity]).ravel(),
        torques,
      ]
    )

  def _features(
    self, before: simulators.Physics, after: simulators.Physics
  ) -> Array:
    """[v_x, v_y] of the centre of mass."""
    centre = lambda physics: self._centres(self.simulator.links(physics))[1]
    return (centre(after) - centre(before))[:2] / _DT

  def reward(self, features: Array, action: Array, task: Task) -> Array:
    """The reward [...] of features [..., 2], action [..., 17]."""
    angle = task['angle']
    forward = features[..., 0] * jnp.cos(angle) + features[..., 1] * jnp.sin(
      angle
    )
    control = self._control(base.clip_action(action))
    cost = jnp.sum(jnp.square(control), axis=-1)
    return _FORWARD_WEIGHT * forward - _CONTROL_WEIGHT * cost + _SURVIVE_REWARD

  def markers(
    self, physics: simulators.Physics, task: Task
  ) -> list[render.Geom]:
    """For pictures: an arrow in the task's direction."""
    return render.direction(physics.q[:2], task['angle'])


def _link_inertias(
  system: Any, backend: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Mass [L], centre of mass [L, 3] and inertia about it [L, 3, 3].

  In the frames of the links, as the backend simulates them: 'spring' and
  'positional' even masses and inertias out.
  """
  links = system.link.inertia
  if backend in ('spring', 'positional'):
    moments = jnp.diagonal(links.i, axis1=1, axis2=2)
    moments = moments ** (1 - system.spring_inertia_scale)
    links = links.replace(
      mass=links.mass ** (1 - system.spring_mass_scale),
      i=moments[:, :, None] * jnp.eye(3),
    )
  centre = links.transform.pos
  axes = links.transform.replace(pos=jnp.zeros_like(centre))
  with jax.default_matmul_precision('float32'):
    inertia = axes.vmap().do(links).i
  return np.asarray(links.mass), np.asarray(centre), np.asarray(inertia)


def _model_xml(backend: str) -> ElementTree.Element:
  """Brax's XML with what its Humanoid class overrides per backend."""
  xml = simulators.stock_xml('humanoid')
  if backend in ('spring', 'positional'):
    for motor, gear in zip(xml.find('actuator'), _STRONG_GEAR, strict=True):
      motor.set('gear', str(gear))
  if backend == 'mjx':
    # Gym's humanoid integrates damping explicitly too.
    ElementTree.SubElement(xml.find('option'), 'flag', eulerdamp='disable')
  return xml
