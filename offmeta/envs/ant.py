"""Ant that runs in a hidden direction or to a hidden goal.

Source: `ant_dir.py` and `ant_goal.py` of oyster and the former of SMAC, on
Brax's ant; control steps of 0.05 s, 200 steps, gym's noisy start (q +- 0.1,
qd 0.1 N(0, 1)).

* Direction: r = v_xy . (cos, sin) - 0.5 sum(a^2) + 1, v_xy the displacement of
  the torso over one control step. Terminates when the torso's height leaves
  [0.2, 1.0] m or the state is not finite.
* Goal: r = -|x - g_x| - |y - g_y| - 0.1 sum(a^2) with the torso's position
  after the step. Never terminates.

Differs from the original: no contact cost (Brax computes no contact forces on
the fast backends; the term is at most 0.042 per step, and 0 with MuJoCo 2 in
old gym) and none of oyster's contact forces in the goal family's observation
(as CSRO); Euler instead of RK4, only the feet touch the floor (in the goal
family the torso too), start height 0.55 instead of 0.75 m, gear 200 instead of
150 on 'positional' (as Brax).

Task: {'angle': []} in radians, or {'goal': [2]} in metres. Features: [v_x,
v_y] in m/s, or [x, y] in metres.
"""

from typing import Any, ClassVar
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import numpy as np

from offmeta.envs import base, brax_family, render, simulator as simulators
from offmeta.types import Array, Key, Task

_DT = 0.05  # seconds per control step, in every backend
# 5 frames on 'generalized', Brax's choice, go NaN in 1 of 64 random episodes.
_N_FRAMES = {'spring': 10, 'positional': 10, 'generalized': 10, 'mjx': 5}
_RESET_NOISE = 0.1
_HEALTHY_HEIGHT = (0.2, 1.0)  # metres
_DIR_CONTROL_WEIGHT, _GOAL_CONTROL_WEIGHT = 0.5, 0.1
_SURVIVE_REWARD = 1.0
_MAX_RADIUS = 3.0  # metres, of goals
# MACAW's 50 fixed draws from U(0, 2 pi), in its order, to 4 decimals.
_MACAW_ANGLES = (
  1.2034,
  0.4266,
  4.9448,
  4.1239,
  4.0057,
  3.6166,
  0.2454,
  2.2482,
  5.9419,
  0.3773,
  5.4289,
  5.5122,
  0.3217,
  4.0993,
  3.4668,
  3.7543,
  3.0381,
  1.7781,
  1.8707,
  3.5281,
  2.4884,
  4.9556,
  2.6294,
  0.9042,
  0.9482,
  0.3471,
  4.5116,
  1.8367,
  1.2489,
  5.2236,
  3.5688,
  0.5174,
  3.4243,
  0.9988,
  4.2522,
  0.7444,
  2.7960,
  5.5794,
  5.0094,
  0.4271,
  6.0368,
  4.1419,
  4.5162,
  4.6720,
  5.5778,
  0.8416,
  4.8819,
  5.2653,
  5.2107,
  0.1832,
)
_MACAW_TEST = (6, 17, 23, 30, 41)


class _Ant(brax_family.BraxFamily):
  """Body and start.

  Args:
    backend, n_frames, solver_iterations, ls_iterations: as of the families.
    torso_contact: whether the torso touches the floor.
    **family: of `BraxFamily`.
  """

  def __init__(
    self,
    backend: str,
    n_frames: int | None,
    solver_iterations: int | None,
    ls_iterations: int | None,
    *,
    torso_contact: bool,
    **family: Any,
  ):
    base.require_choice('backend', backend, simulators.BACKENDS)
    simulator = simulators.make_simulator(
      _model_xml(backend, torso_contact),
      backend,
      _N_FRAMES[backend] if n_frames is None else n_frames,
      _DT,
      solver_iterations,
      ls_iterations,
    )
    super().__init__(
      simulator, feature_size=2, reset_noise=_RESET_NOISE, **family
    )

  def _start(self, key: Key) -> tuple[Array, Array]:
    """Gym's noisy start with a normalised quaternion."""
    q, qd = super()._start(key)
    return brax_family.with_unit_quaternion(q), qd


