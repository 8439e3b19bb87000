"""What a state of a family looks like: solids in the world, and a view.

Families on a simulated body are drawn from their MuJoCo model. Another family
says what it looks like by a method

  geometry(physics, task) -> list[Geom]

with `physics` and `task` of one state, as numpy arrays. Any family may have

  markers(physics, task) -> list[Geom]
  describe(task) -> str

for what the model does not show, a goal or a direction, and for tasks whose
numbers say little. Nothing here draws; `offmeta.results.raycast` does.

Bodies are placed by their joint coordinates. The joints of the backends
'spring' and 'positional' give way, so their pictures are exact to centimetres
only (an ant under random actions: 3 cm off as a rule, 15 at most).
"""

from collections.abc import Callable, Iterable, Sequence
import copy
from typing import Any, NamedTuple

import jax
import numpy as np

from offmeta.envs import simulator as simulators
from offmeta.types import EnvFamily, EnvState, Task

KINDS = ('plane', 'sphere', 'capsule', 'cylinder', 'ellipsoid', 'box')
TRUNK = (0.93, 0.55, 0.25, 1.0)
_LIMBS = (  # neighbours differ
  (0.30, 0.52, 0.75, 1.0),
  (0.75, 0.40, 0.45, 1.0),
  (0.40, 0.66, 0.45, 1.0),
  (0.56, 0.46, 0.70, 1.0),
)
_GOAL = (0.20, 0.70, 0.35, 1.0)
_ARROW, _ARROW_RADIUS = (0.35, 1.05), 0.02  # metres: from, to, of the lines
_FIRST_HIDDEN_GROUP = 3  # MuJoCo's viewer shows groups 0 to 2
# Azimuth and elevation in degrees, as MuJoCo's cameras.
_SIDE, _OBLIQUE, _TOP = (90.0, -8.0), (120.0, -25.0), (90.0, -90.0)


class Geom(NamedTuple):
  """A solid, in MuJoCo's terms.

  Attributes:
    kind: one of KINDS; a plane is horizontal and endless.
    size: [3], half sizes as in MuJoCo: radius and half length along z for
      capsules and cylinders.
    position: [3], of its centre in the world.
    rotation: [3, 3], its axes in the world as columns.
    rgba: [4]; below 1 the last one lets others shine through.
  """

  kind: str
  size: np.ndarray
  position: np.ndarray
  rotation: np.ndarray
  rgba: tuple[float, float, float, float]


class View(NamedTuple):
  """How to look at F states.

  Attributes:
    targets: [F, 3], the point to look at.
    track: [F, 2], where on the floor the body is (its first solid that is no
      plane); None if it moves in a vertical plane, or nowhere.
    azimuth, elevation: degrees, as of MuJoCo's cameras.
    extent: length units to cover in height and width.
  """

  targets: np.ndarray
  track: np.ndarray | None
  azimuth: float
  elevation: float
  extent: float


class RenderError(ValueError):
  """A family does not say what it looks like."""


def solid(
  kind: str,
  size: Sequence[float],
  position: Sequence[float],
  rgba: tuple[float, float, float, float],
) -> Geom:
  """A Geom along the axes; sizes and coordinates that are left out are 0."""
  fill = lambda x: np.pad(np.asarray(x, float), (0, 3 - len(x)))
  return Geom(kind, fill(size), fill(position), np.eye(3), rgba)


def goal(position: Sequence[float], radius: float) -> Geom:
  """A goal: a disc on the floor, [2], or a translucent ball in space, [3]."""
  if len(position) == 2:
    return solid('cylinder', (radius, 0.002), position, _GOAL)
  return solid('sphere', (radius,), position, (*_GOAL[:3], 0.5))


def direction(position: np.ndarray, angle: float) -> list[Geom]:
  """An arrow on the floor that leads from `position` [2] at `angle` (rad)."""
  ahead = np.array([np.cos(angle), np.sin(angle), 0.0])
  side = np.array([-ahead[1], ahead[0], 0.0])
  tail, tip = (np.pad(position, (0, 1)) + x * ahead for x in _ARROW)
  ends = (tail, tip - 0.17 * (ahead + side), tip - 0.17 * (ahead - side))
  return [_rod(end, tip, _ARROW_RADIUS, _GOAL) for end in ends]


def _rod(first: np.ndarray, last: np.ndarray, radius: float, rgba: Any) -> Geom:
  """A capsule between two points."""
  half = (last - first) / 2
  z = half / np.linalg.norm(half)
  x = np.cross(z, np.eye(3)[np.argmin(np.abs(z))])
  x /= np.linalg.norm(x)
  return Geom(
    'capsule',
    np.array([radius, np.linalg.norm(half), 0.0]),
    first + half,
    np.stack([x, np.cross(z, x), z], axis=1),
    rgba,
  )


def visible(state: EnvState) -> Any:
  """What `scene` needs of a state's physics; without a simulator, all."""
  physics = state.physics
  if isinstance(physics, simulators.Physics):
    return physics._replace(internal=())
  return physics


