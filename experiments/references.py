"""Reference returns of every family: random actions, and SAC on one task.

  python -m experiments.references
  python -m experiments.references --families=cheetah_vel --env_steps=50000

Returns of meta-learners can only be read against these two.
Of each family's default list a few training tasks are taken, spread evenly
over the list (the first, the last and those between); each has a SAC learner of
its own, side by side with the others on one core or device per task.

The file is written after each family; the same command goes on where it was
stopped and leaves finished families alone. SIGTERM or Ctrl-C saves a checkpoint
and exits with status 143; a second one ends it at once.
"""

import dataclasses
import json
import os
import pathlib
import shlex
import sys
from typing import Any

# Quiet before jax and its friends are imported.
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')

from absl import app, flags, logging  # pylint: disable=g-import-not-at-top
import jax
import numpy as np

from experiments.benchmarking import machine as machines
from experiments.runs import jax_settings, launch
from offmeta import disk, envs, limits, parallel
from offmeta.algorithms import sac
from offmeta.collection import single_task
from offmeta.results import records, statistics
from offmeta.training import seeds as seeds_lib, stopping, workdir_lock
from offmeta.training.config import (
  ConfigError,
  SpecialistsConfig,
  config_hash,
  to_dict,
)
from offmeta.training.metrics import DivergenceError
from offmeta.training.setup import Setup
from offmeta.types import EnvSpec

PROFILES = ('smoke', 'cpu', 'paper')
# Too slow for the smaller profiles.
ACCELERATOR_ONLY = ('humanoid_dir',)
_SCORES = 2  # evaluations of `num_episodes` each behind a reported return


@dataclasses.dataclass(frozen=True)
class Options:
  """The flags of the command."""

  families: tuple[str, ...] = ()  # empty: all that are registered
  num_tasks: int = 3
  env_steps: int = 0  # per task; 0: the profile's
  profile: str = 'cpu'
  seed: int = 0
  workdir: str = ''  # empty: runs/references-PROFILE
  out: str = ''  # empty: experiments/results/references_PROFILE.json


def budget(spec: EnvSpec, options: Options) -> SpecialistsConfig:
  """The SAC learner and its budget for one family.

  'paper' has SAC's published numbers. 'cpu' has half their widths and batch and
  a larger learning rate, so that 2 cores train three tasks of a Brax family in
  a few minutes. Published and 'cpu' runs update once per step asked for; whole
  episodes may overshoot a round.
  """
  length = spec.episode_length
  config = SpecialistsConfig()
  if options.profile == 'smoke':
    config = SpecialistsConfig(
      env_steps=4 * length,
      initial_steps=2 * length,
      steps_per_iteration=length,
      num_evaluations=2,
      num_episodes=10,
      sac=_sac(width=8, batch_size=8, num_updates=2),
    )
  elif options.profile == 'cpu':
    short = length < 50
    # Whole episodes overshoot a quota where they can end early.
    per_iteration = 1000 if spec.terminates else 200
    config = SpecialistsConfig(
      env_steps=50_000,
      initial_steps=1000 if short else 5000,
      steps_per_iteration=per_iteration,
      sac=_sac(width=128, batch_size=128, num_updates=per_iteration),
    )
  if options.env_steps:
    config = dataclasses.replace(config, env_steps=options.env_steps)
  return config


def _sac(width: int, batch_size: int, num_updates: int) -> sac.Config:
  return sac.Config(
    critic_hidden=(width, width),
    actor_hidden=(width, width),
    critic_lr=1e-3,
    actor_lr=1e-3,
    temperature_lr=1e-3,
    batch_size=batch_size,
    num_updates=num_updates,
  )


@dataclasses.dataclass(frozen=True)
class Identity:
  """What the numbers of one family depend on; its hash names checkpoints."""

  family: str
  task_index: tuple[int, ...]
  seed: int
  specialists: SpecialistsConfig


def make_setup(
  name: str, options: Options, workdir: pathlib.Path, stop: stopping.StopRequest
) -> Setup:
  """One family with the tasks to train on, all of them if it has fewer."""
  family = envs.make(name)
  train, _ = family.task_list('default')
  known = envs.num_tasks(train)
  number = min(options.num_tasks, known)
  index = np.linspace(0, known - 1, number).round().astype(int)
  tasks = envs.take_tasks(train, index)
  root = seeds_lib.stream(jax.random.key(options.seed), 'references')
  return Setup(
    config=Identity(
      name, tuple(index.tolist()), options.seed, budget(family.spec, options)
    ),
    workdir=workdir / name,
    family=family,
    train_tasks=tasks,
    test_tasks=tasks,
    seeds=seeds_lib.Seeds(
      jax.vmap(lambda i: jax.random.fold_in(root, i))(index),
      parallel.make_layout(number),
    ),
    stop=stop,
  )


def _summary(returns: np.ndarray) -> dict[str, Any]:
  """Returns [M, R]: their mean, and each task's with its 95% t interval.

  The interval is over episodes; it knows nothing of other training runs.
  """
  return {
    'mean': float(returns.mean()),
    'episodes_per_task': returns.shape[1],
    'tasks': [
      {'mean': i.mean, 'low': i.low, 'high': i.high}
      for i in map(statistics.t_interval, returns)
    ],
  }


