"""Tasks of the family `manipulation`: a scene and what to bring about in it.

A task is a dict of float32 arrays: {'present': [5] of PARTS, 'side': [] in
{-1, 1}, where drawers and button are, 'open': [] in {0, 1}, whether the
drawers start open, 'corner': [3, 3] one-hot, in which corner block, object and
tray are, 'aim': [9] one-hot of AIMS}. Features [12] are hand xyz, object xyz,
block xyz, travel of the button drawer, of the handle drawer and of the button,
all in metres.
"""

import jax
import jax.numpy as jnp
import numpy as np

from offmeta.types import Array, Task

MAX_MOVE = 0.05  # of the hand, metres per control step and unit of action
PARTS = ('button_drawer', 'handle_drawer', 'button', 'tray', 'object')
AIMS = (
  'move_hand',
  'move_block',
  'open_handle_drawer',
  'close_handle_drawer',
  'press_button',
  'open_button_drawer',
  'close_button_drawer',
  'move_object',
  'object_in_tray',
)
INTERNAL_AIMS = ('move_hand', 'open_handle_drawer', 'open_button_drawer')
# Parts without which there is no meeting an aim.
_NEEDS = {
  'open_handle_drawer': ('handle_drawer',),
  'close_handle_drawer': ('handle_drawer',),
  'press_button': ('button',),
  'open_button_drawer': ('button', 'button_drawer'),
  'close_button_drawer': ('button', 'button_drawer'),
  'move_object': ('object',),
  'object_in_tray': ('object', 'tray'),
}
_PRESENT_PROBABILITY = 0.75
NUM_UNIFORM = 11  # random numbers that make a task

# Metres; places are those of side +1.
HAND_GOAL = np.array([0.675, 0.0, -0.11])
THING_GOAL = np.array([0.675, 0.0, -0.23])  # of block and object
# Front right, back left, front left; the button is back right.
CORNERS = np.array([[0.78, 0.13], [0.58, -0.13], [0.78, -0.13]])
THING_HEIGHT = -0.36003  # of block and object at rest, 0.03 mm into the table
DRAWER_TRAVEL, BUTTON_TRAVEL, BUTTON_GOAL = 0.15, 0.015, 0.01
NEAR, _DRAWER_NEAR, _BUTTON_NEAR = 0.08, 0.065, 0.008  # strict bounds


def is_aim(*aims: str) -> np.ndarray:
  """Which of AIMS are among these, bool [9]."""
  return np.isin(AIMS, aims)


OPENS = is_aim('open_handle_drawer', 'open_button_drawer')
CLOSES = is_aim('close_handle_drawer', 'close_button_drawer')


def from_uniform(uniform: Array, aims: tuple[str, ...] = AIMS) -> Task:
  """Tasks of numbers [M, NUM_UNIFORM] from U(0, 1).

  Each part but the block is there with probability 0.75; aims are uniform over
  what is feasible in the scene.

  Args:
    uniform: random numbers.
    aims: which to choose from. If none closes a drawer, all start shut.
  """
  known = is_aim(*aims)
  some_close = np.any(known & CLOSES)
  scene = {
    'present': uniform[:, :5] < _PRESENT_PROBABILITY,
    'side': jnp.where(uniform[:, 5] < 0.5, -1.0, 1.0),
    'open': (uniform[:, 6] < 0.5) & some_close,
    'corner': jax.nn.one_hot(jnp.argsort(uniform[:, 7:10], axis=1), 3),
  }
  choices = jax.vmap(feasible)(scene) & known
  count = jnp.sum(choices, axis=1, keepdims=True)
  chosen = jnp.minimum(jnp.floor(uniform[:, 10:] * count), count - 1)
  rank = jnp.cumsum(choices, axis=1) - 1
  task = {**scene, 'aim': choices & (rank == chosen)}
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), task)


def possible(task: Task) -> Array:
  """For which aims all that they need is there, bool [9]; one task."""
  needed = np.array([np.isin(PARTS, _NEEDS.get(aim, ())) for aim in AIMS])
  return ~jnp.any(needed & (task['present'] < 0.5), axis=-1)


def feasible(task: Task) -> Array:
  """Which aims are possible and not met from the start, bool [9]."""
  already = jnp.where(task['open'] > 0.5, OPENS, CLOSES)
  return possible(task) & ~already


def met(features: Array, task: Task) -> Array:
  """Which aims features [..., 12] meet in the scene of one task, [..., 9]."""
  hand, thing, block = (features[..., i : i + 3] for i in (0, 3, 6))
  drawer, handle, button = (features[..., i] for i in (9, 10, 11))
  near = lambda place, goal: jnp.linalg.norm(place - goal, axis=-1) < NEAR
  at = lambda travel, goal: jnp.abs(travel - goal) < _DRAWER_NEAR
  reached = {
    'move_hand': near(hand, HAND_GOAL),
    'move_block': near(block, THING_GOAL),
    'open_handle_drawer': at(handle, DRAWER_TRAVEL),
    'close_handle_drawer': at(handle, 0.0),
    'press_button': jnp.abs(button - BUTTON_GOAL) < _BUTTON_NEAR,
    'open_button_drawer': at(drawer, DRAWER_TRAVEL),
    'close_button_drawer': at(drawer, 0.0),
    'move_object': near(thing, THING_GOAL),
    'object_in_tray': near(thing, tray_position(task)),
  }
  return jnp.stack([reached[aim] for aim in AIMS], axis=-1) & possible(task)


def mirrored(position: Array, task: Task) -> Array:
  """Places [..., 2 or 3] of side +1 in the scene of one task."""
  is_y = np.eye(position.shape[-1])[1]
  return position * (1.0 - is_y + task['side'] * is_y)


def corners(task: Task) -> Array:
  """Where block, object and tray are at the start, [3, 3]."""
  xy = mirrored(task['corner'] @ CORNERS, task)
  return jnp.pad(xy, ((0, 0), (0, 1)), constant_values=THING_HEIGHT)


def tray_position(task: Task) -> Array:
  """Where an object in the tray is at rest, [3], present or not."""
  return corners(task)[2]
