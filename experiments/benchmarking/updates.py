"""Updates per second, through the code of real runs."""

from collections.abc import Mapping, Sequence
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.benchmarking import cases, ceiling as ceilings, tracing
from experiments.benchmarking.cases import Case
from experiments.benchmarking.options import Options
from experiments.benchmarking.report import say
from experiments.benchmarking.timing import (
  CompileLog,
  Timed,
  compile_seconds,
  rounded,
)
from offmeta import parallel
from offmeta.parallel import Layout
from offmeta.training import seeds as seeds_lib, updates as updates_lib
from offmeta.training.setup import Runtime


class UpdateRunner:
  """A case compiled for a number of seeds, as `phases.py` does it.

  Offline data are shared by the seeds; online every seed has its own.

  Args:
    case: what to run.
    chunk: updates per call.
    layout: seeds and devices.
    matmul_precision: one of PRECISIONS.
  """

  def __init__(
    self,
    case: Case,
    chunk: int,
    layout: Layout,
    matmul_precision: str = 'float32',
  ):
    number = layout.num_seeds
    seeds = seeds_lib.Seeds(seeds_lib.seed_keys(0, number), layout)
    shared = case.stage == 'offline'
    replay = cases.synthetic_replay(case)
    if not shared:
      replay = jax.tree.map(lambda x: jnp.repeat(x[None], number, 0), replay)
    # Else every timed call would copy them to the devices.
    self._replay = layout.place(replay, None if shared else 0)
    self._state = layout.place(
      jax.jit(jax.vmap(case.make().init))(seeds.keys), 0
    )
    self._update = updates_lib.make_update(
      case.get_stage,
      seeds,
      chunk,
      shared_replay=shared,
      matmul_precision=matmul_precision,
    )
    stage, self._extras = case.get_stage(), {}
    if stage.annotate is not None:
      self._extras = updates_lib.annotate(
        types.SimpleNamespace(runtime=Runtime()),
        seeds,
        stage,
        self._state,
        self._replay,
      )
    jax.block_until_ready((self._state, self._replay, self._extras))

  def __call__(self):
    """One chunk; waits for it, as the training loop does."""
    self._state, metrics = self._update(self._state, self._replay, self._extras)
    jax.block_until_ready(metrics)
    return metrics


def _chunk(options: Options, gflop: float, seeds: int) -> int:
  """Updates per call: about half a second on 2 CPU cores."""
  longest = 50 if options.profile == 'smoke' else 500
  if options.chunk:
    return options.chunk
  if jax.default_backend() != 'cpu':
    return longest
  return int(min(max(60.0 / (gflop * seeds), 4), longest))


class Run(NamedTuple):
  """A compiled case and its timings.

  Attributes:
    case: what runs.
    layout: seeds and devices.
    profile: of the case.
    matmul_precision: of the networks.
    chunk: updates per call.
    gflop: of one update of one seed.
    compile_s: of the first call, seconds.
    timed: the case; its unit is one update of one seed.
    short: the same with a quarter of the updates per call, if asked for.
  """

  case: Case
  layout: Layout
  profile: str
  matmul_precision: str
  chunk: int
  gflop: float
  compile_s: float
  timed: Timed
  short: Timed | None = None

  @property
  def seeds(self) -> int:
    """How many."""
    return self.layout.num_seeds

  @property
  def name(self) -> str:
    """For progress and folders."""
    case = self.case
    return f'{case.algorithm}_{case.stage}_{case.variant}_x{self.seeds}'


