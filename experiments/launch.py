"""Resolves configurations, runs phases, and says what went wrong.

For `experiments.run` and `experiments.compare`, which are flags around it.
ml_collections stays in this file and in the config files; everything below
sees the frozen dataclass `ExperimentConfig`.
"""

from collections.abc import Callable, Mapping
from importlib import machinery
import json
import os
import pathlib
import platform
import shlex
import sys
import time
import types
from typing import Any

from absl import flags, logging
from ml_collections import config_flags

ROOT = pathlib.Path(__file__).resolve().parent.parent
_DEFAULT = str(ROOT / 'experiments/configs/smac.py:point_robot')
_PACKAGES = (
    'jax', 'jaxlib', 'flax', 'optax', 'chex', 'brax', 'mujoco', 'mujoco-mjx',
    'orbax-checkpoint', 'numpy', 'scipy')


def define_config_flag() -> Any:
  """The --config flag: FILE or FILE:FAMILY, and --config.KEY=VALUE.

  An unknown key shows while the flag is defined; it gives one message and
  exit status 1.
  """
  prepare_environment()  # config files import jax
  try:
    return config_flags.DEFINE_config_file(
        'config', default=_DEFAULT,
        help_string='Config file and family, e.g.'
        ' experiments/configs/smac.py:cheetah_vel.')
  except (AttributeError, KeyError) as error:  # from ml_collections
    _unknown_key(error)


def parse_flags(argv: list[str]) -> list[str]:
  """Parses flags; a bad one gives one message and exit status 1."""
  try:
    return flags.FLAGS(argv)
  except (AttributeError, KeyError) as error:  # from ml_collections
    _unknown_key(error)
  except (flags.Error, TypeError, ValueError, OSError) as error:
    print(f'error: {_text(error)}', file=sys.stderr)
    sys.exit(1)


def _unknown_key(error: Exception):
  given = ' '.join(a for a in sys.argv if a.startswith('--config.'))
  known = 'the fields of offmeta/training/config.py'
  if '--config.family.options.' in given:
    family = load_config(_config_argument()).family
    known += (f' and the options of family {family.name!r}:'
              f' {", ".join(sorted(family.options)) or "none"}')
  while error.args and isinstance(error.args[0], Exception):
    error = error.args[0]
  key, *hint = str(error.args[0]).splitlines()
  print(f'error: unknown key {key} in {given}; the keys are {known}',
        *hint, sep='; ', file=sys.stderr)
  sys.exit(1)


def _config_argument() -> str:
  """--config of the command line, read without the keys in it."""
  values = flags.FlagValues()
  flags.DEFINE_string('config', _DEFAULT, '', flag_values=values)
  values(sys.argv, known_only=True)
  return values.config


# What a config file can do wrong.
_BAD_FILE = (OSError, ImportError, SyntaxError, ValueError, TypeError,
             AttributeError)


def load_file(file: str) -> types.ModuleType:
  """A config file as a module.

  Raises:
    ConfigError: the file is missing, or no Python.
  """
  module = types.ModuleType('config_file')
  try:
    machinery.SourceFileLoader(module.__name__, file).exec_module(module)
  except _BAD_FILE as error:
    raise _bad_file(file, error) from error
  return module


def load_config(name: str) -> Any:
  """What FILE or FILE:ARGUMENT says, and the family that it may register.

  Raises:
    ConfigError: the file is missing, or no config file.
  """
  file, *argument = name.split(':', 1)
  module = load_file(file)
  try:
    return module.get_config(*argument)
  except _BAD_FILE as error:
    raise _bad_file(file, error) from error


def _bad_file(file: str, error: Exception) -> Exception:
  from offmeta.training.config import ConfigError

  reason = getattr(error, 'strerror', None) or error
  return ConfigError(f'config file {file}: {reason}')


def _text(error: Exception) -> str:
  """The last line of a message, without quotes around it."""
  lines = [line for line in str(error).strip().splitlines() if line.strip()]
  return lines[-1].strip().strip('"\'') if lines else type(error).__name__


