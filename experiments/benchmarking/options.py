"""What to measure, and for how long: the flags of the command."""

from collections.abc import Mapping, Sequence
import dataclasses
import pathlib

from absl import flags
import jax

from experiments.benchmarking import BenchmarkError, workdir as workdirs
from offmeta import envs
from offmeta.algorithms import ALGORITHMS
from offmeta.envs import simulator
from offmeta.training.config import PRECISIONS

# PPO's update is a whole iteration on rollouts; cases draw from a replay.
_UPDATES = tuple(sorted(ALGORITHMS.keys() - {'ppo'}))
DEFAULT_PARTS = (*_UPDATES, 'env', 'workdir')
NAMED_PARTS = ('scaling', 'growth', 'startup')  # run only if named
PARTS = DEFAULT_PARTS + NAMED_PARTS
SHARED_SEEDS = 8  # of `scaling`
PROFILES = ('paper', 'cpu', 'smoke')
_NUMBERS = ('seeds', 'devices', 'num_envs')


@dataclasses.dataclass(frozen=True)
class Options:
  """What to measure, and for how long.

  Attributes:
    only: of PARTS; empty for DEFAULT_PARTS.
    profile: sizes of the updates, one of PROFILES.
    matmul_precision: of the networks in updates, `scaling` and `growth`, and
      of the ceiling; one of PRECISIONS.
    seeds: numbers of seeds run side by side.
    repeats: timings per figure; the median is reported.
    repeat_s: wall seconds per timing.
    chunk: updates per compiled call; 0 chooses.
    overhead: also time updates in calls of a quarter of the length.
    trace_dir: where to write a profiler trace of each kind of update; ''
      for none.
    algorithms: what `scaling` and `growth` measure.
    devices: numbers of devices for `scaling`; 1 is always measured.
    env_families, env_backends: what `env` steps through; the backend
      'default' is the family's own.
    num_envs: numbers of environments side by side.
    env_steps: steps from a reset in one timed call; 0 chooses.
    workdir: of a run, for the part `workdir`.
  """

  only: tuple[str, ...] = ()
  profile: str = 'paper'
  matmul_precision: str = 'float32'
  seeds: tuple[int, ...] = (1,)
  repeats: int = 5
  repeat_s: float = 2.0
  chunk: int = 0
  overhead: bool = False
  trace_dir: str = ''
  algorithms: tuple[str, ...] = ('pearl', 'sac', 'smac')
  devices: tuple[int, ...] = (1, 2, 4, 8)
  env_families: tuple[str, ...] = tuple(sorted(envs.FAMILIES))
  env_backends: tuple[str, ...] = simulator.BACKENDS
  num_envs: tuple[int, ...] = (1, 64, 1024)
  env_steps: int = 0
  workdir: str = ''

  @property
  def parts(self) -> tuple[str, ...]:
    """What is measured; `workdir` by default only if there is one."""
    return self.only or tuple(
      p for p in DEFAULT_PARTS if p != 'workdir' or self.workdir
    )

  @property
  def updates(self) -> list[str]:
    """The algorithms among the parts."""
    return [name for name in _UPDATES if name in self.parts]


def _known(what: str, names: Sequence[str], known: Sequence[str]):
  unknown = [name for name in names if name not in known]
  if unknown:
    raise BenchmarkError(
      f'--{what}: unknown {", ".join(map(repr, unknown))}; known:'
      f' {", ".join(known)}'
    )


