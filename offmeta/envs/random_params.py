"""Bodies whose masses, inertias, damping and friction differ between tasks.

Source: rand_param_envs, which PEARL, MACAW, SMAC and CSRO use. Every element
of four fields of the compiled MuJoCo model, the floor's friction included, is
multiplied on its own by base^e with e ~ U(-L, L), L = 3: body mass, body
inertia and geom friction by 1.5^e (0.30 to 3.4), joint damping by 1.3^e (0.46
to 2.2). As there, mass and inertia are not consistent with each other and
constants that MuJoCo derives from them (invweight0) stay at the nominal body's.
Contacts use the larger friction of the two geoms, and of its three numbers
only the first, that of sliding.

The reward is the same for all tasks: v_x + 1 - 0.001 sum(a^2), with v_x the
displacement of the root over one control step of 0.016 s (4 x 0.004 s; Brax's
own walker and hopper take 0.008 s). 200 steps, start q and qd +- U(0.005).

Task: exponents e, {'mass': [nbody], 'inertia': [nbody, 3], 'damping': [V],
'friction': [ngeom, 3]}; that of the world's mass (0) has no effect. Features:
[v_x] in m/s.

Differs from the original: Euler instead of RK4, fewer contacts (Brax's XML).
Contexts need next observations to tell such tasks apart.
"""

from collections.abc import Mapping
import operator
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from offmeta.envs import base, brax_family, simulator as simulators
from offmeta.types import Array, Key, Task

_BASES = {'mass': 1.5, 'inertia': 1.5, 'damping': 1.3, 'friction': 1.5}
_FIELDS: Mapping[str, Mapping[str, str]] = {
  'mjx': {
    'mass': 'body_mass',
    'inertia': 'body_inertia',
    'damping': 'dof_damping',
    'friction': 'geom_friction',
  },
  'generalized': {
    'mass': 'link.inertia.mass',
    'inertia': 'link.inertia.i',
    'damping': 'dof.damping',
    'friction': 'geom_friction',
  },
}
_DT = 0.016  # seconds per control step
_N_FRAMES = {'mjx': 4, 'generalized': 8}
_RESET_NOISE = 0.005
_MAX_VELOCITY = 10.0  # in observations, m/s or rad/s
_CONTROL_WEIGHT, _SURVIVE_REWARD = 0.001, 1.0
_CSRO_SEED = 1234


