"""What to measure, and for how long: the flags of the command."""

from collections.abc import Mapping, Sequence
import dataclasses

from absl import flags

from experiments.benchmarking import BenchmarkError
from experiments.benchmarking import workdir as workdirs
from experiments.benchmarking.flops import EVALUATIONS
from offmeta import envs
from offmeta.envs import simulator

PARTS = (*sorted(EVALUATIONS), 'env', 'workdir')
PROFILES = ('paper', 'cpu', 'smoke')


@dataclasses.dataclass(frozen=True)
class Options:
  """What to measure, and for how long.

  Attributes:
    only: parts (see PARTS); empty for all.
    profile: sizes of the updates, one of PROFILES.
    seeds: numbers of seeds run side by side.
    repeats: timings per figure; the median is reported.
    repeat_s: wall seconds per timing.
    chunk: updates per compiled call; 0 chooses.
    env_families, env_backends: what `env` steps through; the backend
      'default' is the family's own.
    num_envs: numbers of environments side by side.
    env_steps: steps from a reset in one timed call; 0 chooses.
    workdir: of a run, for the part `workdir`.
  """

  only: tuple[str, ...] = ()
  profile: str = 'paper'
  seeds: tuple[int, ...] = (1,)
  repeats: int = 5
  repeat_s: float = 2.0
  chunk: int = 0
  env_families: tuple[str, ...] = tuple(sorted(envs.FAMILIES))
  env_backends: tuple[str, ...] = simulator.BACKENDS
  num_envs: tuple[int, ...] = (1, 64, 1024)
  env_steps: int = 0
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
  _known('env_backends', options.env_backends,
         ('default', *simulator.BACKENDS))
  for name in ('seeds', 'num_envs'):
    values = getattr(options, name)
    if not values or min(values) < 1:
      raise BenchmarkError(f'--{name}: a list of numbers of at least 1')
  if options.repeats < 1:
    raise BenchmarkError('--repeats: must be at least 1')
  if not options.repeat_s > 0 or min(options.chunk, options.env_steps) < 0:
    raise BenchmarkError(
        '--repeat_s must be above 0, --chunk and --env_steps not below 0')
  if 'workdir' in options.only and not options.workdir:
    raise BenchmarkError('--only=workdir needs --workdir=DIR')
  if options.workdir:
    workdirs.timing_file(options.workdir)


def define_flags() -> dict[str, flags.FlagHolder]:
  """Under __main__ only: experiments.run defines some of the same names."""
  default = Options()
  numbers = lambda name, text: flags.DEFINE_list(
      name, [str(number) for number in getattr(default, name)], text)
  names = lambda name, text: flags.DEFINE_list(
      name, list(getattr(default, name)), text)
  return {
      'only': names(
          'only', f'What to measure, of: {", ".join(PARTS)}. Default: all'
          ' (workdir if --workdir is given).'),
      'profile': flags.DEFINE_string(
          'profile', default.profile,
          f'Sizes of the updates: {", ".join(PROFILES)}.'),
      'seeds': numbers('seeds', 'Numbers of seeds to run side by side.'),
      'repeats': flags.DEFINE_integer(
          'repeats', default.repeats, 'Timings per figure (median).'),
      'repeat_s': flags.DEFINE_float(
          'repeat_s', None, 'Seconds per timing; default 2, 0.05 in smoke.'),
      'chunk': flags.DEFINE_integer(
          'chunk', default.chunk, 'Updates per compiled call; 0 chooses.'),
      'env_families': names('env_families', 'Families to step.'),
      'env_backends': names(
          'env_backends', "Simulators to step; 'default' is each family's"
          ' own. What a family refuses is listed with its reason.'),
      'num_envs': numbers('num_envs', 'Numbers of environments side by side.'),
      'env_steps': flags.DEFINE_integer(
          'env_steps', default.env_steps,
          'Steps from a reset per timed call; 0 fits them to --repeat_s.'),
      'workdir': flags.DEFINE_string(
          'workdir', default.workdir,
          'A run whose wall time is to be listed.'),
  }


def from_flags(holders: Mapping[str, flags.FlagHolder]) -> Options:
  """Options of parsed flags.

  Raises:
    BenchmarkError: a list of numbers has something else in it.
  """
  values = {name: holder.value for name, holder in holders.items()}
  for name in ('seeds', 'num_envs'):
    try:
      values[name] = tuple(int(number) for number in values[name])
    except ValueError as error:
      raise BenchmarkError(f'--{name}: {error}') from error
  if values['repeat_s'] is None:
    values['repeat_s'] = (
        0.05 if values['profile'] == 'smoke' else Options.repeat_s)
  for name in ('only', 'env_families', 'env_backends'):
    values[name] = tuple(values[name])
  return Options(**values)