def validate(options: Options):
  """Checks options before anything is measured.

  Raises:
    BenchmarkError: names the flag and what it accepts.
  """
  _known('only', options.only, PARTS)
  _known('profile', (options.profile,), PROFILES)
  _known('matmul_precision', (options.matmul_precision,), PRECISIONS)
  _known('algorithms', options.algorithms, _UPDATES)
  _known('env_families', options.env_families, sorted(envs.FAMILIES))
  _known('env_backends', options.env_backends, ('default', *simulator.BACKENDS))
  if not options.algorithms:
    raise BenchmarkError('--algorithms: at least one')
  for name in _NUMBERS:
    values = getattr(options, name)
    if not values or min(values) < 1:
      raise BenchmarkError(f'--{name}: a list of numbers of at least 1')
  if any(SHARED_SEEDS % number for number in options.devices):
    raise BenchmarkError(
      f'--devices: {SHARED_SEEDS} seeds are spread over them, so each'
      f' number must divide {SHARED_SEEDS}'
    )
  if (options.overhead or options.trace_dir) and not options.updates:
    raise BenchmarkError(
      '--overhead and --trace_dir are of updates: name'
      f' {", ".join(_UPDATES)} in --only'
    )
  if options.matmul_precision != 'float32' and not (
    options.updates or {'scaling', 'growth'} & set(options.parts)
  ):
    raise BenchmarkError(
      '--matmul_precision is of updates, scaling and growth: name one of'
      ' them in --only'
    )
  if options.overhead and 0 < options.chunk < 4:
    raise BenchmarkError('--overhead: needs a --chunk of at least 4')
  if options.repeats < 1:
    raise BenchmarkError('--repeats: must be at least 1')
  if not options.repeat_s > 0 or min(options.chunk, options.env_steps) < 0:
    raise BenchmarkError(
      '--repeat_s must be above 0, --chunk and --env_steps not below 0'
    )
  if 'workdir' in options.only and not options.workdir:
    raise BenchmarkError('--only=workdir needs --workdir=DIR')
  if options.workdir:
    workdirs.timing_file(options.workdir)


def validate_device(options: Options):
  """Checks what depends on the device, which this process takes thereby.

  Raises:
    BenchmarkError: a precision that the device does not have.
  """
  backend = jax.default_backend()
  if options.matmul_precision == 'tensorfloat32' and backend != 'gpu':
    raise BenchmarkError(
      '--matmul_precision=tensorfloat32 exists on GPUs only, and this is a'
      f' {backend}; choose float32 or bfloat16'
    )


def define_flags() -> dict[str, flags.FlagHolder]:
  """Under __main__ only: experiments.run defines some of the same names."""
  default = Options()
  numbers = lambda name, text: flags.DEFINE_list(
    name, [str(number) for number in getattr(default, name)], text
  )
  names = lambda name, text: flags.DEFINE_list(
    name, list(getattr(default, name)), text
  )
  return {
    'only': names(
      'only',
      f'What to measure, of: {", ".join(PARTS)}. Default: all but'
      f' {", ".join(NAMED_PARTS)} (workdir if --workdir is given).',
    ),
    'profile': flags.DEFINE_string(
      'profile',
      default.profile,
      f'Sizes of the updates: {", ".join(PROFILES)}.',
    ),
    'matmul_precision': flags.DEFINE_string(
      'matmul_precision',
      default.matmul_precision,
      'Of the networks in updates, scaling and growth, and of the'
      f' ceiling: {", ".join(PRECISIONS)} (tensorfloat32: GPUs only).',
    ),
    'seeds': numbers('seeds', 'Numbers of seeds to run side by side.'),
    'repeats': flags.DEFINE_integer(
      'repeats', default.repeats, 'Timings per figure (median).'
    ),
    'repeat_s': flags.DEFINE_float(
      'repeat_s', None, 'Seconds per timing; default 2, 0.05 in smoke.'
    ),
    'chunk': flags.DEFINE_integer(
      'chunk', default.chunk, 'Updates per compiled call; 0 chooses.'
    ),
    'overhead': flags.DEFINE_bool(
      'overhead',
      default.overhead,
      'Also time updates in calls of a'
      ' quarter of the length, to see what a call costs by itself.',
    ),
    'trace_dir': flags.DEFINE_string(
      'trace_dir',
      default.trace_dir,
      'Folder for a profiler trace of one'
      ' call of each kind of update; a small --chunk keeps it small.',
    ),
    'algorithms': names(
      'algorithms',
      'What scaling and growth measure, the first row of'
      f' each, of: {", ".join(_UPDATES)}.',
    ),
    'devices': numbers(
      'devices', 'Numbers of devices for scaling; 1 is always measured.'
    ),
    'env_families': names('env_families', 'Families to step.'),
    'env_backends': names(
      'env_backends',
      "Simulators to step; 'default' is each family's"
      ' own. What a family refuses is listed with its reason.',
    ),
    'num_envs': numbers('num_envs', 'Numbers of environments side by side.'),
    'env_steps': flags.DEFINE_integer(
      'env_steps',
      default.env_steps,
      'Steps from a reset per timed call; 0 fits them to --repeat_s.',
    ),
    'workdir': flags.DEFINE_string(
      'workdir', default.workdir, 'A run whose wall time is to be listed.'
    ),
  }