def measure(setup: Setup) -> dict[str, Any]:
  """Trains and scores; the JSON entry of one family.

  Raises:
    Interrupted: a stop was requested.
    DivergenceError: SAC's numbers are no longer finite.
  """
  config: SpecialistsConfig = setup.config.specialists
  evaluator = single_task.Evaluator(setup, config)
  progress = single_task.train(setup, config, evaluator)

  def score(uniform):
    parts = [  # number 0 is the training's
      evaluator.score(progress.state, number, uniform)
      for number in range(1, _SCORES + 1)
    ]
    returns, diverged = zip(*parts)
    return np.concatenate(returns, axis=1), float(np.sum(diverged))

  random, random_diverged = score(True)
  final, final_diverged = score(False)
  curve = single_task.curves(setup)
  evaluated = curve['eval/return']
  best = evaluated.argmax(axis=0)
  return {
    'task_list': 'default',
    'task_index': setup.config.task_index,
    'tasks': {k: np.asarray(v).tolist() for k, v in setup.train_tasks.items()},
    'random': _summary(random),
    'sac': {
      'final': _summary(final),
      'best_of_curve': {
        'mean': float(evaluated.max(axis=0).mean()),
        'tasks': evaluated.max(axis=0).tolist(),
        'env_steps': [
          int(curve['eval/env_steps'][k, m]) for m, k in enumerate(best)
        ],
        'note': 'the highest of all evaluations of the curve, so too'
        ' high on average',
      },
      'curve': {
        'env_steps': curve['eval/env_steps'].astype(int).tolist(),
        'returns': np.round(evaluated, 3).tolist(),
        'episodes_per_task': config.num_episodes,
      },
    },
    'env_steps': progress.replay.query.size[:, 0].tolist(),
    'updates': progress.state.step.tolist(),
    'diverged': {
      'training': float(curve['gather/diverged'].sum()),
      'evaluation': float(curve['eval/diverged'].sum()) + final_diverged,
      'random': random_diverged,
    },
  }


def _earlier(path: pathlib.Path, options: Options) -> dict[str, Any]:
  """What the file has; nothing if there is none.

  Raises:
    ConfigError: it is not such a file, or of another profile or seed.
  """
  new = {
    'profile': options.profile,
    'seed': options.seed,
    'families': {},
    'skipped': {},
    'failed': {},
  }
  if not path.exists():
    return new
  try:
    old = disk.read_json(path)
    same = all(old[name] == new[name] for name in ('profile', 'seed'))
    if same:
      _check_entries(old)
  except (
    ValueError,
    KeyError,
    TypeError,
    IndexError,
    AttributeError,
    OverflowError,
  ) as error:
    raise ConfigError(
      f'{path}: not a file of references ({error!r}); give another --out'
    ) from error
  if not same:
    raise ConfigError(
      f'{path}: is of profile {old["profile"]!r} and seed {old["seed"]};'
      ' give another --out'
    )
  return old


def _check_entries(results: dict[str, Any]):
  """Whether a file has all that is read from it later.

  Raises:
    ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError:
      it has not.
  """
  for group in ('families', 'skipped', 'failed'):
    if not isinstance(results[group], dict):
      raise TypeError(f'{group!r} is a {type(results[group]).__name__}')
  for entry in results['families'].values():
    entry['config_hash'], entry['options']  # pylint: disable=pointless-statement
  table(results)


def _known(setup: Setup, results: dict[str, Any], path: pathlib.Path) -> bool:
  """Whether the file has this family.

  Raises:
    ConfigError: it has it with other settings.
  """
  entry = results['families'].get(setup.config.family)
  if entry is None:
    return False
  options = json.loads(json.dumps(dict(setup.family.spec.options)))
  if entry['config_hash'] != config_hash(setup.config) or (
    entry['options'] != options
  ):
    raise ConfigError(
      f'{path}: has {setup.config.family!r} with other settings or package'
      ' versions; give another --out'
    )
  return True


def run(
  options: Options, command: str, stop: stopping.StopRequest
) -> dict[str, Any]:
  """Measures what the file does not have yet; returns what is in it.

  Args:
    options: what to measure.
    command: recorded in the file.
    stop: asks to stop.

  Raises:
    ConfigError: an option that cannot be met.
    WorkdirBusyError: another process measures in the workdir.
    Interrupted: a stop was requested; the same call continues.
  """
  _validate(options)
  path, workdir = _paths(options)
  launch.check_folder(workdir)
  with workdir_lock.hold(workdir):
    return _measure_all(options, path, workdir, command, stop)