class RandomParams(brax_family.BraxFamily):
  """What `walker_params` and `hopper_params` share.

  A subclass names Brax's XML file and defines `_healthy`.

  Task lists: 'smac' (50/5), also under the name 'default', and 'pearl'
  (40/10) have the published sizes; PEARL draws without a seed and SMAC's file
  is not public, so the draws are ours. 'csro' (40 draws, every fourth held
  out) has CSRO's very exponents. All three draw in rand_param_envs' order.
  'ood' (50/10): training exponents from the inner two thirds of the range,
  U(-2, 2), held-out ones from its two ends, +-U(2, 3), in every element.
  """

  xml_name: ClassVar[str]

  def __init__(
    self,
    *,
    backend: str = 'mjx',
    log_scale_limit: float = 3.0,
    episode_length: int = 200,
    n_frames: int | None = None,
    solver_iterations: int | None = None,
    ls_iterations: int | None = None,
  ):
    """Makes the family.

    Args:
      backend: 'mjx' or 'generalized'.
      log_scale_limit: L; 2 gives easier bodies.
      episode_length: time limit in steps.
      n_frames: physics steps per control step; None takes the backend's.
      solver_iterations: Newton iterations of mjx; None means 4, as in Brax.
        The walker then leaves the path of a converged solver by more than
        0.001 in q in 10 of 64 random episodes; with 6 in none.
      ls_iterations: line-search iterations of mjx; None means 8.

    Raises:
      ValueError: an unknown or unusable value; the message names the known.
    """
    base.require_choice('backend', backend, simulators.BACKENDS)
    if backend not in _FIELDS:
      raise ValueError(
        f'backend {backend!r} would ignore the randomised fields of family '
        f'{self.name!r} (inertia and damping); use {" or ".join(_FIELDS)}'
      )
    base.require_number('log_scale_limit', log_scale_limit)
    if log_scale_limit <= 0:
      raise ValueError(
        f"option 'log_scale_limit' must be positive, not {log_scale_limit!r}"
      )
    self._limit = float(log_scale_limit)
    simulator = simulators.make_simulator(
      simulators.stock_xml(self.xml_name),
      backend,
      _N_FRAMES[backend] if n_frames is None else n_frames,
      _DT,
      solver_iterations,
      ls_iterations,
    )
    model = simulator.model
    # In the order in which rand_param_envs draws them.
    self._shapes = {
      'mass': (model.nbody,),
      'inertia': (model.nbody, 3),
      'damping': (model.nv,),
      'friction': (model.ngeom, 3),
    }
    self._task_size = sum(map(np.prod, self._shapes.values()))
    # The root's joints slide from this height.
    self._height = float(model.body('torso').pos[2])
    super().__init__(
      simulator,
      observation_size=model.nq - 1 + model.nv,
      feature_size=1,
      episode_length=episode_length,
      terminates=True,
      reset_noise=_RESET_NOISE,
      options={'log_scale_limit': self._limit},
    )

  def sample_tasks(self, key: Key, num_tasks: int) -> Task:
    """Fresh exponents ~ U(-L, L), leaves [num_tasks, ...]."""
    return self._split(
      jax.random.uniform(
        key,
        (num_tasks, self._task_size),
        minval=-self._limit,
        maxval=self._limit,
      )
    )

  def system_changes(self, task: Task) -> simulators.Changes:
    """The nominal fields, each element times base^exponent."""
    scales = {name: _BASES[name] ** task[name] for name in _BASES}
    backend = self.spec.options['backend']
    if backend == 'generalized':
      # Links are the bodies without the world; inertias are diagonal matrices.
      scales['mass'] = scales['mass'][1:]
      scales['inertia'] = scales['inertia'][1:, :, None]
    system = self.simulator.system
    return {
      field: operator.attrgetter(field)(system) * scales[name]
      for name, field in _FIELDS[backend].items()
    }

  def reward(self, features: Array, action: Array, task: Task) -> Array:
    """v_x + 1 - 0.001 sum(a^2) of features [..., 1], action [..., A]."""
    del task
    cost = jnp.sum(jnp.square(base.clip_action(action)), axis=-1)
    return features[..., 0] + _SURVIVE_REWARD - _CONTROL_WEIGHT * cost

  def _task_lists(self) -> base.TaskLists:
    smac = lambda: self._drawn_list(base.PUBLISHED_SEED, 55, range(50, 55))
    return {
      'default': smac,
      'smac': smac,
      'pearl': lambda: self._drawn_list(base.PUBLISHED_SEED, 50, range(40, 50)),
      'csro': lambda: self._drawn_list(_CSRO_SEED, 40, range(2, 40, 4)),
      'ood': self._ood_list,
    }

  def _drawn_list(
    self, seed: int, num_tasks: int, test: range
  ) -> tuple[Task, Task]:
    """Uniform draws in order, those numbered `test` held out."""
    exponents = np.random.RandomState(seed).uniform(
      -self._limit, self._limit, (num_tasks, self._task_size)
    )
    return (
      self._split(np.delete(exponents, test, axis=0)),
      self._split(exponents[test]),
    )

  def _ood_list(self) -> tuple[Task, Task]:
    random, inner = base.published_random(), 2 / 3 * self._limit
    train = random.uniform(-inner, inner, (50, self._task_size))
    test = random.uniform(inner, self._limit, (10, self._task_size))
    return (
      self._split(train),
      self._split(test * random.choice([-1.0, 1.0], test.shape)),
    )

  def _split(self, exponents: Array | np.ndarray) -> Task:
    """Cuts rows [M, size of a task] into the fields, in float32."""
    ends = np.cumsum([np.prod(shape) for shape in self._shapes.values()])
    parts = jnp.split(jnp.asarray(exponents, jnp.float32), ends[:-1], axis=1)
    return {
      name: part.reshape(-1, *shape)
      for part, (name, shape) in zip(parts, self._shapes.items(), strict=True)
    }

  def _start(self, key: Key) -> tuple[Array, Array]:
    return brax_family.uniform_start(self.simulator, key, self._reset_noise)

  def _root_height(self, physics: simulators.Physics) -> Array:
    return self._height + physics.q[1]

  def _observe(self, physics: simulators.Physics, action: Array) -> Array:
    """Height of the root (m), its pitch and the joints, clipped velocities."""
    del action
    return jnp.concatenate(
      [
        self._root_height(physics)[None],
        physics.q[2:],
        jnp.clip(physics.qd, -_MAX_VELOCITY, _MAX_VELOCITY),
      ]
    )

  def _features(
    self, before: simulators.Physics, after: simulators.Physics
  ) -> Array:
    """[v_x]: the first coordinate is the root's x."""
    return (after.q[:1] - before.q[:1]) / _DT
