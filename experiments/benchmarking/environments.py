"""Task families: speed, stability and agreement with C MuJoCo.

One program per number of environments serves all three (`episodes.Programs`):
the number of steps is an argument of it and no constant.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import inspect
import itertools
import json
import time
from typing import Any

import jax
import numpy as np

from experiments.benchmarking import BenchmarkError
from experiments.benchmarking.agreement import measure_agreement
from experiments.benchmarking.episodes import Programs
from experiments.benchmarking.options import Options
from experiments.benchmarking.report import say
from experiments.benchmarking.timing import Timed, compile_seconds, rounded
from offmeta import envs

Rows = list[dict[str, Any]]
TABLES = ('env_steps', 'env_stability', 'env_agreement', 'env_refused')

_CHECK_ENVS = 64  # for stability and agreement
_MIN_STEPS, _MAX_REPEATS, _NUM_STARTS = 10, 3, 4


def measure_speed(
  programs: Programs, num_envs: int, options: Options
) -> dict[str, Any]:
  """Steps per second of random episodes side by side, resets included."""
  family = programs.family
  # Tasks and keys change from call to call, as in training.
  starts = itertools.cycle(
    [programs.start(seed, num_envs) for seed in range(_NUM_STARTS)]
  )

  def reset():
    tasks, k_reset, k_roll = next(starts)
    states = programs.reset(k_reset, tasks)
    return states, tasks, k_roll

  def episodes(num_steps):
    jax.block_until_ready(programs.roll(*reset(), num_steps))

  wait_for_reset = lambda: jax.block_until_ready(reset())
  reset_compile_s = compile_seconds(wait_for_reset)
  compile_s = compile_seconds(lambda: episodes(1))
  steps = options.env_steps or _fitting_steps(
    episodes, options.repeat_s, family.spec.episode_length
  )
  timed = Timed(lambda: episodes(steps), num_envs * steps, options.repeat_s)
  resets = Timed(wait_for_reset, num_envs, options.repeat_s / 4)
  for _ in range(min(options.repeats, _MAX_REPEATS)):
    timed.measure()
    resets.measure()
  return {
    'num_envs': num_envs,
    'steps_per_s': rounded(timed.rate),
    'steps_per_s_spread': timed.spread,
    'timed_steps': steps,  # from a reset, per call
    'compile_s': rounded(compile_s),
    'reset_compile_s': rounded(reset_compile_s),
    'reset_cost_in_steps': rounded(timed.rate / resets.rate),
    'traces': programs.traces[num_envs],  # 1: new tasks retrace nothing
    'reset_traces': programs.reset_traces[num_envs],
    'episode_length': family.spec.episode_length,
    'policy': 'uniform random',
    'options': json.loads(json.dumps(dict(family.spec.options), default=str)),
  }


def _fitting_steps(
  episodes: Callable[[int], None], seconds: float, longest: int
) -> int:
  """Steps for one timing: whole episodes if they fit, and no fewer than 10."""
  shortest = min(_MIN_STEPS, longest)
  begin = time.perf_counter()
  episodes(shortest)
  per_step = (time.perf_counter() - begin) / shortest
  return int(np.clip(seconds / per_step, shortest, longest))


def measure_stability(programs: Programs, num_envs: int) -> dict[str, Any]:
  """Full episodes of random tasks under random actions."""
  spec = programs.family.spec
  tasks, k_reset, k_roll = programs.start(0, num_envs)
  states = programs.reset(k_reset, tasks)
  record = jax.tree.map(
    np.asarray, programs.roll(states, tasks, k_roll, spec.episode_length)[1]
  )
  ended = record.steps[~record.alive]
  return {
    'num_envs': num_envs,
    'episode_length': spec.episode_length,
    'terminated': rounded(len(ended) / num_envs),
    'median_steps_to_termination': (
      float(np.median(ended)) if len(ended) else None
    ),
    'mean_steps_before_termination': rounded(record.steps.mean()),
    'diverged': int(record.diverged.sum()),
    'non_finite': int(record.non_finite.sum()),
    'max_qd': (
      rounded(record.max_qd.max()) if hasattr(states.physics, 'qd') else None
    ),
  }


# Which families, on which backends.


def cases(options: Options) -> list[tuple[str, str]]:
  """(family, backend); 'jax' for families without a simulator."""
  if options.profile == 'smoke':
    return [('point_robot', 'jax')]
  found = []
  for name in options.env_families:
    switch = inspect.signature(envs.FAMILIES[name]).parameters.get('backend')
    found += (
      [(name, 'jax')]
      if switch is None
      else [
        (name, switch.default if backend == 'default' else backend)
        for backend in options.env_backends
      ]
    )
  return list(dict.fromkeys(found))


def _has(rows: Sequence[Mapping[str, Any]], **key: Any) -> bool:
  return any(all(row[k] == v for k, v in key.items()) for row in rows)


def measure(
  result: Mapping[str, Rows], name: str, backend: str, options: Options
) -> Iterator[None]:
  """Adds the rows that are missing for one family on one backend.

  Args:
    result: has the lists TABLES.
    name: of the family.
    backend: see `cases`.
    options: how to measure.

  Yields:
    After each new row.

  Raises:
    BenchmarkError: the simulator is not installed.
  """
  key = {'family': name, 'backend': backend}
  # (table, number of environments, measurement of Programs)
  wanted = [
    ('env_steps', n, lambda programs, n: measure_speed(programs, n, options))
    for n in options.num_envs
  ]
  wanted.append(('env_stability', _CHECK_ENVS, measure_stability))
  if backend == 'mjx':
    wanted.append(('env_agreement', _CHECK_ENVS, measure_agreement))
  missing = [
    row for row in wanted if not _has(result[row[0]], **key, num_envs=row[1])
  ]
  if not missing or _has(result['env_refused'], **key):
    return
  try:
    family = envs.make(
      name, **({} if backend == 'jax' else {'backend': backend})
    )
  except ValueError as error:
    result['env_refused'].append({**key, 'reason': str(error)})
    yield
    return
  except ImportError as error:
    raise BenchmarkError(f'{name}: {error}') from error
  programs = Programs(family)
  for table, number, call in missing:
    say(f'{table} {name} {backend} x{number}')
    result[table].append({**key, **call(programs, number)})
    yield
