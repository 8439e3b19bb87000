"""Where a run's time went."""

import pathlib
from typing import Any

from experiments.benchmarking import BenchmarkError
from experiments.benchmarking.timing import rounded
from offmeta.results import records


def timing_file(workdir: str) -> pathlib.Path:
  """The file of a run with the seconds of each stage.

  Raises:
    BenchmarkError: there is none.
  """
  path = pathlib.Path(workdir) / 'timing.json'
  if not path.is_file():
    raise BenchmarkError(
      f'--workdir: {path} not found; give the --workdir of a run of'
      ' experiments.run'
    )
  return path


def read_workdir(workdir: str) -> dict[str, Any]:
  """Wall seconds and shares of the stages of a run.

  Raises:
    BenchmarkError: no timing.json there, or not one of ours.
  """
  path = timing_file(workdir)
  try:
    timing = records.load_timing(path)
  except ValueError as error:
    raise BenchmarkError(f'--workdir: {error}') from error
  total = sum(timing.values())
  return {
    'total_s': rounded(total),
    'stages': [
      {
        'stage': name,
        'seconds': rounded(seconds),
        'share': rounded(seconds / total if total else 0.0),
      }
      for name, seconds in sorted(timing.items(), key=lambda kv: -kv[1])
    ],
  }
