"""Where a run's time went."""

import json
import pathlib
from typing import Any

from experiments.benchmarking import BenchmarkError
from experiments.benchmarking.timing import rounded


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
    timing = {k: float(v) for k, v in json.loads(path.read_text()).items()}
  except (ValueError, TypeError, AttributeError) as error:
    raise BenchmarkError(
      f'{path}: not a file of stage names and seconds: {error}'
    ) from error
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
