"""A family of your own in one file: a two-link arm that reaches a hidden goal.

  python -m experiments.run --config=examples/reacher.py --profile=smoke
  python -m experiments.render --config=examples/reacher.py --out=reacher.gif

Everything a family is made of is below: a body (MuJoCo XML), what a task is,
what is observed, and the reward. Reset, step, the backend switch, time limits
and blow-ups come from `BraxFamily`. `tests/test_examples.py` runs this file.
"""

from typing import ClassVar
from xml.etree import ElementTree

import jax
import jax.numpy as jnp

from experiments.configs import base as base_configs, recipes, smac_families
from offmeta import envs
from offmeta.envs import base, brax_family, simulator
from offmeta.types import Array, Key, Task

_LINK = 0.1  # metres, each of the two
_DT, _N_FRAMES = 0.04, 4  # seconds per control step; physics steps in it
_XML = f"""
<mujoco model="reacher">
  <compiler angle="radian"/>
  <option gravity="0 0 0"/>
  <default>
    <joint type="hinge" axis="0 0 1" damping="0.02" armature="0.005"/>
    <geom type="capsule" size="0.01" contype="0" conaffinity="0"/>
  </default>
  <worldbody>
    <body name="upper">
      <joint name="shoulder"/>
      <geom fromto="0 0 0 {_LINK} 0 0"/>
      <body name="lower" pos="{_LINK} 0 0">
        <joint name="elbow" limited="true" range="-2.8 2.8"/>
        <geom fromto="0 0 0 {_LINK} 0 0"/>
      </body>
    </body>
  </worldbody>
  <actuator>
    <motor joint="shoulder" gear="0.1" ctrllimited="true" ctrlrange="-1 1"/>
    <motor joint="elbow" gear="0.1" ctrllimited="true" ctrlrange="-1 1"/>
  </actuator>
</mujoco>
"""


class Reacher(brax_family.BraxFamily):
  """r = -|fingertip - goal| in units of the arm's length - 0.05 sum(a^2).

  Task: {'goal': [2]} in metres, within the arm's reach. Features: the
  fingertip's position [2]: whatever the reward needs beyond the action goes
  there, so that logged data can be relabelled for another task.
  """

  name: ClassVar[str] = 'reacher'

  def __init__(self, *, backend: str = 'mjx', episode_length: int = 50):
    super().__init__(
      simulator.make_simulator(
        ElementTree.fromstring(_XML), backend, _N_FRAMES, _DT
      ),
      observation_size=8,
      feature_size=2,
      episode_length=episode_length,
      terminates=False,
      reset_noise=0.1,
      options={},  # what else changes the data; recorded with every dataset
    )

  def sample_tasks(self, key: Key, num_tasks: int) -> Task:
    """Goals {'goal': [num_tasks, 2]}, uniform on a ring."""
    k_angle, k_radius = jax.random.split(key)
    angle = jax.random.uniform(k_angle, (num_tasks,), maxval=2 * jnp.pi)
    radius = (
      jnp.sqrt(
        jax.random.uniform(k_radius, (num_tasks,), minval=0.25, maxval=1.0)
      )
      * 2
      * _LINK
    )
    return {
      'goal': radius[:, None]
      * jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=-1)
    }

  def _task_lists(self) -> base.TaskLists:
    """Named (train, test) lists; 'random:SEED' needs none of them."""

    def default():
      tasks = self.sample_tasks(jax.random.key(0), 40)
      return base.take_tasks(tasks, slice(30)), base.take_tasks(
        tasks, slice(30, 40)
      )

    return {'default': default}

  def _observe(self, physics: simulator.Physics, action: Array) -> Array:
    """[8]: sines and cosines of the joints, velocities, fingertip."""
    del action
    return jnp.concatenate(
      [
        jnp.sin(physics.q),
        jnp.cos(physics.q),
        physics.qd,
        _fingertip(physics.q),
      ]
    )

  def _features(
    self, before: simulator.Physics, after: simulator.Physics
  ) -> Array:
    del before
    return _fingertip(after.q)

  def reward(self, features: Array, action: Array, task: Task) -> Array:
    """The reward [...] of features [..., 2], action [..., 2]."""
    distance = jnp.linalg.norm(features - task['goal'], axis=-1)
    cost = jnp.sum(jnp.square(base.clip_action(action)), axis=-1)
    return -distance / (2 * _LINK) - 0.05 * cost


def _fingertip(q: Array) -> Array:
  """[2], from the two joint angles."""
  angles = jnp.cumsum(q)
  return _LINK * jnp.stack([jnp.sum(jnp.cos(angles)), jnp.sum(jnp.sin(angles))])


def get_config():
  """SMAC on this family: the point robot's settings, other sizes."""
  if Reacher.name not in envs.FAMILIES:
    envs.register(Reacher.name, Reacher)
  changes, profiles = smac_families.parts('point_robot')
  changes = recipes.merge(
    changes,
    {
      'collect': {
        'initial_steps': 250,
        'gather': {'prior_steps': 100, 'posterior_steps': 150},
      },
      'smac': {'online': {'sequence_size': 100}},
      'online': {'gather': {'prior_steps': 100, 'posterior_steps': 150}},
      'evaluation': {'num_steps': 150},
    },
  )
  changes['family'] = {'name': Reacher.name, 'num_train': 30, 'num_test': 10}
  return base_configs.make_config(
    changes, {'smoke': profiles['smoke'], 'cpu': {}}
  )
