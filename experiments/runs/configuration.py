"""From the command line and config files to an ExperimentConfig.

ml_collections stays in this file and in the config files; everything below
sees the frozen dataclass.
"""

from collections.abc import Callable, Mapping
import errno
from importlib import machinery
import os
import pathlib
import sys
import traceback
import types
from typing import Any

from absl import flags
import ml_collections
from ml_collections import config_flags

from experiments.configs import recipes
from experiments.runs import jax_settings

ROOT = pathlib.Path(__file__).resolve().parents[2]
_DEFAULT = str(ROOT / 'experiments/configs/smac.py:point_robot')


def define_config_flag() -> Any:
  """The --config flag: FILE or FILE:FAMILY, and --config.KEY=VALUE.

  A mistake in the file or an unknown key may show while the flag is defined;
  it gives one message and exit status 1.
  """
  jax_settings.prepare_environment()  # config files import jax
  return _one_message(
    lambda: config_flags.DEFINE_config_file(
      'config',
      default=_DEFAULT,
      help_string='Config file and family, e.g.'
      ' experiments/configs/smac.py:cheetah_vel.',
    )
  )


def parse_flags(argv: list[str]) -> list[str]:
  """Parses flags; a bad one gives one message and exit status 1."""
  return _one_message(lambda: flags.FLAGS(argv))


def _one_message(work: Callable[[], Any]) -> Any:
  """Does what reads flags; whatever goes wrong ends the process in words.

  A mistake in a config file shows where it is, too.
  """
  try:
    return work()
  except Exception as error:  # pylint: disable=broad-exception-caught
    line = _line_of_file(_config_argument().split(':')[0], error)
    if line is not None and not isinstance(error, (OSError, ValueError)):
      traceback.print_exception(error)
      message = f'{_file_name()}, line {line}: {_kind(error)}'
    elif "'get_config'" in str(error):
      message = f'{_file_name()}: it has no function get_config'
    elif isinstance(error, OSError):
      message = f'{_file_name()}: {_unreadable(error)}'
    elif isinstance(error, (AttributeError, KeyError)):  # of ml_collections
      message = _not_a_config() or _unknown_key(error)
    elif isinstance(error, (flags.Error, TypeError, ValueError)):
      message = _text(error)
    else:
      raise
    print(f'error: {message}', file=sys.stderr)
    sys.exit(1)


def _file_name() -> str:
  return f'config file {_config_argument().split(":")[0]}'


def _unreadable(error: OSError) -> str:
  """Why; ml_collections lists all places where it has looked."""
  if not pathlib.Path(_config_argument().split(':')[0]).exists():
    return os.strerror(errno.ENOENT)
  return error.strerror or _text(error)


def _line_of_file(file: str, error: Exception) -> int | None:
  """Where in the config file an error came up; None if not in it."""
  path = pathlib.Path(file).absolute()
  lines = [
    frame.lineno
    for frame in traceback.extract_tb(error.__traceback__)
    if pathlib.Path(frame.filename).absolute() == path
  ]
  if isinstance(error, SyntaxError) and error.filename:
    if pathlib.Path(error.filename).absolute() == path:
      lines.append(error.lineno)
  return lines[-1] if lines else None


def _kind(error: Exception) -> str:
  return f'{type(error).__name__}: {getattr(error, "msg", error)}'


def _not_a_config() -> str:
  """What the file gives, if that has no keys at all; else ''."""
  try:
    load_config(_config_argument())
  except ValueError as error:
    # Others, such as a family that it registers twice now, are not the cause.
    return str(error) if _RETURNED in str(error) else ''
  return ''


def _unknown_key(error: Exception) -> str:
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
  return '; '.join(
    [f'unknown key {key} in {given}', f'the keys are {known}'] + hint
  )


def _config_argument() -> str:
  """--config of the command line, read without the keys in it."""
  values = flags.FlagValues()
  flags.DEFINE_string('config', _DEFAULT, '', flag_values=values)
  values(sys.argv, known_only=True)
  return values.config


def load_file(file: str) -> types.ModuleType:
  """A config file as a module.

  Raises:
    ConfigError: the file is missing or fails, in whatever way.
  """
  module = types.ModuleType('config_file')
  try:
    machinery.SourceFileLoader(module.__name__, file).exec_module(module)
  except Exception as error:  # pylint: disable=broad-exception-caught
    raise _bad_file(file, error) from error
  return module


