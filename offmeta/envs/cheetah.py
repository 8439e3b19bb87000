"""Half-cheetah that runs at a hidden velocity or in a hidden direction.

Source: `half_cheetah_vel.py` of oyster and SMAC and oyster's
`half_cheetah_dir.py`, on Brax's half-cheetah: r = -|v_x - v*| - 0.05 sum(a^2)
or r = d v_x - 0.05 sum(a^2), with v_x the displacement of the torso over one
control step of 0.05 s; 200 steps, no termination, gym's noisy start (q +-
0.1, qd 0.1 N(0, 1)).

Differs from the original: Euler instead of RK4, only head, thighs and feet
touch the floor, and 'spring' and 'positional' drive the front shin and foot
with gear 100 instead of 60 and 30 (as Brax does).

Task: {'velocity': []} in m/s, or {'direction': []}, 1 or -1. Features: [v_x]
in m/s.
"""

import abc
from typing import ClassVar
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import numpy as np

from offmeta.envs import base, brax_family, simulator as simulators
from offmeta.types import Array, Key, Task

_DT = 0.05  # seconds per control step, in every backend
_N_FRAMES = {'spring': 16, 'positional': 16, 'generalized': 5, 'mjx': 5}
_STRONG_GEAR = (120, 90, 60, 120, 100, 100)  # Brax's, spring and positional
_RESET_NOISE = 0.1
_MAX_VELOCITY = 3.0  # m/s, of targets
_OBSERVATION_SIZES = {'paper': 20, 'gym': 17}


class _Cheetah(brax_family.BraxFamily):
  """Body, observation and control cost; a subclass rewards the speed."""

  def __init__(
    self,
    *,
    backend: str = 'spring',
    observation: str = 'paper',
    control_weight: float = 0.05,
    episode_length: int = 200,
    n_frames: int | None = None,
    solver_iterations: int | None = None,
    ls_iterations: int | None = None,
  ):
    """Makes the family.

    Args:
      backend: one of `simulator.BACKENDS`.
      observation: 'paper' (q[1:], qd, torso position xyz: 20 numbers, the
        absolute x among them, as PEARL, MACAW and SMAC) or 'gym' (without
        the position: 17).
      control_weight: of sum(a^2) in the reward; gym and Brax have 0.1.
      episode_length: time limit in steps.
      n_frames: physics steps per control step; None takes the backend's.
      solver_iterations: Newton iterations of mjx; None means 4.
      ls_iterations: line-search iterations of mjx; None means 8.

    Raises:
      ValueError: an unknown value; the message names the known ones.
    """
    base.require_choice('backend', backend, simulators.BACKENDS)
    base.require_choice('observation', observation, tuple(_OBSERVATION_SIZES))
    base.require_number('control_weight', control_weight)
    self._paper_observation = observation == 'paper'
    self._control_weight = float(control_weight)
    simulator = simulators.make_simulator(
      _model_xml(backend),
      backend,
      _N_FRAMES[backend] if n_frames is None else n_frames,
      _DT,
      solver_iterations,
      ls_iterations,
    )
    # The torso's joints slide from this height.
    self._height = float(simulator.model.body('torso').pos[2])
    super().__init__(
      simulator,
      observation_size=_OBSERVATION_SIZES[observation],
      feature_size=1,
      episode_length=episode_length,
      terminates=False,
      reset_noise=_RESET_NOISE,
      options={
        'observation': observation,
        'control_weight': self._control_weight,
      },
    )

  def _features(
    self, before: simulators.Physics, after: simulators.Physics
  ) -> Array:
    """[v_x]: the first coordinate is the torso's x."""
    return (after.q[:1] - before.q[:1]) / _DT

  def reward(self, features: Array, action: Array, task: Task) -> Array:
    """The reward [...] of features [..., 1], action [..., 6]."""
    cost = jnp.sum(jnp.square(base.clip_action(action)), axis=-1)
    speed = self._speed_reward(features[..., 0], task)
    return speed - self._control_weight * cost

  @abc.abstractmethod
  def _speed_reward(self, velocity: Array, task: Task) -> Array:
    """What the task pays [...] for v_x [...] in m/s."""

  def _observe(self, physics: simulators.Physics, action: Array) -> Array:
    """[20] or [17]. The first two of q are the torso's x and height."""
    del action
    q, qd = physics.q, physics.qd
    parts = [q[1:], qd]
    if self._paper_observation:
      parts.append(jnp.stack([q[0], jnp.zeros_like(q[0]), q[1] + self._height]))
    return jnp.concatenate(parts)


