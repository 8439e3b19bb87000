"""From the command line and config files to an ExperimentConfig.

ml_collections stays in this file and in the config files; everything below
sees the frozen dataclass.
"""

from collections.abc import Mapping
from importlib import machinery
import pathlib
import sys
import types
from typing import Any

from absl import flags
from ml_collections import config_flags

from experiments.configs import recipes
from experiments.runs import jax_settings

ROOT = pathlib.Path(__file__).resolve().parents[2]
_DEFAULT = str(ROOT / 'experiments/configs/smac.py:point_robot')


def define_config_flag() -> Any:
  """The --config flag: FILE or FILE:FAMILY, and --config.KEY=VALUE.

  An unknown key shows while the flag is defined; it gives one message and
  exit status 1.
  """
  jax_settings.prepare_environment()  # config files import jax
  try:
    return config_flags.DEFINE_config_file(
      'config',
      default=_DEFAULT,
      help_string='Config file and family, e.g.'
      ' experiments/configs/smac.py:cheetah_vel.',
    )
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
    known += (
      f' and the options of family {family.name!r}:'
      f' {", ".join(sorted(family.options)) or "none"}'
    )
  while error.args and isinstance(error.args[0], Exception):
    error = error.args[0]
  key, *hint = str(error.args[0]).splitlines()
  print(
    f'error: unknown key {key} in {given}; the keys are {known}',
    *hint,
    sep='; ',
    file=sys.stderr,
  )
  sys.exit(1)


def _config_argument() -> str:
  """--config of the command line, read without the keys in it."""
  values = flags.FlagValues()
  flags.DEFINE_string('config', _DEFAULT, '', flag_values=values)
  values(sys.argv, known_only=True)
  return values.config


# What a config file can do wrong.
_BAD_FILE = (
  OSError,
  ImportError,
  SyntaxError,
  ValueError,
  TypeError,
  AttributeError,
)


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


def from_flag(config_flag: Any) -> tuple[Any, dict]:
  """The config file's value and the overrides (files are loaded lazily).

  Raises:
    ConfigError: the file or the family in it does not exist.
  """
  from offmeta.training.config import ConfigError

  try:
    values = config_flag.value
    values.to_dict()  # a file that could not be loaded fails here
    return values, dict(
      config_flags.get_override_values(flags.FLAGS[config_flag.name])
    )
  except (OSError, ValueError, TypeError, AttributeError) as error:
    raise ConfigError(f'--config: {_text(error)}') from error


def _nest(changes: Mapping[str, Any]) -> dict:
  """Dotted keys, or groups of keys, as nested groups."""
  nested: dict = {}
  for key, value in changes.items():
    for part in reversed(key.split('.')):
      value = {part: value}
    nested = recipes.merge(nested, value)
  return nested


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
      f' {", ".join(profiles) or "none"}'
    )
  base = configs.from_dict(values)
  config = configs.from_dict(profiles[profile], base)
  merged = recipes.merge(configs.to_dict(config), _nest(overrides))
  options = {**base.family.options, **merged['family']['options']}
  merged['family']['options'] = {
    name: value for name, value in options.items() if value is not None
  }
  config = configs.from_dict(merged, config)
  configs.validate(config)
  return config


def default_workdir(config_flag: Any, family: str, profile: str) -> str:
  """runs/<config file>-<family>-<profile>."""
  stem = pathlib.Path(config_file(config_flag).split(':')[0]).stem
  return f'runs/{stem}-{family}-{profile}'


def config_file(config_flag: Any) -> str:
  """FILE or FILE:ARGUMENT, from the root of the repository if it is there."""
  return from_root(
    config_flags.get_config_filename(flags.FLAGS[config_flag.name])
  )


def from_root(name: str) -> str:
  """A file's name, from the root of the repository if it is there."""
  path = pathlib.Path(name).absolute()
  return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)
