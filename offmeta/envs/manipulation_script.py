"""The scripted policy that collects data in the family `manipulation`.

It knows the scene (its params are one task) but goes about random feasible
sub-tasks, whatever the task's aim is, and adds N(0, 0.1) noise to each action,
as the original's collector does. One sub-task after the other until the
episode ends; it does not start on what is met already.

Every sub-task is the same chain of phases over two places, `pick` and `place`:
go above pick, reach down, grip, carry, put in place, stay there for a while.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from offmeta.envs import manipulation_tasks as tasks
from offmeta.envs.manipulation_tasks import AIMS
from offmeta.types import Array, EnvFamily, Key, Policy, Task, Transition

# Phases; the gripper closes in steps GRIP to CARRY - 1, and after PLACE the
# hand stays for STAY steps.
_APPROACH, _REACH, _GRIP, _CARRY, _PLACE = 0, 1, 2, 5, 6
_STAY = 8
_DONE = _PLACE + 1 + _STAY

_NOISE = 0.1  # standard deviation, in units of the action
_TRAVEL_HEIGHT = -0.2  # of the hand between sub-tasks, above all things, m
_ABOVE_BUTTON, _TOO_DEEP = 0.03, 0.01  # of the fingertips at the button, m
_FINGERTIP = 0.01  # lowest point of the fingers below the hand, m
_CLOSE, _LOST = 0.015, 0.045  # distances of the hand from where it should be, m

_PRESSES = tasks.is_aim(
  'press_button', 'open_button_drawer', 'close_button_drawer'
)
_CARRIES = tasks.is_aim('move_block', 'move_object', 'object_in_tray')
_GRASPS = _CARRIES | tasks.is_aim('open_handle_drawer', 'close_handle_drawer')
_RELEASES = tasks.is_aim('object_in_tray')


class Progress(NamedTuple):
  """The belief: what the script is at.

  Attributes:
    aim: [9] one-hot of AIMS.
    phase: [] int32.
  """

  aim: Array
  phase: Array


def scripted_policy(family: EnvFamily, noise: float = _NOISE) -> Policy:
  """A policy whose params are one task of the family.

  Args:
    family: a `manipulation.Manipulation`, whose scene it knows.
    noise: standard deviation of the noise on actions.
  """

  def init(task: Task, key: Key) -> Progress:
    return _begin(tasks.feasible(task), key)

  def act(task, state, observation, key):
    target, grip = _intend(family, task, state, observation)
    move = (target - observation[:3]) / tasks.MAX_MOVE
    # Straight to the target, also where it is more than one step away.
    move = move / jnp.maximum(1.0, jnp.max(jnp.abs(move)))
    action = jnp.append(move, grip)
    action = action + noise * jax.random.normal(key, action.shape)
    return jnp.clip(action, -1.0, 1.0), state, {}

  def observe(task, state, transition: Transition, key):
    observation = transition.next_observation
    phase = _next_phase(family, task, state, observation)
    features = family.features_of(observation, task)
    left = tasks.feasible(task) & ~tasks.met(features, task)
    finished = phase >= _DONE
    return jax.tree.map(
      lambda new, old: jnp.where(finished, new, old),
      _begin(left, key),
      state._replace(phase=phase),
    )

  def adapt(task, state, context, valid, key):
    del state, context, valid
    return init(task, key)

  return Policy(init=init, act=act, observe=observe, adapt=adapt)


def _begin(choices: Array, key: Key) -> Progress:
  """One of the choices, bool [9], at random; if none, moving the hand."""
  choices = jnp.where(jnp.any(choices), choices, tasks.is_aim('move_hand'))
  index = jax.random.categorical(key, jnp.where(choices, 0.0, -jnp.inf))
  return Progress(jax.nn.one_hot(index, len(AIMS)), jnp.zeros((), jnp.int32))


def _places(
  family: EnvFamily, task: Task, observation: Array
) -> tuple[Array, Array]:
  """Where the hand has to go, for each aim: pick and place, both [9, 3]."""
  home = lambda fixture, *shift: tasks.mirrored(
    family.home(fixture) + np.array(shift), task
  )
  thing, block = observation[4:7], observation[7:10]
  shut = home('handle_drawer', 0.0, 0.0, 0.0)
  opened = home('handle_drawer', 0.0, -tasks.DRAWER_TRAVEL, 0.0)
  handle = shut.at[1].set(observation[11])
  press = tuple(
    home('button', 0.0, 0.0, height + _FINGERTIP)
    for height in (_ABOVE_BUTTON, -tasks.BUTTON_TRAVEL - _TOO_DEEP)
  )
  places = {
    'move_hand': (tasks.HAND_GOAL, tasks.HAND_GOAL),
    'move_block': (block, tasks.THING_GOAL),
    'open_handle_drawer': (handle, opened),
    'close_handle_drawer': (handle, shut),
    'press_button': press,
    'open_button_drawer': press,
    'close_button_drawer': press,
    'move_object': (thing, tasks.THING_GOAL),
    'object_in_tray': (thing, tasks.tray_position(task)),
  }
  pick, place = zip(*(places[aim] for aim in AIMS))
  return jnp.stack(pick), jnp.stack(place)


def _intend(
  family: EnvFamily,
  task: Task,
  state: Progress,
  observation: Array,
) -> tuple[Array, Array]:
  """Where the hand should be, [3], and the gripper's action, []."""
  hand, phase = observation[:3], state.phase
  pick, place = (state.aim @ x for x in _places(family, task, observation))
  height = jnp.where(_does(state, _CARRIES), tasks.THING_GOAL[2], place[2])
  target = jnp.select(
    [phase == _APPROACH, phase < _CARRY, phase == _CARRY],
    [_above(hand, pick, _TRAVEL_HEIGHT), pick, _above(hand, place, height)],
    place,
  )
  # A press begins with an open gripper too, to drop what is held.
  presses = _does(state, _PRESSES) & (phase > _APPROACH)
  closed = _grips(state) | presses
  return target, jnp.where(closed, 1.0, -1.0)


def _next_phase(
  family: EnvFamily,
  task: Task,
  state: Progress,
  observation: Array,
) -> Array:
  """The phase [] after a step that led to this observation."""
  hand, phase = observation[:3], state.phase
  pick, place = (state.aim @ x for x in _places(family, task, observation))
  distance = lambda goal, n: jnp.linalg.norm((hand - goal)[:n])
  moves_on = jnp.select(
    [phase == _APPROACH, phase == _REACH, phase == _CARRY, phase == _PLACE],
    [
      distance(pick, 2) < _CLOSE,
      distance(pick, 3) < _CLOSE,
      distance(place, 2) < _CLOSE,
      distance(place, 3) < _CLOSE,
    ],
    True,
  )
  lost = _grips(state) & (phase >= _CARRY) & (distance(pick, 3) > _LOST)
  return jnp.where(lost, _APPROACH, phase + moves_on).astype(jnp.int32)


def _above(hand: Array, place: Array, height: Array | float) -> Array:
  """Rises to the height before it goes sideways."""
  low = hand[2] < height - _CLOSE
  return jnp.append(jnp.where(low, hand[:2], place[:2]), height)


def _does(state: Progress, kind: np.ndarray) -> Array:
  """Whether the sub-task is among `kind`, bool [9]."""
  return jnp.any((state.aim > 0.5) & kind)


def _grips(state: Progress) -> Array:
  """Whether the sub-task is at a phase in which something is held."""
  released = _does(state, _RELEASES) & (state.phase > _PLACE)
  return _does(state, _GRASPS) & (state.phase >= _GRIP) & ~released