def _load(config_flag: Any) -> tuple[Any, dict]:
  """The config file's value and the overrides (files are loaded lazily).

  Raises:
    ConfigError: the file or the family in it does not exist.
  """
  from offmeta.training.config import ConfigError

  try:
    values = config_flag.value
    values.to_dict()  # a file that could not be loaded fails here
    return values, dict(
        config_flags.get_override_values(flags.FLAGS[config_flag.name]))
  except (OSError, ValueError, TypeError, AttributeError) as error:
    raise ConfigError(f'--config: {_text(error)}') from error


def prepare_environment(devices: int | None = None):
  """Settings that must be there before jax starts.

  On a CPU every core becomes a device of its own, over which seeds are
  spread; small matrix products use one core each.

  Args:
    devices: how many a CPU is made of, at most 16; None: one per core.
  """
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
  flag = '--xla_force_host_platform_device_count'
  if flag not in os.environ.get('XLA_FLAGS', ''):
    devices = min(devices or os.cpu_count() or 1, 16)
    os.environ['XLA_FLAGS'] = (
        f'{os.environ.get("XLA_FLAGS", "")} {flag}={devices}'.strip())


def _nest(changes: Mapping[str, Any]) -> dict:
  """Dotted keys, or groups of keys, as nested groups."""
  nested: dict = {}
  for key, value in changes.items():
    for part in reversed(key.split('.')):
      value = {part: value}
    nested = _deep_merge(nested, value)
  return nested


def _deep_merge(base: Mapping, changes: Mapping) -> dict:
  merged = dict(base)
  for key, value in changes.items():
    old = merged.get(key)
    merged[key] = (
        _deep_merge(old, value)
        if isinstance(old, Mapping) and isinstance(value, Mapping) else value)
  return merged


def resolve(values: Any, profile: str, overrides: Mapping[str, Any]) -> Any:
  """The frozen configuration.

  Options of the family add up; those that are None are left out.

  Args:
    values: ConfigDict of a config file, with 'profiles'.
    profile: name of a size profile.
    overrides: what wins over the profile; dotted keys as on the command line,
      or groups of keys.

  Returns:
    A validated ExperimentConfig.

  Raises:
    ConfigError: an unknown key, profile or value.
  """
  from offmeta.training import config as configs

  values = values.to_dict()
  profiles = values.pop('profiles', {})
  if profile not in profiles:
    raise configs.ConfigError(
        f'this config has no profile {profile!r}; it has:'
        f' {", ".join(profiles) or "none"}')
  base = configs.from_dict(values)
  config = configs.from_dict(profiles[profile], base)
  merged = _deep_merge(configs.to_dict(config), _nest(overrides))
  options = {**base.family.options, **merged['family']['options']}
  merged['family']['options'] = {
      name: value for name, value in options.items() if value is not None}
  config = configs.from_dict(merged, config)
  configs.validate(config)
  return config


def default_workdir(config_flag: Any, family: str, profile: str) -> str:
  """runs/<config file>-<family>-<profile>."""
  stem = pathlib.Path(_config_file(config_flag).split(':')[0]).stem
  return f'runs/{stem}-{family}-{profile}'


def _config_file(config_flag: Any) -> str:
  """FILE or FILE:ARGUMENT, from the root of the repository if it is there."""
  return from_root(
      config_flags.get_config_filename(flags.FLAGS[config_flag.name]))


def from_root(name: str) -> str:
  """A file's name, from the root of the repository if it is there."""
  path = pathlib.Path(name).absolute()
  return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def _differences(old: Any, new: Any, prefix: str = '') -> list[str]:
  """Lines 'key: old -> new' for every leaf that differs."""
  if isinstance(old, Mapping) and isinstance(new, Mapping):
    lines = []
    for key in sorted(set(old) | set(new)):
      lines += _differences(
          old.get(key, '(absent)'), new.get(key, '(absent)'),
          f'{prefix}.{key}' if prefix else key)
    return lines
  return [] if old == new else [f'{prefix}: {old} -> {new}']


