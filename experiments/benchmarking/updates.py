"""Updates per second, through the code of real runs."""

from collections.abc import Sequence
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.benchmarking import ceiling as ceilings
from experiments.benchmarking import flops
from experiments.benchmarking.options import Options
from experiments.benchmarking.report import say
from experiments.benchmarking.timing import (
    compile_seconds,
    CompileLog,
    rounded,
    Timed,
)
from experiments.configs import recipes
from experiments.configs import smac as smac_experiment
from offmeta.algorithms import ALGORITHMS, sac
from offmeta.data import buffer as buffers
from offmeta.data.buffer import Replay
from offmeta.training import config as configs
from offmeta.training import loop, schedule
from offmeta.training.config import ExperimentConfig
from offmeta.types import Algorithm, EnvSpec, Stage, Transition


class Case(NamedTuple):
  """One kind of update to measure.

  Attributes:
    algorithm: key of ALGORITHMS.
    stage: 'offline' or 'online'.
    variant: which configuration, e.g. 'released'.
    spec: sizes of the family.
    config: of the algorithm.
    num_tasks, num_rows: M and C of the replay.
  """

  algorithm: str
  stage: str
  variant: str
  spec: EnvSpec
  config: Any
  num_tasks: int
  num_rows: int

  def make(self, axis_name: str | None = None) -> Algorithm:
    """The algorithm of this case."""
    return ALGORITHMS[self.algorithm][1](self.spec, self.config, axis_name)

  def get_stage(self, axis_name: str | None = None) -> Stage:
    """The stage of this case."""
    return getattr(self.make(axis_name), self.stage)[0]

  def evaluations(self) -> list[flops.Evaluation]:
    """The networks that one update evaluates."""
    return flops.EVALUATIONS[self.algorithm](
        self.spec, self.config, self.get_stage())

  def gflop(self) -> float:
    """Of one update of one seed."""
    return sum(e.flop() for e in self.evaluations()) / 1e9


def _spec(name: str, observation: int, action: int, length: int) -> EnvSpec:
  return EnvSpec(name, observation, action, 1, length, False, {})


def _smoke_config() -> ExperimentConfig:
  nets = {
      name: (16, 16) for name in (
          'encoder_hidden', 'decoder_hidden', 'critic_hidden', 'actor_hidden')}
  sizes = {'num_tasks': 2, 'query_size': 16, 'context_size': 8}
  return configs.from_dict({
      'smac': {
          **nets, 'offline': sizes, 'online': {**sizes, 'sequence_size': 16}},
      'collect': {'behaviour': {
          **nets, 'value_hidden': (16, 16), 'online': sizes}},
  })


def make_cases(profile: str) -> list[Case]:
  """All update cases of a profile."""
  single_task = sac.Config()
  if profile == 'paper':
    base, data = ExperimentConfig(), (100, 1200)
    spec = _spec('cheetah_vel', 20, 6, 200)
  elif profile == 'cpu':
    values = smac_experiment.get_config('point_robot').to_dict()
    values.pop('profiles')
    base = configs.from_dict(values)
    data = (base.family.num_train, base.collect.rl_size)
    spec = _spec('point_robot', 2, 2, 20)
  else:
    base, data = _smoke_config(), (4, 64)
    spec = _spec('smoke', 3, 2, 8)
    single_task = sac.Config((16, 16), (16, 16), batch_size=16)
  recipe = dict(recipes.MATCHED)
  recipe.pop('description')
  matched = configs.from_dict(recipe, base).smac
  behaviour = base.collect.behaviour
  cases = [
      Case('smac', 'offline', 'released', spec, base.smac, *data),
      Case('smac', 'online', 'released', spec, base.smac, *data),
      Case('smac', 'online', 'matched', spec, matched, *data),
      Case('pearl', 'online', 'behaviour', spec, behaviour, *data),
      Case('sac', 'online', 'one_task', spec, single_task, 1, data[1]),
  ]
  if profile == 'paper':  # the meta-batch of PEARL's own paper
    wide = dataclasses.replace(
        behaviour, online=dataclasses.replace(behaviour.online, num_tasks=16))
    cases.append(Case('pearl', 'online', '16_tasks', spec, wide, *data))
  return cases


def synthetic_replay(case: Case) -> Replay:
  """Random transitions of a case's sizes, with one sequence per task."""
  shape = (case.num_tasks, case.num_rows)
  keys = jax.random.split(jax.random.key(0), 4)
  observation = (*shape, case.spec.observation_size)
  data = Transition(
      observation=jax.random.normal(keys[0], observation),
      action=jax.random.uniform(
          keys[1], (*shape, case.spec.action_size), minval=-1.0),
      reward=jax.random.normal(keys[2], shape),
      discount=jnp.ones(shape),
      next_observation=jax.random.normal(keys[3], observation))
  size = jnp.full(shape[:1], case.num_rows)
  buffer = buffers.make(data, size, case.num_rows, max_sequences=1)
  length = min(case.num_rows, max(1, case.get_stage().batch.sequence_size))
  return Replay(buffer._replace(
      sequence_length=jnp.full((case.num_tasks, 1), length),
      num_sequences=jnp.ones((case.num_tasks,), jnp.int32)), None)


