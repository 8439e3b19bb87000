"""Runs phases, and says what went wrong.

For `experiments.run` and `experiments.compare`, which are flags around it.
"""

from collections.abc import Callable, Mapping
import contextlib
import errno
import pathlib
import shlex
import sys
import time
from typing import Any

from absl import logging

from experiments.runs import configuration, jax_settings

# Not mistakes of the user: a disk that is full or broken.
_FAILED_WRITES = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


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
    _execute_flags(
      config_flag, profile, workdir, phases, overrides, runtime, command.strip()
    )

  status, message = attempt(work)
  if status:
    print('\n' + 'error: ' * (status == 1) + message, file=sys.stderr)
  return status


def prepare() -> Any:
  """A quiet log, jax's settings, and what listens to SIGTERM and Ctrl-C."""

  if not any(a.startswith('--verbosity') for a in sys.argv):
    logging.set_verbosity(logging.WARNING)
  jax_settings.configure()
  from offmeta.training import stopping

  stop = stopping.StopRequest()
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
    stop: a `stopping.StopRequest`.
    runtime: fields of `offmeta.training.setup.Runtime`.
    profile, command, config_file: see `record.write`.

  Raises:
    Interrupted: a stop was requested; the same call continues.
    Those that `attempt` puts into words.
  """
  from experiments.runs import record
  from offmeta import processes
  from offmeta.phases import budget, run as phases_lib
  from offmeta.training import setup as setups, workdir_lock

  check_folder(folder)
  setup = setups.make_setup(config, folder, stop, setups.Runtime(**runtime))
  held = contextlib.ExitStack()

  def announce():
    held.enter_context(workdir_lock.hold(folder))
    record.write(
      config,
      folder,
      profile,
      command,
      config_file,
      {
        'layout': setup.seeds.layout.describe(),
        'processes': processes.count(),
        **runtime,
      },
    )
    print(
      f'{config.family.name}, profile {profile}, {config.num_seeds} seeds,'
      f' workdir {folder}\n{setup.seeds.layout.describe()}',
      *needs,
      sep='\n',
      flush=True,
    )

  needs = budget.check(setup, phases)
  with held:
    processes.on_main(announce)
    phases_lib.run(setup, phases)
    if 'report' in phases:
      processes.on_main(lambda: _report(setup))


def check_folder(folder: pathlib.Path):
  """Refuses a workdir that cannot be one.

  Raises:
    ConfigError: it, or a folder that it is in, is a file.
  """
  from offmeta.training.config import ConfigError

  for path in (folder, *folder.parents):
    if path.exists() and not path.is_dir():
      raise ConfigError(f'--workdir={folder}: {path} is a file, no folder')


def _execute_flags(
  config_flag, profile, workdir, phases, overrides, runtime, command
):
  """The same for the flags of `experiments.run`."""
  from offmeta.phases import run as phases_lib
  from offmeta.training import config as configs

  unknown = [name for name in phases if name not in phases_lib.PHASES]
  if unknown or not phases:
    raise configs.ConfigError(
      f'--phases: unknown {", ".join(unknown) or "(empty)"}; known:'
      f' {",".join(phases_lib.PHASES)}'
    )
  values, given = configuration.from_flag(config_flag)
  config = configuration.resolve(values, profile, {**given, **overrides})
  folder = pathlib.Path(
    workdir
    or configuration.default_workdir(config_flag, config.family.name, profile)
  )
  execute(
    config,
    folder.expanduser().absolute(),
    phases,
    prepare(),
    runtime,
    profile,
    command,
    configuration.config_file(config_flag),
  )


def _report(setup: Any) -> None:
  from offmeta.results import findings, report
  from offmeta.training.setup import PhaseError

  begin = time.monotonic()
  try:
    summary = report.build(setup.workdir)
  except (ImportError, ValueError) as error:
    raise PhaseError(f'report: {error}') from error
  print()
  print(findings.text(summary))
  folder = setup.workdir / 'report'
  print(f'every row: {folder / "table.txt"}')
  print(
    f'report: {folder / "index.html"}'
    f' (made in {time.monotonic() - begin:.1f} s)'
  )


def attempt(work: Callable[[], Any]) -> tuple[int, str]:
  """Does something, and puts what went wrong into words.

  Returns:
    The exit status and a message. 0, '': done. 1: bad input or a failed run.
    143: SIGTERM or Ctrl-C was honoured; the same command continues.
  """
  from offmeta import processes
  from offmeta.checkpoints.checkpointer import CheckpointError
  from offmeta.data.meta_dataset import DatasetError
  from offmeta.training.config import ConfigError
  from offmeta.training.metrics import DivergenceError, MetricsFileError
  from offmeta.training.setup import PhaseError
  from offmeta.training.stopping import Interrupted
  from offmeta.training.workdir_lock import WorkdirBusyError

  try:
    work()
  except Interrupted:
    return 143, 'stopped on request; the same command continues from here'
  except KeyboardInterrupt:  # before anything listens, or after
    return 143, 'stopped; the same command continues'
  except (
    ConfigError,
    PhaseError,
    DatasetError,
    CheckpointError,
    DivergenceError,
    ImportError,
    MetricsFileError,
    WorkdirBusyError,
    processes.ProcessError,
  ) as error:
    return 1, str(error)
  except OSError as error:
    where = f'{error.filename}: ' if error.filename else ''
    message = f'{where}{error.strerror or error}'
    if error.errno in _FAILED_WRITES:
      message += (
        '; what was finished before is intact and the same command continues'
      )
    return 1, message
  return 0, ''
