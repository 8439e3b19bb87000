"""MJX against C MuJoCo: the same start, controls and task, step by step."""

from collections.abc import Mapping
import copy
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarking.episodes import Programs
from experiments.benchmarking.timing import rounded
from offmeta.types import Array, EnvState, Task

_NUM_STEPS = 20  # later, rounding alone parts equal motions
_NUDGE = 1e-6  # m and rad: some ten roundings of a float32


def commands(
  family: Any, state: EnvState, action: Array, task: Task
) -> tuple[Array, Mapping[str, Array]]:
  """What `family.step` hands to its simulator: controls and changed fields."""
  seen = []

  def step(physics, control, changes):
    seen.append((control, changes))
    return physics, jnp.ones((), bool)

  asked = copy.copy(family)
  asked.simulator = family.simulator._replace(step=step)
  asked.step(state, action, task)
  return seen[0]


def changed_model(model: Any, changes: Mapping[str, Any]) -> Any:
  """A copy of a `mujoco.MjModel` with some fields set, by dotted name."""
  model = copy.copy(model)
  for name, value in changes.items():
    *owners, field = name.split('.')
    setattr(functools.reduce(getattr, owners, model), field, value)
  return model


def _simulate(
  model: Any,
  q: np.ndarray,
  qd: np.ndarray,
  controls: np.ndarray,
  n_frames: int,
) -> tuple[np.ndarray, np.ndarray, float]:
  """C MuJoCo from q [Q], qd [V] under controls [T, U].

  Returns:
    q [T, Q] and qd [T, V] after each control step, mean number of contacts.
  """
  import mujoco  # pylint: disable=g-import-not-at-top

  data = mujoco.MjData(model)
  data.qpos[:], data.qvel[:] = q, qd
  motion, contacts = [], []
  for control in controls:
    data.ctrl[:] = control
    mujoco.mj_step(model, data, n_frames)
    motion.append((data.qpos.copy(), data.qvel.copy()))
    contacts.append(data.ncon)
  return *map(np.stack, zip(*motion)), float(np.mean(contacts))


def measure_agreement(programs: Programs, num_envs: int) -> dict[str, Any]:
  """How far MJX and C MuJoCo part within 20 random control steps.

  An episode's difference is the largest over its steps and coordinates, in q
  (m, rad) and qd (m/s, rad/s); episodes go on after a termination. The few
  large ones are chaos: rounding decides in which physics step a contact
  begins. So C MuJoCo is also compared with itself, from a start moved by 1e-6:
  'c_dq_...'. 'p95' is exceeded by 5% of the episodes.
  """
  family = programs.family
  tasks, k_reset, k_roll = programs.start(0, num_envs)
  states = programs.reset(k_reset, tasks)
  ask = jax.jit(
    jax.vmap(
      lambda state, key, task: commands(
        family, state, programs.action(key, 0), task
      )
    )
  )
  physics, controls = [states.physics], []
  for t in range(_NUM_STEPS):
    keys = jax.vmap(jax.random.fold_in, (0, None))(k_roll, t)
    control, changes = ask(states, keys, tasks)
    states, _ = programs.roll(states, tasks, keys, 1)
    physics.append(states.physics)
    controls.append(control)
  over_envs = lambda arrays: np.stack(arrays, axis=1)  # [N, T, ...]
  starts_and_ends = (
    over_envs([p.q for p in physics]),
    over_envs([p.qd for p in physics]),
  )
  random = np.random.RandomState(0)
  rows = []
  for i, (q, qd, control) in enumerate(
    zip(*starts_and_ends, over_envs(controls))
  ):
    model = changed_model(
      family.simulator.model,
      jax.tree.map(lambda x, i=i: np.asarray(x[i]), dict(changes)),
    )
    simulate = functools.partial(
      _simulate,
      model,
      qd=qd[0],
      controls=control,
      n_frames=family.spec.options['n_frames'],
    )
    c_q, c_qd, contacts = simulate(q=q[0])
    nudged = simulate(q=q[0] + _NUDGE * random.standard_normal(q[0].shape))[0]
    largest = lambda difference: np.abs(difference).max()
    rows.append(
      (
        largest(q[1:] - c_q),
        largest(qd[1:] - c_qd),
        largest(nudged - c_q),
        contacts,
      )
    )
  dq, dqd, c_dq, contacts = np.transpose(rows)
  return {
    'num_envs': num_envs,
    'control_steps': _NUM_STEPS,
    **_spread('dq', dq),
    **_spread('c_dq', c_dq),
    **_spread('dqd', dqd),
    # Without contacts this would compare too little.
    'mean_contacts': rounded(contacts.mean()),
  }


def _spread(name: str, values: np.ndarray) -> dict[str, float]:
  quantiles = {'median': 0.5, 'p95': 0.95, 'max': 1.0}
  return {
    f'{name}_{suffix}': rounded(np.quantile(values, q))
    for suffix, q in quantiles.items()
  }
