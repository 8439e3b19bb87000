"""Profiler traces of single calls."""

from collections.abc import Callable, Mapping
import pathlib
from typing import Any

import jax

from experiments.benchmarking import BenchmarkError
from experiments.benchmarking.report import say


def make_folder(folder: str):
  """Makes the folder of the traces before anything is measured.

  Raises:
    BenchmarkError: it cannot be made.
  """
  try:
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise BenchmarkError(f'--trace_dir: {folder}: {error.strerror}') from error


def trace(folder: str, calls: Mapping[str, Callable[[], Any]]):
  """Writes a trace of one call of each, compiled before, to folder/NAME."""
  for name, call in calls.items():
    say(f'tracing {name}')
    with jax.profiler.trace(str(pathlib.Path(folder) / name)):
      call()
  say(
    f'traces: load {folder}/*/plugins/profile/*/*.trace.json.gz into'
    ' https://ui.perfetto.dev, or run "pip install xprof" and'
    f' "xprof --logdir={folder}"'
  )
