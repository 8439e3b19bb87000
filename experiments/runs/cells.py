"""Cells of a table: runs whose reports are put side by side.

A cell is one configuration in a workdir of its own. A table runs the cells
that are not finished, notes those that fail, and goes on with the others.
"""

from collections.abc import Mapping
import pathlib
import traceback
from typing import Any, NamedTuple

from experiments.runs import launch
from offmeta import disk
from offmeta.phases import run as phases
from offmeta.training import config as configs, stopping


class Cell(NamedTuple):
  """One run of a table.

  Attributes:
    name: in the table.
    config_file: FILE:FAMILY, where its configuration comes from.
    config: what it runs with.
  """

  name: str
  config_file: str
  config: configs.ExperimentConfig


def is_finished(cell: Cell, workdir: pathlib.Path) -> bool:
  """Whether a run with this very configuration has written its report."""
  try:
    summary = disk.read_json(workdir / 'report' / 'summary.json')
  except (OSError, ValueError):
    return False
  known = summary.get('config_hash') if isinstance(summary, dict) else None
  return known == configs.config_hash(cell.config)


def run(
  cell: Cell,
  workdir: pathlib.Path,
  profile: str,
  runtime: Mapping[str, Any],
  command: str,
  stop: stopping.StopRequest,
) -> str:
  """Runs all phases of a cell; what is finished is left alone.

  Args:
    cell: what to run.
    workdir: of this cell.
    profile: that the configuration was resolved for.
    runtime: settings of `setup.Runtime`.
    command: recorded with the run.
    stop: asks to stop.

  Returns:
    Why it failed, in one line; '' if it did not. A traceback that nobody
    foresaw is in WORKDIR/error.txt.

  Raises:
    Interrupted: a stop was requested; the same call continues.
  """
  if is_finished(cell, workdir):
    print('finished before', flush=True)
    return ''
  try:
    status, message = launch.attempt(
      lambda: launch.execute(
        cell.config,
        workdir,
        phases.PHASES,
        stop,
        runtime,
        profile,
        command,
        cell.config_file,
      )
    )
  except Exception as error:  # pylint: disable=broad-exception-caught
    # A mistake in one algorithm must not cost the others their hours.
    status, message = 1, f'{type(error).__name__}: {error}'
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / 'error.txt').write_text(traceback.format_exc())
    message += f' (more in {workdir / "error.txt"})'
  if status == 143:
    raise stopping.Interrupted
  return one_line(message) if status else ''


def one_line(message: str) -> str:
  """A message of several lines as one."""
  return '; '.join(filter(None, map(str.strip, message.splitlines())))