def load_config(name: str) -> Any:
  """What FILE or FILE:ARGUMENT says, and the family that it may register.

  Raises:
    ConfigError: the file is missing, no config file, or fails, in whatever
      way.
  """
  file, *argument = name.split(':', 1)
  module = load_file(file)
  if not callable(getattr(module, 'get_config', None)):
    raise _config_error(file, 'it has no function get_config')
  try:
    values = module.get_config(*argument)
  except Exception as error:  # pylint: disable=broad-exception-caught
    raise _bad_file(file, error) from error
  _check_returned(f'config file {file}', values)
  return values


def load_family(name: str) -> str:
  """The name of the family of FILE or FILE:ARGUMENT.

  Raises:
    ConfigError: see `load_config`, or it names none.
  """
  family = load_config(name).get('family')
  is_group = isinstance(family, ml_collections.ConfigDict)
  found = family.get('name') if is_group else family
  if not (is_group and isinstance(found, str)):
    raise _config_error(
      name.split(':', 1)[0], f'family.name must be a text, not {found!r}'
    )
  return found


def load_ablations(file: str) -> dict[str, dict[str, Any]]:
  """ABLATIONS of a config file; empty if it has none.

  Raises:
    ConfigError: see `load_file`, or they are of another form.
  """
  ablations = getattr(load_file(file), 'ABLATIONS', {})
  if not isinstance(ablations, Mapping):
    raise _config_error(
      file, f'ABLATIONS must map names to changes, not be {ablations!r}'
    )
  for name, changes in ablations.items():
    if not isinstance(name, str) or not isinstance(changes, Mapping):
      raise _config_error(
        file,
        'ABLATIONS must map names to changes of the settings,'
        f' not {name!r} to {changes!r}',
      )
    if not all(isinstance(key, str) for key in changes) or not isinstance(
      changes.get('description', ''), str
    ):
      raise _config_error(
        file,
        f'ABLATIONS[{name!r}]: keys and the description must be texts, got'
        f' {changes!r}',
      )
  return dict(ablations)


def _bad_file(file: str, error: Exception) -> Exception:
  """A mistake in the file's code with its kind and line."""
  line = _line_of_file(file, error)
  if isinstance(error, ValueError):  # These say what is wrong: ConfigError.
    return _config_error(file, str(error) or _kind(error))
  if line is None and isinstance(error, OSError):  # Of the file itself.
    return _config_error(file, error.strerror or str(error))
  return _config_error(
    file if line is None else f'{file}, line {line}', _kind(error)
  )


def _config_error(where: str, reason: str) -> Exception:
  from offmeta.training.config import ConfigError

  return ConfigError(f'config file {where}: {reason}')


def _text(error: Exception) -> str:
  """The last line of a message, without quotes around it."""
  lines = [line for line in str(error).strip().splitlines() if line.strip()]
  if not lines:
    return type(error).__name__
  text = lines[-1].strip()
  quoted = len(text) > 1 and text[0] == text[-1] and text[0] in '"\''
  return text[1:-1] if quoted else text


def from_flag(config_flag: Any) -> tuple[Any, dict]:
  """The config file's value and the overrides (files are loaded lazily).

  Raises:
    ConfigError: the file or the family in it does not exist.
  """
  from offmeta.training.config import ConfigError

  try:
    values = config_flag.value
    getattr(values, 'to_dict', None)  # a file that is not there fails here
  except OSError as error:
    raise ConfigError(f'{_file_name()}: {_unreadable(error)}') from error
  except (ValueError, TypeError, AttributeError) as error:
    raise ConfigError(f'--config: {_text(error)}') from error
  _check_returned(_file_name(), values)
  overrides = config_flags.get_override_values(flags.FLAGS[config_flag.name])
  return values, {
    key: value.to_dict()
    if isinstance(value, ml_collections.ConfigDict)
    else value
    for key, value in overrides.items()
  }


_RETURNED = 'get_config returned'


def _check_returned(file: str, values: Any):
  from offmeta.training.config import ConfigError

  if not isinstance(values, ml_collections.ConfigDict):
    raise ConfigError(
      f'{file}: {_RETURNED} {values!r}, but a ConfigDict is needed, as'
      ' made by experiments.configs.base.make_config'
    )


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
  family = merged['family']
  given = family.get('options') if isinstance(family, Mapping) else None
  if isinstance(given, Mapping):  # Else `from_dict` says what is wrong.
    options = {**base.family.options, **given}
    family['options'] = {
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
