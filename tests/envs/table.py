"""Tasks of the family `manipulation`, written by hand."""

import numpy as np

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
PARTS = ('button_drawer', 'handle_drawer', 'button', 'tray', 'object')
# Of side +1: front right, back left, front left.
CORNERS = np.array([[0.78, 0.13], [0.58, -0.13], [0.78, -0.13]])


def task(aim, side=1.0, opened=False, absent=(), corner=(0, 1, 2)):
  """One task; `corner` has the numbers of block, object and tray."""
  task = {
    'present': [part not in absent for part in PARTS],
    'side': side,
    'open': opened,
    'corner': np.eye(3)[list(corner)],
    'aim': np.eye(9)[AIMS.index(aim)],
  }
  return {name: np.asarray(x, np.float32) for name, x in task.items()}


def corner(task, number):
  """Where block (0), object (1) or tray (2) are at the start, numpy [2]."""
  place = np.asarray(task['corner'])[number] @ CORNERS
  return place * [1.0, float(task['side'])]


def met(aim, features, task):
  """Whether features [..., 12] meet an aim, and its margin, numpy [...].

  Written anew from the definition: success where the margin is positive.
  """
  x = np.asarray(features, np.float64)
  goal = {
    'move_hand': (0, [0.675, 0.0, -0.11]),
    'move_object': (3, [0.675, 0.0, -0.23]),
    'move_block': (6, [0.675, 0.0, -0.23]),
    'object_in_tray': (3, [*corner(task, 2), -0.36003]),
    'open_handle_drawer': (10, [0.15]),
    'close_handle_drawer': (10, [0.0]),
    'open_button_drawer': (9, [0.15]),
    'close_button_drawer': (9, [0.0]),
    'press_button': (11, [0.01]),
  }
  first, place = goal[aim]
  distance = np.linalg.norm(x[..., first : first + len(place)] - place, axis=-1)
  bound = 0.08 if len(place) == 3 else 0.008 if first == 11 else 0.065
  needs = [part for part in PARTS if part in aim]
  if 'button_drawer' in needs:
    needs.append('button')
  there = all(task['present'][PARTS.index(part)] > 0.5 for part in needs)
  margin = bound - distance
  return (margin > 0) & there, margin
