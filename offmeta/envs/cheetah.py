"""Half-cheetah that runs forward at a hidden target velocity.

Source: oyster's and SMAC's `half_cheetah_vel.py`, on Brax's half-cheetah:
r = -|v_x - v*| - 0.05 sum(a^2) with v_x the displacement of the torso over
one control step of 0.05 s, 200 steps, no termination. A simulation that blows
up is not a rule of the task: that step has terminal 1, velocity 0 and the
observation from before, and the body stays where it was.

Differs from the original: Euler instead of RK4, only head, thighs and feet
touch the floor, and 'spring' and 'positional' drive the front shin and foot
with gear 100 instead of 60 and 30 (as Brax does).

Task: {'velocity': []} in m/s. Features: [v_x] in m/s.
"""

from typing import ClassVar
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import numpy as np

from offmeta.envs import base
from offmeta.envs import brax_base
from offmeta.types import Array, EnvSpec, EnvState, Key, Task

_DT = 0.05  # seconds per control step, in every backend
_N_FRAMES = {'spring': 16, 'positional': 16, 'generalized': 5, 'mjx': 5}
_STRONG_GEAR = (120, 90, 60, 120, 100, 100)  # Brax's, spring and positional
_RESET_NOISE = 0.1
_OBSERVATION_SIZES = {'paper': 20, 'gym': 17}


class CheetahVel:
  """The family.

  Task lists: 'smac' (130 draws, 100/30), also under the names 'pearl' and
  'default'; 'focal' (100 draws, 80/20) and 'borel' (120 draws, 100/20) from
  the same generator; 'macaw' (40 equally spaced, 35/5).
  """

  name: ClassVar[str] = 'cheetah_vel'

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
      backend: one of `brax_base.BACKENDS`.
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
    base.require_choice('backend', backend, brax_base.BACKENDS)
    base.require_choice('observation', observation, tuple(_OBSERVATION_SIZES))
    base.require_count('episode_length', episode_length)
    self._observation = observation
    self._control_weight = float(control_weight)
    self.simulator = brax_base.make_simulator(
        _model_xml(backend),
        backend,
        _N_FRAMES[backend] if n_frames is None else n_frames,
        _DT,
        solver_iterations,
        ls_iterations,
    )
    # The torso's joints slide from this height.
    self._height = float(self.simulator.model.body('torso').pos[2])
    self.spec = EnvSpec(
        name=self.name,
        observation_size=_OBSERVATION_SIZES[observation],
        action_size=int(self.simulator.model.nu),
        feature_size=1,
        episode_length=episode_length,
        terminates=False,
        options={
            **self.simulator.options,
            'observation': observation,
            'control_weight': self._control_weight,
            'episode_length': episode_length,
            'reset_noise': _RESET_NOISE,
        },
    )

  def sample_tasks(self, key: Key, num_tasks: int) -> Task:
    """Fresh targets {'velocity': [num_tasks]} ~ U(0, 3) m/s."""
    return {'velocity': jax.random.uniform(key, (num_tasks,), maxval=3.0)}

  def task_list(self, name: str) -> tuple[Task, Task]:
    """A (train, test) list by name; ValueError names the known ones."""
    smac = lambda: _uniform_list(100, 30)
    return base.select_list(self.name, {
        'default': smac,
        'smac': smac,
        'pearl': smac,
        'focal': lambda: _uniform_list(80, 20),
        'borel': lambda: _uniform_list(100, 20),
        'macaw': _macaw_list,
    }, name)

  def reset(self, key: Key, task: Task) -> EnvState:
    """Gym's noisy start: q +- 0.1, qd 0.1 N(0, 1)."""
    del task
    physics = self.simulator.init(
        *brax_base.noisy_start(self.simulator, key, _RESET_NOISE))
    zero = jnp.zeros(())
    return EnvState(
        physics, self._observe(physics), zero, zero, jnp.zeros((1,)))

  def step(self, state: EnvState, action: Array, task: Task) -> EnvState:
    """0.05 s; action [6] is clipped to [-1, 1]."""
    action = base.clip_action(action)
    physics, finite = self.simulator.step(state.physics, action)
    velocity = (physics.q[0] - state.physics.q[0]) / _DT
    features = velocity[None]
    return EnvState(
        physics=physics,
        observation=self._observe(physics),
        reward=self.reward(features, action, task),
        terminal=jnp.logical_not(finite).astype(jnp.float32),
        features=features,
    )

  def reward(self, features: Array, action: Array, task: Task) -> Array:
    """-|v_x - v*| - 0.05 sum(a^2) of features [..., 1], action [..., 6]."""
    cost = jnp.sum(jnp.square(base.clip_action(action)), axis=-1)
    error = jnp.abs(features[..., 0] - task['velocity'])
    return -error - self._control_weight * cost

  def _observe(self, physics: brax_base.Physics) -> Array:
    """[20] or [17]. The first two of q are the torso's x and height."""
    q, qd = physics.q, physics.qd
    parts = [q[1:], qd]
    if self._observation == 'paper':
      parts.append(jnp.stack([q[0], jnp.zeros_like(q[0]), q[1] + self._height]))
    return jnp.concatenate(parts)


def _model_xml(backend: str) -> ElementTree.Element:
  """Brax's XML with explicit masses and the backend's gear."""
  xml = brax_base.stock_xml('half_cheetah')
  brax_base.fix_total_mass(xml)
  if backend in ('spring', 'positional'):
    for motor, gear in zip(xml.find('actuator'), _STRONG_GEAR, strict=True):
      motor.set('gear', str(gear))
  return xml


def _uniform_list(num_train: int, num_test: int) -> tuple[Task, Task]:
  """Uniform draws in order: the first train, the last test."""
  total = num_train + num_test
  velocity = base.published_random().uniform(0.0, 3.0, total)
  return base.split_tasks(
      'velocity', velocity, np.arange(num_train), np.arange(num_train, total))


def _macaw_list() -> tuple[Task, Task]:
  """MACAW's standard split, indices of its config."""
  velocity = np.linspace(0.075, 3.0, 40)
  test = (2, 7, 15, 23, 26)
  train = np.setdiff1d(np.arange(40), test)
  return base.split_tasks('velocity', velocity, train, test)
