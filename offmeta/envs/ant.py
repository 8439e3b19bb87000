"""Ant that runs in a hidden direction.

Source: oyster's and SMAC's `ant_dir.py`, on Brax's ant: r = v_xy . (cos, sin)
- 0.5 sum(a^2) + 1 with v_xy the displacement of the torso over one control
step of 0.05 s, 200 steps, gym's noisy start (q +- 0.1, qd 0.1 N(0, 1)). The
episode terminates when the torso's height leaves [0.2, 1.0] m or the state is
not finite.

Differs from the original: no contact cost (Brax computes no contact forces on
the fast backends; the term is at most 0.042 per step, and 0 with MuJoCo 2 in
old gym), Euler instead of RK4, only the feet touch the floor, start height
0.55 instead of 0.75 m, gear 200 instead of 150 on 'positional' (as Brax).

Task: {'angle': []} in radians. Features: [v_x, v_y] in m/s.
"""

from typing import ClassVar
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import numpy as np

from offmeta.envs import base
from offmeta.envs import brax_family
from offmeta.envs import simulator as simulators
from offmeta.types import Array, Key, Task

_DT = 0.05  # seconds per control step, in every backend
# 5 frames on 'generalized', Brax's choice, go NaN in 1 of 64 random episodes.
_N_FRAMES = {'spring': 10, 'positional': 10, 'generalized': 10, 'mjx': 5}
_RESET_NOISE = 0.1
_HEALTHY_HEIGHT = (0.2, 1.0)  # metres
_CONTROL_WEIGHT, _SURVIVE_REWARD = 0.5, 1.0
# MACAW's 50 fixed draws from U(0, 2 pi), in its order, to 4 decimals.
_MACAW_ANGLES = (
    1.2034, 0.4266, 4.9448, 4.1239, 4.0057, 3.6166, 0.2454, 2.2482, 5.9419,
    0.3773, 5.4289, 5.5122, 0.3217, 4.0993, 3.4668, 3.7543, 3.0381, 1.7781,
    1.8707, 3.5281, 2.4884, 4.9556, 2.6294, 0.9042, 0.9482, 0.3471, 4.5116,
    1.8367, 1.2489, 5.2236, 3.5688, 0.5174, 3.4243, 0.9988, 4.2522, 0.7444,
    2.7960, 5.5794, 5.0094, 0.4271, 6.0368, 4.1419, 4.5162, 4.6720, 5.5778,
    0.8416, 4.8819, 5.2653, 5.2107, 0.1832)
_MACAW_TEST = (6, 17, 23, 30, 41)


class AntDir(brax_family.BraxFamily):
  """The family.

  Task lists: 'smac' (120 draws over the full circle, 100/20), also under the
  name 'default'; 'macaw' (45/5); 'pearl' (forward and backward: the same two
  tasks train and test).
  """

  name: ClassVar[str] = 'ant_dir'

  def __init__(
      self,
      *,
      backend: str = 'spring',
      reward: str = 'full',
      terminate: bool = True,
      episode_length: int = 200,
      n_frames: int | None = None,
      solver_iterations: int | None = None,
      ls_iterations: int | None = None,
  ):
    """Makes the family.

    Args:
      backend: one of `simulator.BACKENDS`.
      reward: 'full' or 'forward' (only v_xy . direction, as UNICORN).
      terminate: False (as UNICORN) lets a fallen or flying ant go on. Its
        torso then sinks through the floor, which only the feet touch.
      episode_length: time limit in steps.
      n_frames: physics steps per control step; None takes the backend's.
      solver_iterations: Newton iterations of mjx; None means 4 (Brax: 1).
      ls_iterations: line-search iterations of mjx; None means 8 (Brax: 4).

    Raises:
      ValueError: an unknown value; the message names the known ones.
    """
    base.require_choice('backend', backend, simulators.BACKENDS)
    base.require_choice('reward', reward, ('full', 'forward'))
    self._full_reward = reward == 'full'
    simulator = simulators.make_simulator(
        _model_xml(backend),
        backend,
        _N_FRAMES[backend] if n_frames is None else n_frames,
        _DT,
        solver_iterations,
        ls_iterations,
    )
    super().__init__(
        simulator,
        observation_size=27,
        feature_size=2,
        episode_length=episode_length,
        terminates=bool(terminate),
        reset_noise=_RESET_NOISE,
        options={'reward': reward, 'terminate': bool(terminate)},
    )

  def sample_tasks(self, key: Key, num_tasks: int) -> Task:
    """Fresh directions {'angle': [num_tasks]} ~ U(0, 2 pi)."""
    return {'angle': jax.random.uniform(key, (num_tasks,), maxval=2 * np.pi)}

  def _task_lists(self) -> base.TaskLists:
    return {
        'default': _smac_list,
        'smac': _smac_list,
        'macaw': _macaw_list,
        'pearl': _pearl_list,
    }

  def _start(self, key: Key) -> tuple[Array, Array]:
    """Gym's noisy start with a normalised quaternion."""
    q, qd = super()._start(key)
    rotation = q[3:7] / jnp.linalg.norm(q[3:7])
    return jnp.concatenate([q[:3], rotation, q[7:]]), qd

  def _observe(self, physics: simulators.Physics, action: Array) -> Array:
    """[27]: height, quaternion and joints (13), velocities (14)."""
    del action
    return jnp.concatenate([physics.q[2:], physics.qd])

  def _features(
      self, before: simulators.Physics, after: simulators.Physics) -> Array:
    return (after.q[:2] - before.q[:2]) / _DT

  def _healthy(self, physics: simulators.Physics) -> Array:
    low, high = _HEALTHY_HEIGHT
    return (low <= physics.q[2]) & (physics.q[2] <= high)

  def reward(self, features: Array, action: Array, task: Task) -> Array:
    """The reward [...] of features [..., 2], action [..., 8]."""
    angle = task['angle']
    forward = (
        features[..., 0] * jnp.cos(angle) + features[..., 1] * jnp.sin(angle))
    if not self._full_reward:
      return forward
    cost = jnp.sum(jnp.square(base.clip_action(action)), axis=-1)
    return forward - _CONTROL_WEIGHT * cost + _SURVIVE_REWARD


def _model_xml(backend: str) -> ElementTree.Element:
  """Brax's XML with what its Ant class overrides per backend."""
  xml = simulators.stock_xml('ant')
  if backend == 'positional':
    for motor in xml.find('actuator'):
      motor.set('gear', '200')
  if backend == 'mjx':
    # Gym's ant integrates damping explicitly too.
    ElementTree.SubElement(xml.find('option'), 'flag', eulerdamp='disable')
  return xml


def _smac_list() -> tuple[Task, Task]:
  """Uniform draws in degrees, in order: first 100 train, last 20 test."""
  degrees = base.published_random().uniform(0.0, 360.0, 120)
  return base.split_tasks(
      'angle', np.deg2rad(degrees), np.arange(100), np.arange(100, 120))


def _macaw_list() -> tuple[Task, Task]:
  train = np.setdiff1d(np.arange(len(_MACAW_ANGLES)), _MACAW_TEST)
  return base.split_tasks(
      'angle', np.asarray(_MACAW_ANGLES), train, _MACAW_TEST)


def _pearl_list() -> tuple[Task, Task]:
  return base.split_tasks('angle', np.array([0.0, np.pi]), [0, 1], [0, 1])
