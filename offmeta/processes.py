"""The processes of a run: how they find each other and how they agree.

Every process runs the same program and must come to each of these calls, in
the same order; whoever is early waits. With one process they only do the work.
"""

from collections.abc import Callable, Sequence
import json
import pathlib
import time
from typing import Any, TypeVar

import jax
from jax.experimental import multihost_utils
import numpy as np

_Result = TypeVar('_Result')
_MESSAGE_BYTES = 2048
_BLOCK_BYTES = 1024  # Few sizes, so that few programs are compiled.


class ProcessError(RuntimeError):
  """Processes are not connected, or another one failed."""


def start(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
):
  """Connects this process with the others of its run (`jax.distributed`).

  Call it before anything else of jax. Without arguments the cluster's
  environment tells them (SLURM, Open MPI, GKE, Cloud TPU).

  Args:
    coordinator: HOST:PORT of the first process.
    num_processes: how many there are.
    process_id: which this is, from 0.

  Raises:
    ProcessError: no cluster, or the others did not come.
  """
  given = (coordinator, num_processes, process_id)
  if None in given and any(part is not None for part in given):
    raise ProcessError(
      'coordinator, number of processes and process id must be given'
      f' together or not at all; got {given}'
    )
  try:
    jax.distributed.initialize(coordinator, num_processes, process_id)
    # On CPUs the first exchange has 30 s; later ones wait for slow compilers.
    any_process([False])
  except (ValueError, RuntimeError) as error:
    raise ProcessError(
      f'cannot connect the processes of this run: {error}'
    ) from error


def count() -> int:
  """How many there are."""
  return jax.process_count()


def is_main() -> bool:
  """Whether this process writes what only one may write."""
  return jax.process_index() == 0


def any_process(flags: Sequence[bool]) -> list[bool]:
  """Per flag, whether it is set in any process; the same in all."""
  if jax.process_count() == 1:
    return list(flags)
  every = multihost_utils.process_allgather(np.asarray(flags))
  return [bool(flag) for flag in every.any(axis=0)]


def on_main(work: Callable[[], Any]) -> Any:
  """Runs `work` in the main process; all get its result.

  Args:
    work: what it returns must fit into JSON.

  Raises:
    ProcessError: in the other processes if it failed, with its message; the
      main process raises the exception itself.
  """
  if jax.process_count() == 1:
    return work()
  text, failure = '', None
  if is_main():
    try:
      text = json.dumps({'result': work()})
    except Exception as error:  # pylint: disable=broad-exception-caught
      text, failure = json.dumps({'error': str(error)}), error
  answer = json.loads(_from_main(text))
  if failure is not None:
    raise failure
  if 'error' in answer:
    raise ProcessError(f'the main process failed: {answer["error"]}')
  return answer['result']


def in_all(work: Callable[[], _Result]) -> _Result:
  """Runs `work` in every process; it fails in all if it fails in one.

  Raises:
    ProcessError: if it failed in another process, with its message; where it
      failed, the exception itself, unless that process only gave up waiting
      for another.
  """
  if jax.process_count() == 1:
    return work()
  result, failure, message = None, None, ''
  try:
    result = work()
  except Exception as error:  # pylint: disable=broad-exception-caught
    failure, message = error, f'{type(error).__name__}: {error}'
  messages = {i: m for i, m in enumerate(_from_all(message)) if m}
  if not messages:
    return result
  causes = {
    i: m for i, m in messages.items() if not m.startswith(TimeoutError.__name__)
  } or messages
  if jax.process_index() in causes:
    raise failure
  process = min(causes)
  raise ProcessError(f'process {process}: {causes[process]}') from failure


def await_directory(path: pathlib.Path, patience_s: float = 120.0):
  """A file system may be late to show what another process has made.

  Raises:
    FileNotFoundError: it is not there after `patience_s` seconds.
  """
  deadline = time.monotonic() + patience_s
  while not path.is_dir():
    if time.monotonic() > deadline:
      raise FileNotFoundError(
        f'{path}: the main process has made it and this one does not see it;'
        ' it must be on a file system that all processes share'
      )
    time.sleep(0.1)


def concatenate(x: np.ndarray) -> np.ndarray:
  """The arrays [n, ...] of all processes, one after the other.

  Unlike jax's own collectives it keeps numbers of 64 bits.
  """
  if jax.process_count() == 1:
    return x
  raw = np.ascontiguousarray(x).view(np.uint8)
  return multihost_utils.process_allgather(raw, tiled=True).view(x.dtype)


def _from_main(text: str) -> str:
  data = np.frombuffer(text.encode(), np.uint8)
  size = int(multihost_utils.broadcast_one_to_all(np.int32(data.size)))
  block = np.zeros(-(-size // _BLOCK_BYTES) * _BLOCK_BYTES, np.uint8)
  if is_main():
    block[:size] = data
  block = multihost_utils.broadcast_one_to_all(block)
  return block[:size].tobytes().decode()


def _from_all(text: str) -> list[str]:
  """The texts of all processes, cut to a length."""
  block = np.zeros(_MESSAGE_BYTES, np.uint8)
  data = np.frombuffer(text.encode()[:_MESSAGE_BYTES], np.uint8)
  block[: data.size] = data
  blocks = multihost_utils.process_allgather(block)
  return [b.tobytes().rstrip(b'\0').decode(errors='ignore') for b in blocks]