def describe_run(
    config: Any,
    workdir: pathlib.Path,
    profile: str,
    command: str,
    config_file: str = '',
    execution: Mapping[str, Any] = {},
) -> dict:
  """Writes or checks WORKDIR/run.json.

  Args:
    config: of the run.
    workdir: of the run.
    profile: its size, for readers.
    command: that started it, for readers.
    config_file: FILE or FILE:ARGUMENT that registers the family; '' if none.
    execution: devices, processes and where the replay is, for readers; the
      latest slice of a run.

  Raises:
    ConfigError: the workdir holds a run of another configuration.
  """
  import importlib.metadata

  import jax
  from offmeta.training import config as configs
  from offmeta.training.setup import write_json

  path = workdir / 'run.json'
  record = {
      'config': json.loads(json.dumps(configs.to_dict(config), default=list)),
      'config_hash': configs.config_hash(config),
      'config_file': config_file,
      'command': command,
      'profile': profile,
      'family': config.family.name,
      'algorithm': config.algorithm,
      'num_seeds': config.num_seeds,
      'headline_variant': (
          config.online.headline if config.online.variants else ''),
      'oracle_variant': config.online.oracle if config.online.variants else '',
      'variants': {
          name: changes.get('description', '')
          for name, changes in config.online.variants.items()
      },
      'versions': {'python': platform.python_version()} | {
          name: importlib.metadata.version(name) for name in _PACKAGES},
      'execution': dict(execution),
      'machine': {
          'platform': platform.platform(),
          'processor': _processor(),
          'cores': os.cpu_count(),
          'devices': [str(d.device_kind) for d in jax.local_devices()],
      },
  }
  if path.exists():
    try:
      old = json.loads(path.read_text())
      known = old['config_hash']
    except (ValueError, KeyError) as error:
      raise configs.ConfigError(
          f'{path}: not readable as a run description ({error}); use another'
          ' --workdir') from error
    if known != record['config_hash']:
      lines = _differences(old.get('config', {}), record['config'])
      raise configs.ConfigError(
          f'{workdir} holds a run of another configuration'
          f' ({known}, this is {record["config_hash"]}); use another'
          ' --workdir, or the old settings:\n  ' + '\n  '.join(lines[:20]))
  write_json(path, record)
  return record


def _processor() -> str:
  try:
    for line in pathlib.Path('/proc/cpuinfo').read_text().splitlines():
      if line.startswith('model name'):
        return line.split(':', 1)[1].strip()
  except OSError:
    pass
  return platform.processor()


def configure_jax():
  """Settings of jax for whole runs.

  Compiled programs are kept on disk, so that a second start is fast. Matrix
  products are float32 throughout, which accelerators otherwise round to fewer
  bits; `config.matmul_precision` lowers it in updates only.
  """
  import jax

  jax.config.update('jax_default_matmul_precision', 'float32')

  cache = os.environ.get('JAX_COMPILATION_CACHE_DIR') or os.path.join(
      os.environ.get('XDG_CACHE_HOME', os.path.expanduser('~/.cache')),
      'offmeta', 'xla')
  jax.config.update('jax_compilation_cache_dir', cache)
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)


def _report(setup: Any) -> None:
  from offmeta.results import report
  from offmeta.training.stage import PhaseError

  begin = time.monotonic()
  try:
    summary = report.build(setup.workdir)
  except (ImportError, ValueError) as error:
    raise PhaseError(f'report: {error}') from error
  print()
  print(report.text_table(summary))
  print(f'\nreport: {setup.workdir / "report" / "index.html"}'
        f' (made in {time.monotonic() - begin:.1f} s)')


def prepare() -> Any:
  """A quiet log, jax's settings, and what listens to SIGTERM."""
  from offmeta.training import loop

  if not any(a.startswith('--verbosity') for a in sys.argv):
    logging.set_verbosity(logging.WARNING)
  configure_jax()
  stop = loop.StopRequest()
  stop.install()
  return stop