class CheetahVel(_Cheetah):
  """Forward at a target velocity.

  Task lists: 'smac' (130 draws, 100/30), also under the names 'pearl' and
  'default'; 'focal' (100 draws, 80/20) and 'borel' (120 draws, 100/20) from
  the same generator; 'macaw' (40 equally spaced, 35/5) and MACAW's other
  splits of these, 'macaw_half', '_quarter', '_eighth', '_sixteenth' (every
  2nd to 16th trains, the others test) and '_extrapolation' (trains up to 1.95
  m/s, tests above); 'csro' (40 equally spaced in [1, 3], every fourth tests:
  30/10); 'ood' (ours: train U(0, 2), test U(2, 3), 100/30).
  """

  name: ClassVar[str] = 'cheetah_vel'

  def sample_tasks(self, key: Key, num_tasks: int) -> Task:
    """Fresh targets {'velocity': [num_tasks]} ~ U(0, 3) m/s."""
    return {
      'velocity': jax.random.uniform(key, (num_tasks,), maxval=_MAX_VELOCITY)
    }

  def _task_lists(self) -> base.TaskLists:
    uniform = lambda num_train, num_test: (
      lambda: base.uniform_list('velocity', _MAX_VELOCITY, num_train, num_test)
    )
    smac = uniform(100, 30)
    return {
      'default': smac,
      'smac': smac,
      'pearl': smac,
      'focal': uniform(80, 20),
      'borel': uniform(100, 20),
      **_macaw_lists(),
      'csro': lambda: base.split_interleaved(
        'velocity', np.linspace(1.0, 3.0, 40)
      ),
      'ood': _ood_velocities,
    }

  def _speed_reward(self, velocity: Array, task: Task) -> Array:
    return -jnp.abs(velocity - task['velocity'])


class CheetahDir(_Cheetah):
  """Forward or backward, as fast as possible.

  There are only two tasks. Task lists: both of them train and test, backward
  first in 'pearl' (= 'default'), forward first in 'macaw'; so there is nothing
  out of distribution, and no list 'ood'.
  """

  name: ClassVar[str] = 'cheetah_dir'

  def sample_tasks(self, key: Key, num_tasks: int) -> Task:
    """Fresh {'direction': [num_tasks]}, -1 or 1 with equal probability."""
    return {'direction': jax.random.rademacher(key, (num_tasks,), jnp.float32)}

  def _task_lists(self) -> base.TaskLists:
    both = lambda order: (
      lambda: base.split_tasks('direction', np.array([-1.0, 1.0]), order, order)
    )
    pearl = both([0, 1])
    return {'default': pearl, 'pearl': pearl, 'macaw': both([1, 0])}

  def _speed_reward(self, velocity: Array, task: Task) -> Array:
    return task['direction'] * velocity


def _model_xml(backend: str) -> ElementTree.Element:
  """Brax's XML with explicit masses and the backend's gear."""
  xml = simulators.stock_xml('half_cheetah')
  simulators.fix_total_mass(xml)
  if backend in ('spring', 'positional'):
    for motor, gear in zip(xml.find('actuator'), _STRONG_GEAR, strict=True):
      motor.set('gear', str(gear))
  return xml


def _macaw_lists() -> base.TaskLists:
  """MACAW's splits of its 40 tasks, by the indices of its configs."""
  every = np.arange(40)
  standard = np.setdiff1d(every, (2, 7, 15, 23, 26))
  train = {
    'macaw': standard,
    'macaw_half': every[::2],
    'macaw_quarter': every[::4],
    'macaw_eighth': every[::8],
    'macaw_sixteenth': every[::16],
    'macaw_extrapolation': every[:26],
  }
  return {
    name: lambda index=index: base.split_tasks(
      'velocity', np.linspace(0.075, 3.0, 40), index, np.setdiff1d(every, index)
    )
    for name, index in train.items()
  }


def _ood_velocities() -> tuple[Task, Task]:
  draws = base.ood_draws(
    base.published_random(), (0.0, 2.0), (2.0, _MAX_VELOCITY)
  )
  return base.split_first('velocity', draws, base.OOD_TRAIN)
