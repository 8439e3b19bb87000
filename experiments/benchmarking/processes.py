"""Modules of this package in processes of their own.

Device counts of a CPU and the time of a start need fresh processes. They get
their work as an argument and answer in lines of JSON.
"""

from collections.abc import Mapping
import contextlib
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

from experiments.benchmarking import BenchmarkError
from experiments.benchmarking.options import Options

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_CLOSE_S = 20.0


class Worker:
  """`python -m MODULE ARGUMENT`; a context that ends the process.

  Args:
    module: dotted name; its main block calls `argument` and `reply`.
    environment: variables to set.
    argument: anything for JSON.
  """

  def __init__(
    self, module: str, environment: Mapping[str, str], **argument: Any
  ):
    self._module = module
    self._errors = tempfile.TemporaryFile('w+')
    self._process = subprocess.Popen(
      [sys.executable, '-m', module, json.dumps(argument)],
      cwd=_ROOT,
      env={**os.environ, **environment},
      text=True,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=self._errors,
    )

  def __enter__(self) -> 'Worker':
    return self

  def __exit__(self, *unused):
    with contextlib.suppress(BrokenPipeError):
      self._process.stdin.close()  # the end of what it reads
    try:
      self._process.wait(_CLOSE_S)
    except subprocess.TimeoutExpired:
      self._process.kill()
      self._process.wait()
    self._process.stdout.close()
    self._errors.close()

  def receive(self) -> Any:
    """Waits for its next answer.

    Raises:
      BenchmarkError: it ended without one.
    """
    line = self._process.stdout.readline()
    if line:
      return json.loads(line)
    status = self._process.wait()
    self._errors.seek(0)
    lines = self._errors.read().strip().splitlines() or ['no message']
    raise BenchmarkError(
      f'{self._module}: its process ended with status {status}: {lines[-1]}'
    )

  def ask(self) -> Any:
    """Asks for another answer and waits for it."""
    with contextlib.suppress(BrokenPipeError):  # `receive` says why
      self._process.stdin.write('\n')
      self._process.stdin.flush()
    return self.receive()


# Within the process.


def argument() -> dict[str, Any]:
  """What `Worker` was given."""
  return json.loads(sys.argv[1])


def asked() -> bool:
  """Waits until another answer is wanted; False if none will be."""
  return bool(sys.stdin.readline())


def reply(value: Any):
  """One answer."""
  print(json.dumps(value), flush=True)


def options_from(values: Mapping[str, Any]) -> Options:
  """Options from `dataclasses.asdict` that went through JSON."""
  return Options(
    **{
      field.name: (
        tuple(values[field.name])
        if isinstance(values[field.name], list)
        else values[field.name]
      )
      for field in dataclasses.fields(Options)
    }
  )