class AntDir(_Ant):
  """As fast as possible in a direction.

  Task lists: 'smac' (120 draws over the full circle, 100/20), also under the
  name 'default'; 'macaw' (45/5); 'pearl' (forward and backward: the same two
  tasks train and test); 'ood' (ours: train U(0, 3/2 pi), test U(3/2 pi, 2 pi),
  100/30).
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
    base.require_choice('reward', reward, ('full', 'forward'))
    base.require_bool('terminate', terminate)
    self._full_reward = reward == 'full'
    super().__init__(
      backend,
      n_frames,
      solver_iterations,
      ls_iterations,
      torso_contact=False,
      observation_size=27,
      episode_length=episode_length,
      terminates=terminate,
      options={'reward': reward, 'terminate': terminate},
    )

  def sample_tasks(self, key: Key, num_tasks: int) -> Task:
    """Fresh directions {'angle': [num_tasks]} ~ U(0, 2 pi)."""
    return {'angle': jax.random.uniform(key, (num_tasks,), maxval=2 * np.pi)}

  def _task_lists(self) -> base.TaskLists:
    smac = lambda: base.uniform_list('angle', 2.0 * np.pi, 100, 20)
    return {
      'default': smac,
      'smac': smac,
      'macaw': _macaw_angles,
      'pearl': lambda: base.split_tasks(
        'angle', np.array([0.0, np.pi]), [0, 1], [0, 1]
      ),
      'ood': base.ood_angles,
    }

  def _observe(self, physics: simulators.Physics, action: Array) -> Array:
    """[27]: height, quaternion and joints (13), velocities (14)."""
    del action
    return jnp.concatenate([physics.q[2:], physics.qd])

  def _features(
    self, before: simulators.Physics, after: simulators.Physics
  ) -> Array:
    return (after.q[:2] - before.q[:2]) / _DT

  def _healthy(self, physics: simulators.Physics) -> Array:
    low, high = _HEALTHY_HEIGHT
    return (low <= physics.q[2]) & (physics.q[2] <= high)

  def reward(self, features: Array, action: Array, task: Task) -> Array:
    """The reward [...] of features [..., 2], action [..., 8]."""
    angle = task['angle']
    forward = features[..., 0] * jnp.cos(angle) + features[..., 1] * jnp.sin(
      angle
    )
    if not self._full_reward:
      return forward
    cost = jnp.sum(jnp.square(base.clip_action(action)), axis=-1)
    return forward - _DIR_CONTROL_WEIGHT * cost + _SURVIVE_REWARD

  def markers(
    self, physics: simulators.Physics, task: Task
  ) -> list[render.Geom]:
    """For pictures: an arrow in the task's direction."""
    return render.direction(physics.q[:2], task['angle'])