def _measure_all(options, path, workdir, command, stop) -> dict[str, Any]:
  """`run` in a workdir that is held."""
  results = _earlier(path, options)
  for name in options.families or sorted(envs.FAMILIES):
    if name in ACCELERATOR_ONLY and options.profile != 'paper':
      results['skipped'][name] = {
        'reason': 'too slow without an accelerator',
        'command': 'python -m experiments.references --profile=paper'
        f' --families={name}',
      }
      disk.write_json(path, results)
      continue
    setup = make_setup(name, options, workdir, stop)
    if not _known(setup, results, path):
      _add(setup, results, command)
      disk.write_json(path, results)
  return results


def _add(setup: Setup, results: dict[str, Any], command: str):
  """Measures one family, or notes that it failed."""
  name = setup.config.family
  print(
    f'{name}: tasks {list(setup.config.task_index)} of its list,'
    f' {setup.config.specialists.env_steps} steps each',
    flush=True,
  )
  entry: dict[str, Any] = {
    'command': command,
    'config_hash': config_hash(setup.config),
    'options': dict(setup.family.spec.options),
    'settings': to_dict(setup.config.specialists),
    'machine': machines.machine(),
    'versions': machines.versions(),
  }
  try:
    setup.timed('all', lambda: entry.update(measure(setup)))
  except DivergenceError as error:
    print(f'{name}: {error}', file=sys.stderr)
    results['failed'][name] = str(error)
    return
  entry['wall_s'] = records.load_timing(setup.workdir / 'timing.json')['all']
  results['failed'].pop(name, None)
  results['families'][name] = entry


def _validate(options: Options):
  unknown = [name for name in options.families if name not in envs.FAMILIES]
  if unknown:
    raise ConfigError(
      f'--families: unknown {", ".join(unknown)}; known:'
      f' {", ".join(sorted(envs.FAMILIES))}'
    )
  for name, limit in (
    ('env_steps', limits.Range(0, limits.MOST)),
    ('num_tasks', limits.COUNT),
    ('seed', limits.SEED),
  ):
    try:
      limits.require(getattr(options, name), limit, f'--{name}')
    except ValueError as error:
      raise ConfigError(str(error)) from error


def _paths(options: Options) -> tuple[pathlib.Path, pathlib.Path]:
  """The result file and the workdir."""
  root = pathlib.Path(__file__).resolve().parent
  out = options.out or root / 'results' / f'references_{options.profile}.json'
  workdir = options.workdir or f'runs/references-{options.profile}'
  return (
    pathlib.Path(out).expanduser().absolute(),
    pathlib.Path(workdir).expanduser().absolute(),
  )


def table(results: dict[str, Any]) -> str:
  """One line per family and task: means over episodes."""
  lines = [
    f'{"family":20} {"task":>5} {"random":>9} {"SAC":>9}'
    f' {"+-":>6} {"best":>9} {"steps":>8}'
  ]
  for name, entry in results['families'].items():
    final = entry['sac']['final']['tasks']
    for m, index in enumerate(entry['task_index']):
      half = (final[m]['high'] - final[m]['low']) / 2
      lines.append(
        f'{name:20} {index:5d} {entry["random"]["tasks"][m]["mean"]:9.1f}'
        f' {final[m]["mean"]:9.1f} {half:6.1f}'
        f' {entry["sac"]["best_of_curve"]["tasks"][m]:9.1f}'
        f' {entry["env_steps"][m]:8d}'
      )
  return '\n'.join(lines)


def _main():
  # Here, because experiments.run defines some of the same names.
  families = flags.DEFINE_list(
    'families', [], 'Which families; default: all that are registered.'
  )
  num_tasks = flags.DEFINE_integer('num_tasks', 3, 'Training tasks per family.')
  env_steps = flags.DEFINE_integer(
    'env_steps', 0, "Environment steps per task; 0: the profile's."
  )
  profile = flags.DEFINE_enum(
    'profile',
    'cpu',
    PROFILES,
    'Size: smoke (seconds), cpu (minutes per family), paper (published).',
  )
  seed = flags.DEFINE_integer('seed', 0, 'Of all random numbers.')
  workdir = flags.DEFINE_string(
    'workdir', '', 'Checkpoints; default runs/references-PROFILE.'
  )
  out = flags.DEFINE_string(
    'out', '', 'JSON file; default experiments/results/references_PROFILE.json.'
  )

  def main(argv):
    logging.set_verbosity(logging.WARNING)
    jax_settings.prepare_environment(num_tasks.value)
    jax_settings.configure()
    stop = stopping.StopRequest()
    stop.install()
    options = Options(
      tuple(families.value),
      num_tasks.value,
      env_steps.value,
      profile.value,
      seed.value,
      workdir.value,
      out.value,
    )
    command = f'python -m experiments.references {shlex.join(sys.argv[1:])}'
    results: dict[str, Any] = {}

    def work():
      if len(argv) > 1:
        raise ConfigError(f'unexpected arguments: {" ".join(argv[1:])}')
      results.update(run(options, command.strip(), stop))

    status, message = launch.attempt(work)
    if status:
      print('\n' + 'error: ' * (status == 1) + message, file=sys.stderr)
      return status
    print(table(results))
    return 1 if results['failed'] else 0

  app.run(main)


if __name__ == '__main__':
  _main()
