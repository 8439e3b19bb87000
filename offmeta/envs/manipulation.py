"""A hand at a table with drawers, a button and things to carry; MJX only.

Stands in for SMAC's Sawyer domain (PyBullet, `SawyerAffordancesMetaV0`): its
observation, action, workspace, thresholds and task distribution on a scene of
our own. Rewards are comparable in kind, not in
number. One control step is 0.05 s; episodes of 75 steps never terminate.

Observation [13], in metres, 0 where a thing is absent: hand xyz, opening of
the gripper, object xyz, block xyz, x of the button drawer, y of the handle
drawer, height of the button. Action [4]: the hand moves by 0.05 m * a[:3]
from where it is, within the workspace; a[3] = -1 opens the gripper, 1 closes
it. Reward: 0 in a step that meets the task's aim, else -1.

The scene is symmetric in y; a task's `side` says where its drawers and button
are. The handle drawer is pulled along y by its handle. The button drawer is
driven while the button is down, away from where it started, so that a second
press does nothing (as in the original). Solid are only table, fingers, handle,
button, block and object, and nothing rotates.

Differs from the original on purpose:
* an aim that the start meets already is not given. The original fixes the
  goals of both drawers as "open" and so rewards a drawer that starts open;
* each aim has its own goal. The original scores close_button_drawer by the
  handle drawer, close_handle_drawer by opening it, and obj_in_tray by the goal
  of move_obj;
* `open` holds for both drawers (there the handle drawer starts shut), the goal
  of the handle drawer is full travel instead of a new hidden U(0.05, 0.18) m
  at each reset, and the goal of block and object is the centre of the
  workspace (there, by aliasing, the hand's);
* the block is always present (there only inside the bottom drawer), and
  block, object and tray take the three free corners in any order;
* things that leave the workspace are not put back.

Tasks and features: see `manipulation_tasks`.
"""

import pathlib
from typing import ClassVar
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import numpy as np

from offmeta.envs import (
  base,
  brax_family,
  manipulation_script,
  manipulation_tasks as tasks,
  render,
  simulator as simulators,
)
from offmeta.types import Array, EnvState, Key, Policy, Task

_WORKSPACE = np.array([[0.5, -0.2, -0.36], [0.85, 0.2, -0.1]])  # metres
_HAND_START = np.array([0.6, -0.15, -0.2])  # on side +1
_AWAY = np.array([10.0, 0.0, 0.0])  # where absent things are, from their place
_FINGER_TRAVEL = 0.045  # metres, of each of two
_DRIVE = 15.0  # newtons on the button drawer: 0.75 m/s against its damping
_RESET_NOISE = 0.01  # metres
_DT = 0.05  # seconds per control step
# Slices of q, the order in the XML; a button that is down has q < 0.
_HAND, _FINGERS, _TRAVELS = slice(0, 3), slice(3, 5), slice(5, 8)
_BLOCK, _OBJECT = slice(8, 11), slice(11, 14)
_NUM_TRAIN, _NUM_TEST = 50, 10
_NUM_CANDIDATES = 1000  # draws from which the 'ood' list takes its tasks