def scene(
  family: EnvFamily, task: Task, physics: Any
) -> tuple[list[list[Geom]], View]:
  """What there is in each of F states of one task, and how to look at it.

  Args:
    family: has a `simulator` or a method `geometry`.
    task: one task.
    physics: what `visible` returns, leaves [F, ...].

  Raises:
    RenderError: the family does not say what it looks like.
  """
  task, physics = jax.tree.map(np.asarray, (task, physics))
  states = [
    jax.tree.map(lambda x, i=i: x[i], physics)
    for i in range(len(jax.tree.leaves(physics)[0]))
  ]
  if hasattr(family, 'geometry'):
    bodies = [family.geometry(state, task) for state in states]
    view = _overview(bodies)
  elif hasattr(family, 'simulator'):
    geometry = _model_geometry(family, task)
    bodies = [geometry(state) for state in states]
    view = _model_view(family.simulator.model, bodies)
  else:
    raise RenderError(
      f'family {family.spec.name!r} cannot be drawn: it has no simulator;'
      ' give it a method geometry(physics, task) -> list of'
      ' offmeta.envs.render.Geom'
    )
  if not hasattr(family, 'markers'):
    return bodies, view
  return [
    body + family.markers(state, task) for body, state in zip(bodies, states)
  ], view


def _overview(bodies: list[list[Geom]]) -> View:
  """All that there ever is, from above."""
  low, high = _bounds(geom for body in bodies for geom in body)
  targets = np.tile((low + high) / 2, (len(bodies), 1))
  return View(targets, _roots(bodies)[:, :2], *_TOP, 1.2 * np.max(high - low))


def _model_view(model: Any, bodies: list[list[Geom]]) -> View:
  """Follows a body that can go away; of a scene, what its XML asks for."""
  import mujoco

  kinds = mujoco.mjtJoint
  free = model.jnt_type[0] == kinds.mjJNT_FREE
  hinges = model.jnt_type == kinds.mjJNT_HINGE
  slides = model.jnt_type == kinds.mjJNT_SLIDE
  along_y = np.abs(model.jnt_axis[:, 1])
  planar = np.all((hinges & (along_y > 0.999)) | (slides & (along_y < 0.001)))
  if not free and not planar:
    look, about = model.vis.global_, model.stat
    # What MuJoCo's viewer shows at first.
    return View(
      np.tile(about.center, (len(bodies), 1)),
      None,
      look.azimuth,
      look.elevation,
      1.24 * about.extent,
    )
  low, high = _bounds(bodies[0])
  roots = _roots(bodies)
  targets = np.tile((low + high) / 2, (len(bodies), 1))
  targets[:, :2] = roots[:, :2]
  size = np.max(high - low)
  if planar:
    return View(targets, None, *_SIDE, 1.6 * size)
  return View(targets, roots[:, :2], *_OBLIQUE, 1.9 * size)


def _roots(bodies: list[list[Geom]]) -> np.ndarray:
  """Where the first solid that is no plane is, [F, 3]."""
  return np.array(
    [
      next(geom.position for geom in body if geom.kind != 'plane')
      for body in bodies
    ]
  )


def _bounds(geoms: Iterable[Geom]) -> tuple[np.ndarray, np.ndarray]:
  """About the lowest and highest coordinates [3] of solids."""
  geoms = [geom for geom in geoms if geom.kind != 'plane']
  centers = np.array([geom.position for geom in geoms])
  reach = np.array([[np.max(geom.size)] for geom in geoms])
  return np.min(centers - reach, axis=0), np.max(centers + reach, axis=0)


def _model_geometry(
  family: Any, task: Task
) -> Callable[[simulators.Physics], list[Geom]]:
  """The model's solids in one task, by C MuJoCo's kinematics."""
  import mujoco

  model = copy.copy(family.simulator.model)
  for name, value in family.system_changes(task).items():
    field = getattr(model, name, None)  # the others do not move a geom
    if isinstance(field, np.ndarray):
      field[:] = value
  data = mujoco.MjData(model)
  colors = _colors(model)
  kinds = [
    mujoco.mjtGeom(kind).name.removeprefix('mjGEOM_').lower()
    for kind in model.geom_type
  ]
  shown = [
    i
    for i, kind in enumerate(kinds)
    if kind in KINDS
    and colors[i, 3] > 0
    and model.geom_group[i] < _FIRST_HIDDEN_GROUP
  ]

  def geometry(physics):
    data.qpos[:] = physics.q
    mujoco.mj_kinematics(model, data)
    return [
      Geom(
        kinds[i],
        model.geom_size[i].copy(),
        data.geom_xpos[i].copy(),
        data.geom_xmat[i].reshape(3, 3).copy(),
        tuple(colors[i]),
      )
      for i in shown
    ]

  return geometry


def _colors(model: Any) -> np.ndarray:
  """Colours [geoms, 4]: the model's, or one per limb if it has only one."""
  import mujoco

  rgba = model.geom_rgba.copy()
  moving = model.geom_type != mujoco.mjtGeom.mjGEOM_PLANE
  if len(np.unique(rgba[moving], axis=0)) > 1:
    return rgba
  # A limb is a chain of bodies that ends with its last one and starts where
  # it branches off, the trunk is the rest; parents have lower numbers.
  tips: list[set[int]] = [set() for _ in range(model.nbody)]
  for body in reversed(range(1, model.nbody)):
    tips[body] = tips[body] or {body}
    tips[model.body_parentid[body]] |= tips[body]
  order = sorted(tips[0])
  for geom in np.flatnonzero(moving):
    body = model.geom_bodyid[geom]
    limb = len(tips[body]) == 1 and model.body_parentid[body] != 0
    rgba[geom] = (
      _LIMBS[order.index(min(tips[body])) % len(_LIMBS)] if limb else TRUNK
    )
  return rgba