def from_flags(holders: Mapping[str, flags.FlagHolder]) -> Options:
  """Options of parsed flags.

  Raises:
    BenchmarkError: a list of numbers has something else in it.
  """
  values = {name: holder.value for name, holder in holders.items()}
  for name in _NUMBERS:
    try:
      values[name] = tuple(int(number) for number in values[name])
    except ValueError as error:
      raise BenchmarkError(f'--{name}: {error}') from error
  if values['repeat_s'] is None:
    values['repeat_s'] = (
      0.05 if values['profile'] == 'smoke' else Options.repeat_s
    )
  for name in ('only', 'algorithms', 'env_families', 'env_backends'):
    values[name] = tuple(values[name])
  return Options(**values)


# Files.


@dataclasses.dataclass(frozen=True)
class Files:
  """What is read and written.

  Attributes:
    out: result to write, or None.
    resume: go on with what `out` has.
    load: result to take instead of measuring, or None.
    compare: result to compare with, or None.
    plot: picture to write, or None.
  """

  out: pathlib.Path | None = None
  resume: bool = False
  load: pathlib.Path | None = None
  compare: pathlib.Path | None = None
  plot: pathlib.Path | None = None


def define_file_flags() -> dict[str, flags.FlagHolder]:
  """Under __main__ only."""
  path = lambda name, text: flags.DEFINE_string(name, '', text)
  return {
    'out': path('out', 'JSON file to write.'),
    'resume': flags.DEFINE_bool(
      'resume',
      False,
      'Keep what --out has, and skip the environments'
      ' that it has. Only on the same machine with the same versions; use'
      ' it only if the code has not changed.',
    ),
    'load': path('load', 'Measure nothing; print, compare and plot this.'),
    'compare': path(
      'compare', 'JSON file of an earlier result to compare with.'
    ),
    'plot': path('plot', 'PNG file to draw scaling and growth into.'),
  }


def files_from_flags(
  holders: Mapping[str, flags.FlagHolder], options: Options
) -> Files:
  """Files of parsed flags.

  Raises:
    BenchmarkError: flags that exclude each other, or no such folder.
  """
  files = Files(
    **{
      name: holder.value
      if name == 'resume'
      else pathlib.Path(holder.value)
      if holder.value
      else None
      for name, holder in holders.items()
    }
  )
  if files.load and (files.out or files.resume or options.only):
    raise BenchmarkError(
      '--load measures nothing: no --only, --out and --resume beside it'
    )
  if files.resume and not files.out:
    raise BenchmarkError('--resume needs --out')
  for name in ('out', 'plot'):
    path = getattr(files, name)
    if path and not path.absolute().parent.is_dir():
      raise BenchmarkError(f'--{name}: no folder for {path}')
  if files.plot and not (
    files.load or files.resume or {'scaling', 'growth'} & set(options.parts)
  ):
    raise BenchmarkError('--plot: needs scaling or growth in --only')
  return files
