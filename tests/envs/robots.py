"""Compiled families on simulated bodies, and the comparison with C MuJoCo."""

import copy
from typing import Any, NamedTuple

import jax
import mujoco
import numpy as np

from offmeta import envs


class Robot(NamedTuple):
  """A family with its compiled functions."""

  family: Any
  reset: Any
  step: Any


def compiled(name: str, **options: Any) -> Robot:
  """`envs.make` with jitted reset and step."""
  family = envs.make(name, **options)
  return Robot(family, jax.jit(family.reset), jax.jit(family.step))


# Tasks in numpy, of one program: outside jit, jax compiles one for every
# operation and shape.


def sample_tasks(family: Any, seed: int, num_tasks: int):
  """`family.sample_tasks` of a key of this seed."""
  return jax.device_get(
    jax.jit(lambda: family.sample_tasks(jax.random.key(seed), num_tasks))()
  )


def task_lists(family: Any, *names: str):
  """`family.task_list` of each name."""
  return jax.device_get(
    jax.jit(lambda: [family.task_list(name) for name in names])()
  )


def placed(robot: Robot, task: Any, seed: int, root: Any):
  """A start state at rest with its free root at q[2:7] = `root`.

  Args:
    root: height and quaternion.
  """
  state = robot.reset(jax.random.key(seed), task)
  q, qd = np.array(state.physics.q), np.zeros_like(state.physics.qd)
  q[2:7] = root
  physics = jax.jit(robot.family.simulator.init)(q, qd)
  return state._replace(physics=physics)


def rollout(robot: Robot, task: Any, seed: int, steps: int, start: Any = None):
  """States [steps + 1] and numpy actions [steps, A] within [-1, 1]."""
  actions = (
    np.random.RandomState(seed)
    .uniform(-1, 1, (steps, robot.family.spec.action_size))
    .astype(np.float32)
  )
  if start is None:
    start = robot.reset(jax.random.key(seed), task)
  states = [start]
  for action in actions:
    states.append(robot.step(states[-1], action, task))
  return states, actions


def assert_follows_c_mujoco(
  robot: Robot,
  q_atol: float,
  qd_atol: float,
  task: Any = None,
  steps: int = 20,
  seed: int = 0,
  set_task: Any = None,
  start: Any = None,
):
  """The same start, actions and task in C MuJoCo, step by step.

  Args:
    robot: on backend 'mjx'.
    q_atol, qd_atol: absolute tolerances in positions and velocities.
    task: one task; the first sampled one if None.
    steps: control steps.
    seed: of start and actions.
    set_task: (mujoco.MjModel, task) writes the task into a copy of the model,
      by code of the test's own.
    start: the first state; None takes a reset.
  """
  family = robot.family
  if task is None:
    task = jax.tree.map(lambda x: x[0], sample_tasks(family, 0, 1))
  model = copy.copy(family.simulator.model)
  if set_task is not None:
    set_task(model, task)
  states, actions = rollout(robot, task, seed, steps, start)
  data = mujoco.MjData(model)
  data.qpos[:], data.qvel[:] = states[0].physics.q, states[0].physics.qd
  contacts = 0
  for state, action in zip(states[1:], actions):
    data.ctrl[:] = family._control(action)
    for _ in range(family.spec.options['n_frames']):
      mujoco.mj_step(model, data)
    contacts += data.ncon
    np.testing.assert_allclose(state.physics.q, data.qpos, atol=q_atol)
    np.testing.assert_allclose(state.physics.qd, data.qvel, atol=qd_atol)
    assert state.observation.shape == (family.spec.observation_size,)
    assert np.isfinite(state.reward)
  assert contacts > 0, 'without contact this compares too little'
  assert np.abs(data.qpos - np.asarray(states[0].physics.q)).max() > 0.1
