"""Measures speed: updates, environment steps, and where a run's time went.

  python -m experiments.benchmark --out=benchmark.json
  python -m experiments.benchmark --only=smac,pearl --out=benchmark.json
  python -m experiments.benchmark --only=workdir --workdir=runs/cheetah

Updates go through `offmeta.training.loop.make_update`, the code of real runs:
sampling included, one compiled scan over updates. The data are synthetic, the
sizes those of a profile: 'paper' (published networks and batches, cheetah_vel
observations), 'cpu' (the main job of experiments/configs/smac.py) or 'smoke'.

The ceiling is the rate of float32 matrix products on the same device,
measured in between the updates, because shared machines drift by 20%. FLOPs
are counted by formula (`Evaluation`): multiply-adds of matrix products only.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from importlib import metadata
import itertools
import json
import math
import os
import pathlib
import platform
import resource
import statistics
import sys
import time
from typing import Any, NamedTuple

# Quiet before jax and its friends are imported.
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')

from absl import app, flags, logging  # pylint: disable=g-import-not-at-top
import jax
import jax.numpy as jnp

from experiments.configs import recipes
from experiments.configs import smac as smac_experiment
from offmeta import envs, rollout
from offmeta.algorithms import ALGORITHMS, pearl, smac
from offmeta.data import buffer as buffers
from offmeta.data.buffer import Replay
from offmeta.envs import simulator
from offmeta.training import config as configs
from offmeta.training import loop, schedule
from offmeta.training.config import ExperimentConfig
from offmeta.training.setup import write_json
from offmeta.types import Algorithm, Array, EnvSpec, Stage, Transition

PARTS = (*sorted(ALGORITHMS), 'env', 'workdir')
PROFILES = ('paper', 'cpu', 'smoke')
_PACKAGES = (
    'jax', 'jaxlib', 'brax', 'mujoco', 'mujoco-mjx', 'flax', 'optax', 'numpy')
_FAMILIES = ('point_robot', 'cheetah_vel', 'ant_dir')
_COMPILE_EVENT = '/jax/core/compile/backend_compile_duration'


class BenchmarkError(ValueError):
  """Something was asked for that cannot be measured."""


@dataclasses.dataclass(frozen=True)
class Options:
  """What to measure, and for how long; the flags of the command.

  Attributes:
    only: parts (see PARTS); empty for all.
    profile: sizes of the updates, one of PROFILES.
    seeds: numbers of seeds run side by side.
    repeats: timings per figure; the median is reported.
    repeat_s: wall seconds per timing.
    chunk: updates per compiled call; 0 chooses.
    env_families, env_backends: what `env` steps through.
    num_envs: environments side by side.
    workdir: of a run, for the part `workdir`.
  """

  only: tuple[str, ...] = ()
  profile: str = 'paper'
  seeds: tuple[int, ...] = (1,)
  repeats: int = 5
  repeat_s: float = 2.0
  chunk: int = 0
  env_families: tuple[str, ...] = _FAMILIES
  env_backends: tuple[str, ...] = ('spring', 'mjx')
  num_envs: int = 64
  workdir: str = ''


def _known(what: str, names: Sequence[str], known: Sequence[str]):
  unknown = [name for name in names if name not in known]
  if unknown:
    raise BenchmarkError(
        f'--{what}: unknown {", ".join(map(repr, unknown))}; known:'
        f' {", ".join(known)}')


def validate(options: Options):
  """Checks options before anything is measured.

  Raises:
    BenchmarkError: names the flag and what it accepts.
  """
  _known('only', options.only, PARTS)
  _known('profile', (options.profile,), PROFILES)
  _known('env_families', options.env_families, sorted(envs.FAMILIES))
  _known('env_backends', options.env_backends, simulator.BACKENDS)
  if not options.seeds or min(options.seeds) < 1:
    raise BenchmarkError('--seeds: a list of numbers of at least 1')
  for name in ('repeats', 'num_envs'):
    if getattr(options, name) < 1:
      raise BenchmarkError(f'--{name}: must be at least 1')
  if not options.repeat_s > 0 or options.chunk < 0:
    raise BenchmarkError('--repeat_s must be above 0, --chunk not below 0')
  if 'workdir' in options.only and not options.workdir:
    raise BenchmarkError('--only=workdir needs --workdir=DIR')
  if options.workdir:
    _timing_file(options.workdir)


# Timing.


class CompileLog:
  """Counts the programs that XLA compiles, from jax.monitoring."""

  def __init__(self):
    self._programs = 0
    jax.monitoring.register_event_duration_secs_listener(self._listen)

  def _listen(self, event, duration, **unused):
    del duration, unused
    self._programs += event == _COMPILE_EVENT

  def during(self, work: Callable[[], Any]) -> int:
    """Runs `work`; how many programs were compiled in it."""
    before = self._programs
    work()
    return self._programs - before


def compile_seconds(call: Callable[[], Any]) -> float:
  """Wall seconds of tracing and compiling: the first call less the second."""
  begin = time.perf_counter()
  call()
  first = time.perf_counter()
  call()
  return max(0.0, 2 * first - begin - time.perf_counter())


class Timed:
  """A repeatable piece of work with its rates.

  Args:
    call: does `units` units of work and waits for the result.
    units: of work per call.
    repeat_s: wall seconds per timing.
  """

  def __init__(self, call: Callable[[], Any], units: float, repeat_s: float):
    self._call = call
    self._units = units
    self._repeat_s = repeat_s
    self.rates: list[float] = []

  def measure(self):
    """One more timing."""
    begin = time.perf_counter()
    calls = 0
    while not calls or time.perf_counter() - begin < self._repeat_s:
      self._call()
      calls += 1
    self.rates.append(calls * self._units / (time.perf_counter() - begin))

  @property
  def rate(self) -> float:
    """Median units per second."""
    return statistics.median(self.rates)

  @property
  def spread(self) -> list[float]:
    """Lowest and highest rate."""
    return [min(self.rates), max(self.rates)]


# FLOPs.


class Evaluation(NamedTuple):
  """One network's share of an update.

  A matrix product of an [N, i] input with an [i, o] weight is 2 N i o FLOP;
  its weight gradient is as much again, and so is its input gradient.

  Attributes:
    network: for the reader.
    layers: (inputs, outputs) of each dense layer; heads are one layer.
    batch: N, rows.
    copies: networks of this shape.
    weight_gradient: whether the weights are trained here.
    input_gradient: whether a gradient flows on into the input.
  """

  network: str
  layers: tuple[tuple[int, int], ...]
  batch: int
  copies: int = 1
  weight_gradient: bool = False
  input_gradient: bool = False

  def flop(self) -> float:
    """Of the matrix products."""
    weights = sum(i * o for i, o in self.layers)
    first = math.prod(self.layers[0])
    passes = weights * (1 + self.weight_gradient)
    if self.input_gradient:
      passes += weights
    elif self.weight_gradient:  # nobody asks for the first layer's input
      passes += weights - first
    return 2.0 * self.batch * self.copies * passes


def _layers(
    inputs: int, hidden: Sequence[int], outputs: int
) -> tuple[tuple[int, int], ...]:
  return tuple(itertools.pairwise((inputs, *hidden, outputs)))


class _Shapes(NamedTuple):
  """Dense layers of the networks that SMAC and PEARL share."""

  encoder: tuple
  decoder: tuple
  critic: tuple
  actor: tuple


def _shapes(spec: EnvSpec, config: smac.Config | pearl.Config) -> _Shapes:
  o, a, z = spec.observation_size, spec.action_size, config.latent_size
  entry = o + a + 1 + (o if config.use_next_observation else 0)
  return _Shapes(
      encoder=_layers(entry, config.encoder_hidden, 2 * z),
      decoder=_layers(o + a + z, config.decoder_hidden, 1),
      critic=_layers(o + a + z, config.critic_hidden, 1),
      actor=_layers(o + z, config.actor_hidden, 2 * a),
  )


def smac_evaluations(
    spec: EnvSpec, config: smac.Config, stage: Stage
) -> list[Evaluation]:
  """What `smac.losses` evaluates in one update of a stage."""
  online = stage.name == 'online'
  trained = not online or config.train_context_online
  net = _shapes(spec, config)
  rows = stage.batch.num_tasks * stage.batch.query_size
  q_gradient = online and config.online_q_weight != 0
  into_z = config.backprop_q_into_encoder and trained
  return [
      Evaluation('encoder', net.encoder, _context_rows(stage), 1, trained),
      Evaluation('decoder', net.decoder, rows, 1, trained, trained),
      Evaluation('actor, next action', net.actor, rows),
      Evaluation('target critics', net.critic, rows, 2),
      Evaluation('critics', net.critic, rows, 2, True, into_z),
      Evaluation('actor', net.actor, rows, 1, True),
      Evaluation('critics, own action', net.critic, rows, 2, False,
                 q_gradient),
  ]


def pearl_evaluations(
    spec: EnvSpec, config: pearl.Config, stage: Stage
) -> list[Evaluation]:
  """What `pearl.critic_losses` and `actor_losses` evaluate in one update."""
  net = _shapes(spec, config)
  value = _layers(
      spec.observation_size + config.latent_size, config.value_hidden, 1)
  rows = stage.batch.num_tasks * stage.batch.query_size
  decoder = [Evaluation('decoder', net.decoder, rows, 1, True, True)]
  return [
      Evaluation('encoder', net.encoder, _context_rows(stage), 1, True),
      *(decoder if config.train_decoder else []),
      Evaluation('target value', value, rows),
      Evaluation('critics', net.critic, rows, 2, True,
                 config.backprop_q_into_encoder),
      Evaluation('actor', net.actor, rows, 1, True),
      Evaluation('critics, own action', net.critic, rows, 2, False, True),
      Evaluation('value', value, rows, 1, True),
  ]


def _context_rows(stage: Stage) -> int:
  """Rows that the encoder sees in one update, masked ones included."""
  batch = stage.batch
  size = batch.context_size
  if batch.context == 'episodes':
    size = max(size, batch.sequence_size)
  return batch.num_tasks * size


_EVALUATIONS = {'smac': smac_evaluations, 'pearl': pearl_evaluations}


# Updates.


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

  def evaluations(self) -> list[Evaluation]:
    """The networks that one update evaluates."""
    return _EVALUATIONS[self.algorithm](
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
  recipe = dict(recipes.MATCHED)
  recipe.pop('description')
  matched = configs.from_dict(recipe, base).smac
  behaviour = base.collect.behaviour
  cases = [
      Case('smac', 'offline', 'released', spec, base.smac, *data),
      Case('smac', 'online', 'released', spec, base.smac, *data),
      Case('smac', 'online', 'matched', spec, matched, *data),
      Case('pearl', 'online', 'behaviour', spec, behaviour, *data),
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


# The ceiling.


def make_ceiling(profile: str, repeat_s: float) -> dict[str, Timed]:
  """Ways to do float32 matrix products; units are GFLOP.

  They run at jax's default matmul precision, as the updates do.
  """
  rows, width, large, length = (
      (256, 64, 128, 8) if profile == 'smoke' else (4096, 300, 1536, 20))
  scale = width ** -0.5
  x = jax.random.normal(jax.random.key(0), (rows, width))
  w = scale * jax.random.normal(jax.random.key(1), (width, width))
  square = jax.random.normal(jax.random.key(2), (large, large)) * large ** -0.5

  def scan(step, carry):
    return jax.jit(lambda c: jax.lax.scan(
        lambda c, _: (step(c), None), c, length=length)[0]), carry

  chain_flop = 2.0 * rows * width * width * length / 1e9
  quarter = tuple(jnp.split(x, 4))
  # (function, argument, GFLOP per call)
  ways = {
      'chain': (*scan(lambda c: c @ w, x), chain_flop),
      'four_chains': (
          *scan(lambda c: tuple(part @ w for part in c), quarter), chain_flop),
      'square': (*scan(lambda c: c @ square, square),
                 2.0 * large ** 3 * length / 1e9),
  }

  def timed(fn, argument, gflop):
    call = lambda: jax.block_until_ready(fn(argument))
    call()
    return Timed(call, gflop, repeat_s)

  return {name: timed(*way) for name, way in ways.items()}


def _ceiling_record(ways: Mapping[str, Timed], profile: str) -> dict[str, Any]:
  best = max(ways, key=lambda name: ways[name].rate)
  return {
      'best': best,
      'gflops': {name: _round(way.rate) for name, way in ways.items()},
      'spread': {
          name: [_round(x) for x in way.spread] for name, way in ways.items()},
      'dtype': 'float32',
      'matmul_precision': str(
          jax.config.jax_default_matmul_precision or 'default'),
      'definition': 'best way by median over the run; all cores',
      'sizes': profile if profile == 'smoke' else
               'chain [4096,300]x[300,300], square 1536',
  }


def measure_updates(
    options: Options, algorithms: Sequence[str]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
  """The ceiling and every case, in turn, `repeats` times.

  Returns:
    Record of the ceiling, one record per case and number of seeds.
  """
  log = CompileLog()
  ways = make_ceiling(options.profile, min(options.repeat_s, 0.4))
  cases = [
      case for case in make_cases(options.profile)
      if case.algorithm in algorithms]
  runs = []
  for case, seeds in itertools.product(cases, options.seeds):
    chunk = _chunk(options, case.gflop(), seeds)
    _say(f'compiling {case.algorithm} {case.stage} {case.variant} x{seeds}')
    runner = UpdateRunner(case, seeds, chunk)
    compile_s = compile_seconds(runner)
    timed = Timed(runner, chunk * seeds, options.repeat_s)
    runs.append((case, seeds, chunk, compile_s, timed))
  recompiled = {}
  for i in range(options.repeats):
    _say(f'timing updates, round {i + 1} of {options.repeats}')
    for j, run in enumerate(runs):
      for way in ways.values():
        way.measure()
      recompiled[j] = recompiled.get(j, 0) + log.during(run[-1].measure)
  ceiling = _ceiling_record(ways, options.profile)
  top = ceiling['gflops'][ceiling['best']]
  records = [
      _update_record(*run, options.profile, top, recompiled[j])
      for j, run in enumerate(runs)]
  return ceiling, records


def _update_record(
    case: Case, seeds: int, chunk: int, compile_s: float, timed: Timed,
    profile: str, ceiling: float, recompiled: int,
) -> dict[str, Any]:
  gflop = case.gflop()
  batch = case.get_stage().batch
  return {
      'algorithm': case.algorithm,
      'stage': case.stage,
      'variant': case.variant,
      'profile': profile,
      'seeds': seeds,
      # Of all seeds together, as is the fraction.
      'updates_per_s': _round(timed.rate),
      'updates_per_s_spread': [_round(x) for x in timed.spread],
      'gflop_per_update': _round(gflop),
      'gflops': _round(timed.rate * gflop),
      'fraction_of_ceiling': _round(timed.rate * gflop / ceiling),
      'compile_s': _round(compile_s),
      'recompilations_while_timing': recompiled,
      'ms_per_update_of_all_seeds': _round(1e3 * seeds / timed.rate),
      'updates_per_call': chunk,
      'data': 'synthetic',
      'sizes': {
          'observation': case.spec.observation_size,
          'action': case.spec.action_size,
          'num_tasks': batch.num_tasks,
          'query_size': batch.query_size,
          'context_size': _context_rows(case.get_stage()) // batch.num_tasks,
          'replay': [case.num_tasks, case.num_rows],
      },
      'gflop_by_network': {
          e.network: _round(e.flop() / 1e9) for e in case.evaluations()},
  }


# Environment steps.


def _env_cases(options: Options) -> list[tuple[str, str, dict[str, Any]]]:
  """(family, backend, options), the cheap ones first."""
  if options.profile == 'smoke':
    return [('point_robot', 'jax', {})]
  cases = []
  for name in options.env_families:
    if name in ('point_robot', 'sparse_point_robot'):
      cases.append((0, name, 'jax', {}))
    else:
      cases += [
          (1 + i, name, backend, {'backend': backend})
          for i, backend in enumerate(options.env_backends)]
  return [case[1:] for case in sorted(cases, key=lambda case: case[0])]


def measure_env(
    options: Options, family_name: str, backend: str,
    family_options: Mapping[str, Any],
) -> dict[str, Any]:
  """Random-policy episodes (`rollout.episode`) side by side, resets included.

  Raises:
    BenchmarkError: the family or backend cannot be made.
  """
  try:
    family = envs.make(family_name, **family_options)
  except (ValueError, ImportError) as error:
    raise BenchmarkError(f'{family_name}: {error}') from error
  number, length = options.num_envs, family.spec.episode_length
  tasks = family.sample_tasks(jax.random.key(0), number)
  policy = rollout.uniform_policy(family.spec.action_size)
  counter = itertools.count()

  def keys():
    return jax.random.split(jax.random.key(next(counter)), number)

  @jax.jit
  def episodes(tasks, keys):
    def one(task, key):
      _, data, valid = rollout.episode(family, policy, (), (), task, key)
      return jnp.sum(data.reward), jnp.sum(valid)
    return jax.vmap(one)(tasks, keys)

  resets_per_call = 8

  @jax.jit
  def resets(tasks, keys):
    def body(total, i):
      start = jax.vmap(lambda task, key: family.reset(
          jax.random.fold_in(key, i), task))(tasks, keys)
      # Every leaf is used, so that none is compiled away.
      return total + sum(
          jnp.sum(x.astype(jnp.float32)) for x in jax.tree.leaves(start)), None
    return jax.lax.scan(
        body, jnp.zeros(()), jnp.arange(resets_per_call))[0]

  def make(fn, units):
    call = lambda: jax.block_until_ready(fn(tasks, keys()))
    compile_s = compile_seconds(call)
    return Timed(call, units, options.repeat_s / 2), compile_s

  timed, compile_s = make(episodes, number * length)
  reset, reset_compile_s = make(resets, number * resets_per_call)
  for _ in range(min(options.repeats, 3)):
    timed.measure()
    reset.measure()
  valid = float(jnp.mean(episodes(tasks, keys())[1]))
  return {
      'family': family_name,
      'backend': backend,
      'num_envs': number,
      'steps_per_s': _round(timed.rate),
      'steps_per_s_spread': [_round(x) for x in timed.spread],
      'compile_s': _round(compile_s),
      'reset_compile_s': _round(reset_compile_s),
      'reset_cost_in_steps': _round(timed.rate / reset.rate),
      'episode_length': length,
      # Simulated steps count, also those after a termination.
      'mean_steps_before_termination': _round(valid),
      'policy': 'uniform random',
      'options': json.loads(json.dumps(dict(family.spec.options),
                                       default=str)),
  }


# Where a run's time went.


def _timing_file(workdir: str) -> pathlib.Path:
  path = pathlib.Path(workdir) / 'timing.json'
  if not path.is_file():
    raise BenchmarkError(
        f'--workdir: {path} not found; give the --workdir of a run of'
        ' experiments.run')
  return path


def read_workdir(workdir: str) -> dict[str, Any]:
  """Wall seconds and shares of the stages of a run.

  Raises:
    BenchmarkError: no timing.json there, or not one of ours.
  """
  path = _timing_file(workdir)
  try:
    timing = {k: float(v) for k, v in json.loads(path.read_text()).items()}
  except (ValueError, TypeError, AttributeError) as error:
    raise BenchmarkError(
        f'{path}: not a file of stage names and seconds: {error}') from error
  total = sum(timing.values())
  return {
      'total_s': _round(total),
      'stages': [
          {'stage': name, 'seconds': _round(seconds),
           'share': _round(seconds / total if total else 0.0)}
          for name, seconds in sorted(timing.items(), key=lambda kv: -kv[1])],
  }


# Facts, output.


def _round(value: float) -> float:
  """Four significant digits."""
  return float(f'{value:.4g}')


def _cpu_model() -> str:
  try:
    with open('/proc/cpuinfo', encoding='utf-8') as file:
      for line in file:
        if line.startswith('model name'):
          return line.partition(':')[2].strip()
  except OSError:
    pass
  return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
  """What was measured on; no host name."""
  affinity = getattr(os, 'sched_getaffinity', None)
  device = jax.devices()[0]
  return {
      'cpu': _cpu_model(),
      'cores': len(affinity(0)) if affinity else os.cpu_count(),
      'platform': f'{platform.system()} {platform.machine()}',
      'backend': jax.default_backend(),
      'device_kind': device.device_kind,
      'devices': jax.local_device_count(),
      'load_average': [round(x, 2) for x in os.getloadavg()],
  }


def versions() -> dict[str, str | None]:
  """Of Python and the packages that matter; None where not installed."""

  def version(name):
    try:
      return metadata.version(name)
    except metadata.PackageNotFoundError:
      return None

  return {
      'python': platform.python_version(),
      **{name: version(name) for name in _PACKAGES},
  }


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
  """Aligned text; numbers to the right."""
  cells = [list(columns)] + [[_cell(row[c]) for c in columns] for row in rows]
  widths = [max(map(len, column)) for column in zip(*cells)]
  number = [rows and not isinstance(rows[0][c], str) for c in columns]
  return '\n'.join(
      '  '.join(
          text.rjust(width) if right else text.ljust(width)
          for text, width, right in zip(line, widths, number)).rstrip()
      for line in cells)


def _cell(value: Any) -> str:
  if not isinstance(value, float):
    return str(value)
  return f'{value:,.0f}' if abs(value) >= 1000 else f'{value:.4g}'


def _say(text: str):
  print(text, file=sys.stderr, flush=True)


def _print(result: Mapping[str, Any]):
  ceiling = result['ceiling']
  if result['ceiling_gflops'] is not None:
    print(
        f'\nMatrix-product ceiling: {result["ceiling_gflops"]:.4g} GFLOP/s'
        f' (float32, precision {ceiling["matmul_precision"]}; best of '
        + ', '.join(f'{k} {v:.4g}' for k, v in ceiling['gflops'].items())
        + ')')
  if result['updates']:
    print('\nUpdates (rates of all seeds together; synthetic data)')
    print(table(result['updates'], (
        'algorithm', 'stage', 'variant', 'seeds', 'updates_per_s',
        'gflop_per_update', 'gflops', 'fraction_of_ceiling', 'compile_s')))
  if result['env_steps']:
    print('\nEnvironment steps (random policy, resets included)')
    print(table(result['env_steps'], (
        'family', 'backend', 'num_envs', 'steps_per_s',
        'reset_cost_in_steps', 'compile_s')))
  if 'workdir' in result:
    print(f'\nWall time of the run: {result["workdir"]["total_s"]:.4g} s')
    print(table(result['workdir']['stages'], ('stage', 'seconds', 'share')))


def run(options: Options) -> dict[str, Any]:
  """Measures and prints; returns what goes to the JSON file.

  Raises:
    BenchmarkError: an option cannot be served; nothing was measured.
  """
  validate(options)
  # A cached program would pass for a fast compilation.
  jax.config.update('jax_enable_compilation_cache', False)
  only = options.only or tuple(
      part for part in PARTS if part != 'workdir' or options.workdir)
  result = {
      'machine': machine(),
      'versions': versions(),
      'ceiling_gflops': None,
      'updates': [],
      'env_steps': [],
      'ceiling': {},
      'options': dataclasses.asdict(options),
  }
  algorithms = [name for name in ALGORITHMS if name in only]
  if algorithms:
    ceiling, updates = measure_updates(options, algorithms)
    result.update(
        ceiling=ceiling, updates=updates,
        ceiling_gflops=ceiling['gflops'][ceiling['best']])
  if 'env' in only:
    for case in _env_cases(options):
      _say(f'environment {case[0]} {case[1]}')
      result['env_steps'].append(measure_env(options, *case))
  if 'workdir' in only:
    result['workdir'] = read_workdir(options.workdir)
  usage = resource.getrusage(resource.RUSAGE_SELF)
  result['peak_memory_mb'] = _round(usage.ru_maxrss / 1024)
  result['load_average_at_end'] = [round(x, 2) for x in os.getloadavg()]
  _print(result)
  return result


def _define_flags() -> dict[str, flags.FlagHolder]:
  """Under __main__ only: experiments.run defines some of the same names."""
  default = Options()
  return {
      'only': flags.DEFINE_list(
          'only', [], f'What to measure, of: {", ".join(PARTS)}. Default: all'
          ' (workdir if --workdir is given).'),
      'profile': flags.DEFINE_string(
          'profile', default.profile,
          f'Sizes of the updates: {", ".join(PROFILES)}.'),
      'seeds': flags.DEFINE_list(
          'seeds', [str(s) for s in default.seeds],
          'Numbers of seeds to run side by side, e.g. 1,4.'),
      'repeats': flags.DEFINE_integer(
          'repeats', default.repeats, 'Timings per figure (median).'),
      'repeat_s': flags.DEFINE_float(
          'repeat_s', None, 'Seconds per timing; default 2, 0.05 in smoke.'),
      'chunk': flags.DEFINE_integer(
          'chunk', 0, 'Updates per compiled call; 0 chooses.'),
      'env_families': flags.DEFINE_list(
          'env_families', list(default.env_families), 'Families to step.'),
      'env_backends': flags.DEFINE_list(
          'env_backends', list(default.env_backends), 'Simulators to step.'),
      'num_envs': flags.DEFINE_integer(
          'num_envs', default.num_envs, 'Environments side by side.'),
      'workdir': flags.DEFINE_string(
          'workdir', '', 'A run whose wall time is to be listed.'),
  }


def _options(holders: Mapping[str, flags.FlagHolder]) -> Options:
  values = {name: holder.value for name, holder in holders.items()}
  try:
    values['seeds'] = tuple(int(s) for s in values['seeds'])
  except ValueError as error:
    raise BenchmarkError(f'--seeds: {error}') from error
  if values['repeat_s'] is None:
    values['repeat_s'] = 0.05 if values['profile'] == 'smoke' else 2.0
  for name in ('only', 'env_families', 'env_backends'):
    values[name] = tuple(values[name])
  return Options(**values)


def _main():
  holders = _define_flags()
  out = flags.DEFINE_string('out', '', 'JSON file to write.')

  def main(argv):
    logging.set_verbosity(logging.WARNING)
    try:
      if len(argv) > 1:
        raise BenchmarkError(f'unexpected arguments: {" ".join(argv[1:])}')
      if out.value and not pathlib.Path(out.value).absolute().parent.is_dir():
        raise BenchmarkError(f'--out: no folder for {out.value}')
      result = run(_options(holders))
    except BenchmarkError as error:
      print(f'error: {error}', file=sys.stderr)
      return 1
    if out.value:
      write_json(pathlib.Path(out.value), result)
      print(f'\nwritten: {out.value}')
    return 0

  app.run(main)


if __name__ == '__main__':
  _main()