class UpdateRunner:
  """A case compiled for a number of seeds, as `phases.py` does it.

  Offline data are shared by the seeds; online every seed has its own.

  Args:
    case: what to run.
    seeds: S.
    chunk: updates per call.
  """

  def __init__(self, case: Case, seeds: int, chunk: int):
    keys = schedule.seed_keys(0, seeds)
    shared = case.stage == 'offline'
    replay = synthetic_replay(case)
    self._replay = replay if shared else jax.tree.map(
        lambda x: jnp.repeat(x[None], seeds, 0), replay)
    self._state = jax.jit(jax.vmap(case.make().init))(keys)
    streams = jax.vmap(lambda k: schedule.stream(k, 'batches'))(keys)
    self._update = loop.make_update(
        case.get_stage, streams, chunk, shared_replay=shared)
    jax.block_until_ready((self._state, self._replay))

  def __call__(self):
    """One chunk; waits for it, as the training loop does."""
    self._state, metrics = self._update(self._state, self._replay)
    jax.block_until_ready(metrics)
    return metrics


def _chunk(options: Options, gflop: float, seeds: int) -> int:
  """Updates per call: about half a second on 2 CPU cores."""
  if options.chunk:
    return options.chunk
  if jax.default_backend() != 'cpu':
    return 500
  return int(min(max(60.0 / (gflop * seeds), 4), 500))


class _Run(NamedTuple):
  """A compiled case and its timings."""

  case: Case
  seeds: int
  chunk: int
  compile_s: float
  timed: Timed


def _compile(case: Case, seeds: int, options: Options) -> _Run:
  say(f'compiling {case.algorithm} {case.stage} {case.variant} x{seeds}')
  chunk = _chunk(options, case.gflop(), seeds)
  runner = UpdateRunner(case, seeds, chunk)
  return _Run(case, seeds, chunk, compile_seconds(runner),
              Timed(runner, chunk * seeds, options.repeat_s))


def measure_updates(
    options: Options, algorithms: Sequence[str]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
  """The ceiling and every case, in turn, `repeats` times.

  Returns:
    Record of the ceiling, one record per case and number of seeds.
  """
  log = CompileLog()
  ways = ceilings.make_ceiling(options.profile, min(options.repeat_s, 0.4))
  runs = [
      _compile(case, seeds, options)
      for case in make_cases(options.profile) if case.algorithm in algorithms
      for seeds in options.seeds]
  recompiled = [0] * len(runs)
  for i in range(options.repeats):
    say(f'timing updates, round {i + 1} of {options.repeats}')
    for j, run in enumerate(runs):
      for way in ways.values():
        way.measure()
      recompiled[j] += log.during(run.timed.measure)
  ceiling = ceilings.record(ways, options.profile)
  top = ceiling['gflops'][ceiling['best']]
  return ceiling, [
      _record(run, options.profile, top, count)
      for run, count in zip(runs, recompiled)]


def _record(
    run: _Run, profile: str, ceiling: float, recompiled: int
) -> dict[str, Any]:
  case, rate, gflop = run.case, run.timed.rate, run.case.gflop()
  stage = case.get_stage()
  batch = stage.batch
  return {
      'algorithm': case.algorithm,
      'stage': case.stage,
      'variant': case.variant,
      'profile': profile,
      'seeds': run.seeds,
      # Of all seeds together, as is the fraction.
      'updates_per_s': rounded(rate),
      'updates_per_s_spread': run.timed.spread,
      'gflop_per_update': rounded(gflop),
      'gflops': rounded(rate * gflop),
      'fraction_of_ceiling': rounded(rate * gflop / ceiling),
      'compile_s': rounded(run.compile_s),
      'recompilations_while_timing': recompiled,
      'ms_per_update_of_all_seeds': rounded(1e3 * run.seeds / rate),
      'updates_per_call': run.chunk,
      'data': 'synthetic',
      'sizes': {
          'observation': case.spec.observation_size,
          'action': case.spec.action_size,
          'num_tasks': batch.num_tasks,
          'query_size': batch.query_size,
          'context_size': flops.context_rows(stage) // batch.num_tasks,
          'replay': [case.num_tasks, case.num_rows],
      },
      'gflop_by_network': {
          e.network: rounded(e.flop() / 1e9) for e in case.evaluations()},
  }