def execute(
    config: Any,
    folder: pathlib.Path,
    phases: tuple[str, ...],
    stop: Any,
    runtime: Mapping[str, Any],
    profile: str,
    command: str,
    config_file: str,
):
  """Runs phases of one configuration in one workdir.

  Args:
    config: an ExperimentConfig.
    folder: the workdir.
    phases: which.
    stop: a `loop.StopRequest`.
    runtime: fields of `offmeta.training.setup.Runtime`.
    profile, command, config_file: see `describe_run`.

  Raises:
    Interrupted: a stop was requested; the same call continues.
    Those that `attempt` puts into words.
  """
  from offmeta import processes
  from offmeta.training import budget
  from offmeta.training import phases as phases_lib
  from offmeta.training import setup as setups

  setup = setups.make_setup(config, folder, stop, setups.Runtime(**runtime))

  def announce():
    folder.mkdir(parents=True, exist_ok=True)
    describe_run(config, folder, profile, command, config_file, {
        'layout': setup.seeds.layout.describe(),
        'processes': processes.count(),
        **runtime,
    })
    print(f'{config.family.name}, profile {profile}, {config.num_seeds} seeds,'
          f' workdir {folder}\n{setup.seeds.layout.describe()}', *needs,
          sep='\n', flush=True)

  needs = budget.check(setup, phases)
  processes.on_main(announce)
  phases_lib.run(setup, phases)
  if 'report' in phases:
    processes.on_main(lambda: _report(setup))


def _execute_flags(
    config_flag, profile, workdir, phases, overrides, runtime, command
):
  """The same for the flags of `experiments.run`."""
  from offmeta.training import config as configs
  from offmeta.training import phases as phases_lib

  unknown = [name for name in phases if name not in phases_lib.PHASES]
  if unknown or not phases:
    raise configs.ConfigError(
        f'--phases: unknown {", ".join(unknown) or "(empty)"}; known:'
        f' {",".join(phases_lib.PHASES)}')
  values, given = _load(config_flag)
  config = resolve(values, profile, {**given, **overrides})
  folder = pathlib.Path(
      workdir or default_workdir(config_flag, config.family.name, profile))
  execute(
      config, folder.expanduser().absolute(), phases, prepare(), runtime,
      profile, command, _config_file(config_flag))


def attempt(work: Callable[[], Any]) -> tuple[int, str]:
  """Does something, and puts what went wrong into words.

  Returns:
    The exit status and a message. 0, '': done. 1: bad input or a failed run.
    143: a SIGTERM was honoured; the same command continues.
  """
  from offmeta import processes
  from offmeta.data.dataset import DatasetError
  from offmeta.training.checkpointing import CheckpointError
  from offmeta.training.config import ConfigError
  from offmeta.training.loop import Interrupted
  from offmeta.training.metrics import DivergenceError
  from offmeta.training.stage import PhaseError

  try:
    work()
  except Interrupted:
    return 143, 'stopped on request; the same command continues from here'
  except (ConfigError, PhaseError, DatasetError, CheckpointError,
          DivergenceError, ImportError, processes.ProcessError) as error:
    return 1, str(error)
  except OSError as error:
    where = f'{error.filename}: ' if error.filename else ''
    return 1, (f'{where}{error.strerror or error}; what was finished before is'
               ' intact and the same command continues')
  return 0, ''


def run(
    config_flag: Any,
    profile: str,
    workdir: str,
    phases: tuple[str, ...],
    overrides: Mapping[str, Any],
    runtime: Mapping[str, Any],
    connect: Mapping[str, Any] | None,
    argv: list[str],
) -> int:
  """Runs the phases.

  Args:
    config_flag: holder of --config.
    profile: a size.
    workdir: '' for the default.
    phases: which.
    overrides: configuration keys that have flags of their own.
    runtime: fields of `offmeta.training.setup.Runtime`.
    connect: arguments of `processes.start`; None if this is the only process.
    argv: the command line, for the record.

  Returns:
    The exit status, see `attempt`; if it is not 0, one message on stderr.
  """
  from offmeta import processes

  command = 'python -m experiments.run ' + shlex.join(argv)

  def work():
    if connect is not None:
      processes.start(**connect)
    _execute_flags(config_flag, profile, workdir, phases, overrides, runtime,
                   command.strip())

  status, message = attempt(work)
  if status:
    print('\n' + 'error: ' * (status == 1) + message, file=sys.stderr)
  return status
