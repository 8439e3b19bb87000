"""Rigid-body simulators with a backend switch.

A family edits an XML file (Brax's or its own) and gets a `Simulator`: two
functions over a small state. `brax_family.BraxFamily` makes an environment of
it. Brax's own environments and training wrappers are not used.

Four backends simulate the same XML and are four different environments; data
must not be mixed across them. 'spring' is the
fastest on a CPU, 'mjx' is the faithful one.

All heavy imports happen in `make_simulator`, and what third parties print or
warn there (missing optional packages, maintenance notices) is swallowed.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import importlib
from importlib import metadata
import io
import pathlib
from types import ModuleType
from typing import Any, NamedTuple
import warnings
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import numpy as np

from offmeta.envs import base
from offmeta.types import Array

BACKENDS = ('spring', 'positional', 'generalized', 'mjx')
# 50 line-search steps (the XML's) cost 2.5 to 4 times more and change nothing
# that could be measured under random actions.
_SOLVER_ITERATIONS, _LS_ITERATIONS = 4, 8
_PACKAGES = ('brax', 'mujoco', 'mujoco-mjx')
# Beyond these a simulation has blown up: m, rad and m/s, rad/s. The largest
# velocities of sound simulations under random actions are 120 (environments
# table); MuJoCo's own bound, 1e10, lets rewards of 1e9 into a batch.
_MAX_POSITION, _MAX_VELOCITY = 1e4, 1e3

# Fields of the simulated system that differ between tasks, by dotted name:
# {'body_mass': [nbody], ...}; empty for families that vary the reward only.
Changes = Mapping[str, Array]


class Physics(NamedTuple):
  """State of one simulation.

  Attributes:
    q: [Q] generalised positions (m, rad; quaternions w x y z).
    qd: [V] generalised velocities (m/s, rad/s).
    internal: what else the backend carries from step to step.
  """

  q: Array
  qd: Array
  internal: Any


class Links(NamedTuple):
  """Where the L links (the bodies that move) are, in world axes.

  Attributes:
    position: [L, 3], of their frames, m.
    rotation: [L, 3, 3], from their frames to the world's.
    velocity: [L, 3], of the origins of their frames, m/s.
    angular_velocity: [L, 3], rad/s.
  """

  position: Array
  rotation: Array
  velocity: Array
  angular_velocity: Array


class Simulator(NamedTuple):
  """A simulated body without a task.

  Attributes:
    init: (q [Q], qd [V], Changes = {}) -> Physics.
    step: (Physics, control [A], Changes = {}) -> (Physics, finite []). Where
      the result has blown up (not finite, positions beyond 1e4, velocities
      beyond 1e3), the old state comes back and `finite` is False, so that
      neither a NaN nor an absurd reward gets into a batch.
    links: (Physics) -> Links. On 'spring' and 'positional' joints give way,
      so that this is not what q and qd alone would say (centimetres).
    start: [Q] nominal start position.
    num_velocities: V.
    dt: seconds per control step.
    system: Brax's `System` (an `mjx.Model` too).
    model: the compiled `mujoco.MjModel`, with the same options.
    options: what of all this changes data, for `EnvSpec.options`.
  """

  init: Callable[..., Physics]
  step: Callable[..., tuple[Physics, Array]]
  links: Callable[[Physics], Links]
  start: np.ndarray
  num_velocities: int
  dt: float
  system: Any
  model: Any
  options: Mapping[str, Any]


def stock_xml(name: str) -> ElementTree.Element:
  """One of the XML files that Brax ships, e.g. 'ant', to be edited."""
  package = pathlib.Path(_import('brax').__file__).parent
  path = package / 'envs' / 'assets' / f'{name}.xml'
  return ElementTree.parse(path).getroot()


def fix_total_mass(xml: ElementTree.Element) -> None:
  """Turns `settotalmass` into an explicit density, in place.

  MuJoCo deprecates the attribute and says so on stderr and in a file
  MUJOCO_LOG.TXT in the current folder. The masses and inertias of the result
  are the same, for models whose geoms take their density from the default.
  """
  total = float(xml.find('compiler').attrib.pop('settotalmass'))
  geom = xml.find('default/geom')
  assert 'density' not in geom.attrib
  model = _import('mujoco').MjModel.from_xml_string(
    ElementTree.tostring(xml, encoding='unicode')
  )
  # 1000 kg / m^3 is MuJoCo's default density.
  geom.set('density', repr(1000.0 * total / float(model.body_mass.sum())))


def make_simulator(
  xml: ElementTree.Element,
  backend: str,
  n_frames: int,
  dt: float,
  solver_iterations: int | None = None,
  ls_iterations: int | None = None,
) -> Simulator:
  """Compiles a model for one backend.

  Args:
    xml: a MuJoCo model; changed here.
    backend: one of BACKENDS.
    n_frames: physics steps per control step.
    dt: seconds per control step.
    solver_iterations: Newton iterations; mjx only, None means 4.
    ls_iterations: line-search iterations; mjx only, None means 8.

  Raises:
    ValueError: unknown backend, or solver options without mjx.
    ModuleNotFoundError: Brax or MuJoCo is not installed.
  """
  base.require_choice('backend', backend, BACKENDS)
  base.require_count('n_frames', n_frames)
  options = {
    'backend': backend,
    'timestep': dt / n_frames,
    'n_frames': n_frames,
    'solver_iterations': None,
    'ls_iterations': None,
    'versions': {name: metadata.version(name) for name in _PACKAGES},
  }
  physics_options = xml.find('option')
  if physics_options is None:
    physics_options = ElementTree.SubElement(xml, 'option')
  physics_options.set('timestep', repr(dt / n_frames))
  if backend == 'mjx':
    for name, value, default in (
      ('solver_iterations', solver_iterations, _SOLVER_ITERATIONS),
      ('ls_iterations', ls_iterations, _LS_ITERATIONS),
    ):
      options[name] = default if value is None else value
      base.require_count(name, options[name])
    physics_options.set('iterations', str(options['solver_iterations']))
    physics_options.set('ls_iterations', str(options['ls_iterations']))
  elif solver_iterations is not None or ls_iterations is not None:
    raise ValueError(
      'options solver_iterations and ls_iterations work '
      f'only with backend mjx, not with {backend}'
    )
  with _quiet():
    system = _import('brax.io.mjcf').loads(
      ElementTree.tostring(xml, encoding='unicode')
    )
    make = _mjx_functions if backend == 'mjx' else _brax_functions
    init, step, links = make(backend, system, n_frames)
  return Simulator(
    init=_wrapped(init),
    step=_wrapped(_guarded(step)),
    links=_wrapped(links),
    start=np.asarray(system.init_q),
    num_velocities=int(system.mj_model.nv),
    dt=dt,
    system=system,
    model=system.mj_model,
    options=options,
  )


def _mjx_functions(
  backend: str, system: Any, n_frames: int
) -> tuple[Callable, Callable, Callable]:
  """MJX. Positions, velocities and the warm start are its whole state.

  So a start costs no forward pass (Brax's does one), and stepping carries
  three vectors instead of all of `mjx.Data`.
  """
  del backend
  mjx = _import('mujoco.mjx')
  blank = mjx.make_data(system)

  def init(q, qd, changes={}):
    del changes
    return Physics(q, qd, jnp.zeros_like(qd))

  def step(physics, action, changes={}):
    changed = system.tree_replace(dict(changes))

    def substep(physics, _):
      data = mjx.step(
        changed,
        blank.replace(
          qpos=physics.q,
          qvel=physics.qd,
          qacc_warmstart=physics.internal,
          ctrl=action,
        ),
      )
      return Physics(data.qpos, data.qvel, data.qacc_warmstart), None

    return jax.lax.scan(substep, physics, length=n_frames)[0]

  def links(physics):
    data = mjx.kinematics(
      system, blank.replace(qpos=physics.q, qvel=physics.qd)
    )
    data = mjx.com_vel(system, mjx.com_pos(system, data))
    # `cvel` is about the centre of mass of the whole tree.
    angular, velocity = jnp.split(data.cvel[1:], 2, axis=-1)
    arm = data.xpos[1:] - data.subtree_com[system.body_rootid[1:]]
    velocity += jnp.cross(angular, arm)
    return Links(data.xpos[1:], data.xmat[1:], velocity, angular)

  return init, step, links


def _brax_functions(
  backend: str, system: Any, n_frames: int
) -> tuple[Callable, Callable, Callable]:
  """Brax's own pipelines; `internal` is their state without q and qd."""
  pipeline, math = _import(f'brax.{backend}.pipeline'), _import('brax.math')
  pack = lambda s: Physics(s.q, s.qd, s.replace(q=None, qd=None))
  unpack = lambda p: p.internal.replace(q=p.q, qd=p.qd)

  def init(q, qd, changes={}):
    return pack(pipeline.init(system.tree_replace(dict(changes)), q, qd))

  def step(physics, action, changes={}):
    changed = system.tree_replace(dict(changes))
    substep = lambda state, _: (pipeline.step(changed, state, action), None)
    state, _ = jax.lax.scan(substep, unpack(physics), length=n_frames)
    return pack(state)

  def links(physics):
    x, xd = physics.internal.x, physics.internal.xd
    return Links(x.pos, jax.vmap(math.quat_to_3x3)(x.rot), xd.vel, xd.ang)

  return init, step, links


def _guarded(step: Callable) -> Callable:
  """Keeps the old state where the new one has blown up."""

  def guarded(physics, action, changes={}):
    after = step(physics, action, changes)
    finite = jnp.stack(
      [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(after)]
    )
    bounded = jnp.all(jnp.abs(after.q) < _MAX_POSITION) & jnp.all(
      jnp.abs(after.qd) < _MAX_VELOCITY
    )
    finite = jnp.all(finite) & bounded
    after = jax.tree.map(
      lambda new, old: jnp.where(finite, new, old), after, physics
    )
    return after, finite

  return guarded


def _wrapped(function: Callable) -> Callable:
  """For tracing: full float32, no warnings from Brax and MJX, strong types.

  GPUs would otherwise round the inputs of matrix products to 10 bits; and
  weakly typed numbers in a start state would make the first step retrace.
  """

  def call(*args):
    with jax.default_matmul_precision('float32'), warnings.catch_warnings():
      warnings.simplefilter('ignore', DeprecationWarning)
      return jax.tree.map(
        lambda x: jax.lax.convert_element_type(x, x.dtype), function(*args)
      )

  return call


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Swallows Python's stdout and warnings."""
  with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
    warnings.simplefilter('ignore')
    yield


def _import(name: str) -> ModuleType:
  try:
    with _quiet():
      return importlib.import_module(name)
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
      f'families on a physics backend need {", ".join(_PACKAGES)}: {error}',
      name=error.name,
    ) from error