class AntGoal(_Ant):
  """To a goal on the floor.

  Task lists: 'pearl' (goals uniform on the disc of radius 3 m, 150/30), also
  under the name 'default'; 'csro' (40 equally spaced on the circle of radius
  2 m, every fourth tests: 30/10); 'ood' (ours: uniform on discs, train within
  2 m of the origin, test beyond, up to 3 m, 100/30).
  """

  name: ClassVar[str] = 'ant_goal'

  def __init__(
    self,
    *,
    backend: str = 'spring',
    episode_length: int = 200,
    n_frames: int | None = None,
    solver_iterations: int | None = None,
    ls_iterations: int | None = None,
  ):
    """Makes the family; for the options see `AntDir`."""
    super().__init__(
      backend,
      n_frames,
      solver_iterations,
      ls_iterations,
      # There is no termination, and a torso that only the feet keep up
      # would sink through the floor.
      torso_contact=True,
      observation_size=29,
      episode_length=episode_length,
      terminates=False,
      options={},
    )

  def sample_tasks(self, key: Key, num_tasks: int) -> Task:
    """Fresh goals {'goal': [num_tasks, 2]}, uniform on the disc."""
    turns, area = jax.random.uniform(key, (2, num_tasks))
    return {'goal': _polar(2.0 * np.pi * turns, _MAX_RADIUS * jnp.sqrt(area))}

  def _task_lists(self) -> base.TaskLists:
    return {
      'default': _pearl_goals,
      'pearl': _pearl_goals,
      'csro': _csro_goals,
      'ood': _ood_goals,
    }

  def _observe(self, physics: simulators.Physics, action: Array) -> Array:
    """[29]: position, quaternion and joints (15), velocities (14)."""
    del action
    return jnp.concatenate([physics.q, physics.qd])

  def _features(
    self, before: simulators.Physics, after: simulators.Physics
  ) -> Array:
    """[x, y] of the torso."""
    del before
    return after.q[:2]

  def reward(self, features: Array, action: Array, task: Task) -> Array:
    """The reward [...] of features [..., 2], action [..., 8]."""
    distance = jnp.sum(jnp.abs(features - task['goal']), axis=-1)
    cost = jnp.sum(jnp.square(base.clip_action(action)), axis=-1)
    return -distance - _GOAL_CONTROL_WEIGHT * cost

  def position(self, observation: Array) -> Array:
    """Of the torso in metres: [..., 29] -> [..., 2]."""
    return observation[..., :2]

  def markers(
    self, physics: simulators.Physics, task: Task
  ) -> list[render.Geom]:
    """For pictures: the goal."""
    del physics
    return [render.goal(task['goal'], 0.15)]


def _model_xml(backend: str, torso_contact: bool) -> ElementTree.Element:
  """Brax's XML with what its Ant class overrides per backend."""
  xml = simulators.stock_xml('ant')
  if torso_contact:
    xml.find(".//geom[@name='torso_geom']").set('contype', '1')
  if backend == 'positional':
    for motor in xml.find('actuator'):
      motor.set('gear', '200')
  if backend == 'mjx':
    # Gym's ant integrates damping explicitly too.
    ElementTree.SubElement(xml.find('option'), 'flag', eulerdamp='disable')
  return xml


def _macaw_angles() -> tuple[Task, Task]:
  train = np.setdiff1d(np.arange(len(_MACAW_ANGLES)), _MACAW_TEST)
  return base.split_tasks(
    'angle', np.asarray(_MACAW_ANGLES), train, _MACAW_TEST
  )


def _polar(angle: Array | np.ndarray, radius: Any) -> Array:
  """Points [M, 2] at angles [M] and at a radius [] or radii [M]."""
  return jnp.stack([radius * jnp.cos(angle), radius * jnp.sin(angle)], axis=-1)


def _pearl_goals() -> tuple[Task, Task]:
  """Oyster's draws in its order: all angles, then all radii.

  Oyster does not seed this family, so the goals of its runs differ from run
  to run and from these; the seed is the one of its other families.
  """
  random = base.published_random()
  angle = 2.0 * np.pi * random.uniform(size=180)
  radius = _MAX_RADIUS * np.sqrt(random.uniform(size=180))
  return base.split_first('goal', _polar(angle, radius), 150)


def _csro_goals() -> tuple[Task, Task]:
  angle = np.linspace(0.0, 2.0 * np.pi, 40, endpoint=False)
  return base.split_interleaved('goal', _polar(angle, 2.0))


def _ood_goals() -> tuple[Task, Task]:
  """Squared radii are uniform in [0, 4] and in [4, 9] square metres."""
  random = base.published_random()
  squared = base.ood_draws(random, (0.0, 4.0), (4.0, _MAX_RADIUS**2))
  angle = random.uniform(0.0, 2.0 * np.pi, len(squared))
  return base.split_first(
    'goal', _polar(angle, np.sqrt(squared)), base.OOD_TRAIN
  )