class Manipulation(brax_family.BraxFamily):
  """The family.

  Task lists: 'smac' = 'default' (our own 60 draws, 50/10) and 'ood' (50/10):
  drawer aims on the left (side -1) are held out for the test. Training has
  these aims on the right and all other aims on both sides, in scenes that
  have drawers on both sides, so the skills are in the data and only their
  pairing with an aim is new.
  """

  name: ClassVar[str] = 'manipulation'

  def __init__(
    self,
    *,
    backend: str = 'mjx',
    aims: str = 'all',
    episode_length: int = 75,
    n_frames: int = 5,
    solver_iterations: int = 6,
    ls_iterations: int = 4,
  ):
    """Makes the family.

    Args:
      backend: 'mjx'; the scene is built on MuJoCo's contacts and actuators.
      aims: 'all' (the released version) or 'internal' (the earlier one: move
        the hand, open either drawer; its drawers start shut).
      episode_length: time limit in steps.
      n_frames: physics steps per control step.
      solver_iterations: Newton iterations. With 6, scripted episodes stay
        within 2 mm of those with 100; with 4, grips slip and they part by
        0.2 m; with 2, what is gripped flies off.
      ls_iterations: line-search iterations; 8 give the same episodes as 4.

    Raises:
      ValueError: an unknown value; the message names the known ones.
    """
    if backend != 'mjx':
      raise ValueError(
        f'option backend is {backend!r}; known: mjx. The scene needs the'
        " soft contacts and position servos of MuJoCo; on Brax's other"
        ' backends it would be another environment'
      )
    base.require_choice('aims', aims, ('all', 'internal'))
    self._aims = tasks.AIMS if aims == 'all' else tasks.INTERNAL_AIMS
    xml = pathlib.Path(__file__).parent / 'assets' / 'manipulation.xml'
    super().__init__(
      simulators.make_simulator(
        ElementTree.parse(xml).getroot(),
        backend,
        n_frames,
        _DT,
        solver_iterations,
        ls_iterations,
      ),
      observation_size=13,
      feature_size=12,
      episode_length=episode_length,
      terminates=False,
      reset_noise=_RESET_NOISE,
      options={'aims': aims},
    )
    self.spec = self.spec._replace(action_size=4)  # of 6 actuators

  def sample_tasks(self, key: Key, num_tasks: int) -> Task:
    """Fresh scenes with aims uniform over what is feasible in each."""
    return tasks.from_uniform(
      jax.random.uniform(key, (num_tasks, tasks.NUM_UNIFORM)), self._aims
    )

  def _task_lists(self) -> base.TaskLists:
    return {
      'default': self._smac_list,
      'smac': self._smac_list,
      'ood': self._ood_list,
    }

  def _draws(self, num_tasks: int) -> Task:
    uniform = base.published_random().uniform(
      size=(num_tasks, tasks.NUM_UNIFORM)
    )
    return tasks.from_uniform(jnp.asarray(uniform), self._aims)

  def _smac_list(self) -> tuple[Task, Task]:
    drawn = self._draws(_NUM_TRAIN + _NUM_TEST)
    return (
      base.take_tasks(drawn, slice(_NUM_TRAIN)),
      base.take_tasks(drawn, slice(_NUM_TRAIN, None)),
    )

  def _ood_list(self) -> tuple[Task, Task]:
    drawn = self._draws(_NUM_CANDIDATES)
    drawer_aim = drawn['aim'] @ (tasks.OPENS | tasks.CLOSES) > 0.5
    held_out = np.asarray(drawer_aim & (drawn['side'] < 0))
    take = lambda where, n: base.take_tasks(drawn, np.flatnonzero(where)[:n])
    return take(~held_out, _NUM_TRAIN), take(held_out, _NUM_TEST)

  def system_changes(self, task: Task) -> simulators.Changes:
    """Mirrors the fixtures and moves absent ones away."""
    model = self.simulator.model
    absent = 1.0 - task['present']
    position = jnp.asarray(tasks.mirrored(model.body_pos, task))
    for part in ('button_drawer', 'handle_drawer', 'button'):
      position = position.at[model.body(part).id].add(
        absent[tasks.PARTS.index(part)] * _AWAY
      )
    # Half a turn about z, so that the handle drawer opens to the centre.
    turn = jnp.where(
      task['side'] > 0, jnp.array([1.0, 0, 0, 0]), jnp.array([0, 0, 0, 1.0])
    )
    tray = tasks.tray_position(task) + absent[3] * _AWAY
    drawer_id, tray_id = model.body('handle_drawer').id, model.geom('tray').id
    return {
      'body_pos': position,
      'body_quat': jnp.asarray(model.body_quat).at[drawer_id].set(turn),
      'geom_pos': jnp.asarray(model.geom_pos).at[tray_id, :2].set(tray[:2]),
    }

  def reset(self, key: Key, task: Task) -> EnvState:
    """All at rest in its place, the hand across from the drawers.

    The x and y of hand, block and object vary by 0.01 m.
    """
    noise = jax.random.uniform(
      key, (3, 2), minval=-_RESET_NOISE, maxval=_RESET_NOISE
    )
    noise = jnp.pad(noise, ((0, 0), (0, 1)))
    block, thing, _ = tasks.corners(task)
    q = jnp.concatenate(
      [
        tasks.mirrored(_HAND_START, task) + noise[0],
        jnp.full((2,), _FINGER_TRAVEL),
        jnp.full((2,), task['open'] * tasks.DRAWER_TRAVEL),
        jnp.zeros((1,)),
        block + noise[1],
        thing + noise[2] + (1.0 - task['present'][4]) * _AWAY,
      ]
    )
    physics = self.simulator.init(
      q, jnp.zeros_like(q), self.system_changes(task)
    )
    state = self._state(physics, jnp.zeros((4,)), task, jnp.zeros(()))
    return state._replace(reward=jnp.zeros(()))

  def step(self, state: EnvState, action: Array, task: Task) -> EnvState:
    """One control step; action [4] is clipped to [-1, 1]."""
    action = base.clip_action(action)
    physics, finite = self.simulator.step(
      state.physics,
      self._controls(state.physics, action, task),
      self.system_changes(task),
    )
    return self._state(physics, action, task, 1.0 - finite.astype(jnp.float32))

  def _controls(
    self, physics: simulators.Physics, action: Array, task: Task
  ) -> Array:
    """What the actuators get, [6]: hand xyz, two fingers, button drawer."""
    hand = physics.q[_HAND] + tasks.MAX_MOVE * action[:3]
    finger = _FINGER_TRAVEL * (1.0 - action[3]) / 2.0
    down = -physics.q[_TRAVELS][2] > tasks.BUTTON_GOAL
    drive = _DRIVE * down * (1.0 - 2.0 * task['open'])
    return jnp.concatenate(
      [jnp.clip(hand, *_WORKSPACE), jnp.stack([finger, finger, drive])]
    )

  def _state(
    self,
    physics: simulators.Physics,
    action: Array,
    task: Task,
    diverged: Array,
  ) -> EnvState:
    q = physics.q
    features = jnp.concatenate(
      [q[_HAND], q[_OBJECT], q[_BLOCK], q[_TRAVELS] * np.array([1, 1, -1])]
    )
    return EnvState(
      physics=physics,
      observation=self._observation(q, task),
      reward=self.reward(features, action, task),
      terminal=jnp.zeros(()),
      features=features,
      diverged=diverged,
    )

  def _observation(self, q: Array, task: Task) -> Array:
    """[13] of positions q [14], see the top of the file."""
    drawer, handle, button, _, thing = task['present']
    drawer_x = self.home('button_drawer')[0] + q[5]
    handle_y = task['side'] * (self.home('handle_drawer')[1] - q[6])
    height = self.home('button')[2] + q[7]
    return jnp.concatenate(
      [
        q[_HAND],
        jnp.sum(q[_FINGERS], keepdims=True),
        thing * q[_OBJECT],
        q[_BLOCK],
        jnp.stack([drawer * drawer_x, handle * handle_y, button * height]),
      ]
    )

  def features_of(self, observation: Array, task: Task) -> Array:
    """The features [12] of an observation [13]; of no meaning where absent."""
    drawer_x, handle_y, height = observation[10:]
    travels = jnp.stack(
      [
        drawer_x - self.home('button_drawer')[0],
        self.home('handle_drawer')[1] - task['side'] * handle_y,
        self.home('button')[2] - height,
      ]
    )
    return jnp.concatenate([observation[:3], observation[4:10], travels])

  def home(self, fixture: str) -> np.ndarray:
    """Where a fixture is on side +1, shut or not pressed, [3]."""
    return self.simulator.model.body(fixture).pos

  def reward(self, features: Array, action: Array, task: Task) -> Array:
    """The reward [...] of features [..., 12]; the action plays no part."""
    del action
    return jnp.sum(tasks.met(features, task) * task['aim'], axis=-1) - 1.0

  def describe(self, task: Task) -> str:
    """For pictures: the aim in words."""
    return tasks.AIMS[int(np.argmax(task['aim']))].replace('_', ' ')

  def markers(
    self, physics: simulators.Physics, task: Task
  ) -> list[render.Geom]:
    """For pictures: where hand, block or object is to be, if one is."""
    del physics
    goals = {
      'move hand': tasks.HAND_GOAL,
      'move block': tasks.THING_GOAL,
      'move object': tasks.THING_GOAL,
      'object in tray': tasks.tray_position(task),
    }
    aim = self.describe(task)
    return [render.goal(goals[aim], tasks.NEAR)] if aim in goals else []

  def scripted_policy(self) -> Policy:
    """Collects data; its params are one task. See `manipulation_script`."""
    return manipulation_script.scripted_policy(self)