def prepare(
  case: Case, layout: Layout, options: Options, overhead: bool = False
) -> Run:
  """Compiles a case, and with `overhead` also in short calls."""
  seeds, gflop = layout.num_seeds, case.gflop()
  chunk = _chunk(options, gflop, seeds)

  def timed(chunk):
    runner = UpdateRunner(case, chunk, layout, options.matmul_precision)
    return compile_seconds(runner), Timed(
      runner, chunk * seeds, options.repeat_s
    )

  compile_s, full = timed(chunk)
  run = Run(
    case,
    layout,
    options.profile,
    options.matmul_precision,
    chunk,
    gflop,
    compile_s,
    full,
  )
  return run._replace(short=timed(chunk // 4)[1]) if overhead else run


def time_runs(
  runs: Sequence[Run],
  ways: Mapping[str, Timed],
  options: Options,
  ways_every: int,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
  """Times every run in turn, `repeats` times.

  Args:
    runs: compiled.
    ways: to do matrix products, timed in between.
    options: how often.
    ways_every: so many runs.

  Returns:
    Record of the ceiling, one record per run.
  """
  log = CompileLog()
  recompiled = [0] * len(runs)
  for i in range(options.repeats):
    say(f'timing updates, round {i + 1} of {options.repeats}')
    for j, run in enumerate(runs):
      if j % ways_every == 0:
        for way in ways.values():
          way.measure()
      recompiled[j] += log.during(run.timed.measure)
      if run.short:
        run.short.measure()
  ceiling = ceilings.record(ways, options)
  top = ceiling['gflops'][ceiling['best']]
  return ceiling, [
    {**describe(run), **_speed(run, top), 'recompilations_while_timing': count}
    for run, count in zip(runs, recompiled)
  ]


def measure_updates(
  options: Options, algorithms: Sequence[str]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
  """The ceiling and every case, all on one device.

  Returns:
    Record of the ceiling, one record per case and number of seeds.
  """
  ways = ceilings.make_ceiling(options)
  runs = []
  for case in cases.make_cases(options.profile, algorithms):
    for seeds in options.seeds:
      say(f'compiling {case.algorithm} {case.stage} {case.variant} x{seeds}')
      runs.append(
        prepare(
          case,
          parallel.make_layout(seeds, max_devices=1),
          options,
          options.overhead,
        )
      )
  ceiling, rows = time_runs(runs, ways, options, 1)
  if options.trace_dir:
    tracing.trace(options.trace_dir, {run.name: run.timed.call for run in runs})
  return ceiling, rows


def describe(run: Run) -> dict[str, Any]:
  """What was run: the part of a record that is no timing, but compiling."""
  case, batch = run.case, run.case.get_stage().batch
  mask = case.shapes()[1].context_mask
  return {
    'algorithm': case.algorithm,
    'stage': case.stage,
    'variant': case.variant,
    'profile': run.profile,
    'matmul_precision': run.matmul_precision,
    'seeds': run.seeds,
    'devices': len(run.layout.devices),
    'gflop_per_update': rounded(run.gflop),
    'compile_s': rounded(run.compile_s),
    'updates_per_call': run.chunk,
    'data': 'synthetic',
    'sizes': {
      'observation': case.spec.observation_size,
      'action': case.spec.action_size,
      'num_tasks': batch.num_tasks,
      'query_size': batch.query.size,
      'context_size': 0 if mask is None else mask.shape[1],
      'replay': [case.num_tasks, case.num_rows],
    },
  }


def _speed(run: Run, ceiling: float) -> dict[str, Any]:
  """Rates are of all seeds together, and so is the fraction."""
  rate, gflop = run.timed.rate, run.gflop
  values = {
    'updates_per_s': rounded(rate),
    'updates_per_s_spread': run.timed.spread,
    'gflops': rounded(rate * gflop),
    'fraction_of_ceiling': rounded(rate * gflop / ceiling),
    'ms_per_update_of_all_seeds': rounded(1e3 * run.seeds / rate),
  }
  return {**values, **overhead(run)} if run.short else values


def overhead(run: Run) -> dict[str, Any]:
  """What a call costs besides its updates.

  A call of n updates takes a + n b: two lengths give a. Noise can make it
  negative where updates are long.
  """
  short = run.chunk // 4
  full_us, short_us = (
    1e6 * run.seeds / timed.rate for timed in (run.timed, run.short)
  )
  per_call = (short_us - full_us) / (1 / short - 1 / run.chunk)
  return {
    'us_per_update': rounded(full_us),
    'updates_per_short_call': short,
    'us_per_update_in_short_calls': rounded(short_us),
    'overhead_us_per_call': rounded(per_call),
  }
