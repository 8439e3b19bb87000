"""Starts the processes of one program on this machine, and ends them."""

import contextlib
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_COUNT = '--xla_force_host_platform_device_count'
# When one process has failed, the others have little left to say.
_GRACE_S = 15.0


def run_processes(
  program, args=(), num_processes=2, devices_each=2, timeout=120.0, check=True
):
  """Runs a program in several processes that find each other on the loopback.

  Args:
    program: a script (ends in .py) or the name of a module. It receives
      --coordinator, --num_processes and --process_id, as `experiments.run`
      understands them, after `args`.
    args: further arguments, the same for all.
    num_processes: how many.
    devices_each: CPU devices of each process.
    timeout: wall seconds for all of it.
    check: whether every process has to end with status 0.

  Returns:
    A `subprocess.CompletedProcess` each, with text.

  Raises:
    AssertionError: with the output of all, if time ran out or a status was
      not 0. No process is left behind.
  """
  command = [sys.executable, str(program)]
  if not str(program).endswith('.py'):
    command.insert(1, '-m')
  command += [str(arg) for arg in args]
  command += [
    f'--coordinator=127.0.0.1:{_free_port()}',
    f'--num_processes={num_processes}',
  ]
  with contextlib.ExitStack() as stack:
    files, children = [], []
    try:
      for i in range(num_processes):
        files.append(
          [
            stack.enter_context(tempfile.TemporaryFile('w+'))
            for _ in ('out', 'err')
          ]
        )
        # A session each, so that what they start ends with them.
        children.append(
          subprocess.Popen(
            command + [f'--process_id={i}'],
            cwd=_ROOT,
            env=_environment(devices_each),
            stdin=subprocess.DEVNULL,
            stdout=files[i][0],
            stderr=files[i][1],
            start_new_session=True,
          )
        )
      ended = _wait(children, timeout)
    finally:
      for child in children:
        with contextlib.suppress(ProcessLookupError):
          os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    results = [
      subprocess.CompletedProcess(
        child.args, child.returncode, *[_content(f) for f in pair]
      )
      for child, pair in zip(children, files)
    ]
  assert ended, f'not done after {timeout:.0f} s\n{show(results)}'
  if check:
    assert not any(r.returncode for r in results), show(results)
  return results


def show(results):
  """What the processes said, one after the other."""
  return '\n'.join(
    f'--- process {i} ended with status {r.returncode}\n{r.stdout}{r.stderr}'
    for i, r in enumerate(results)
  )


def _wait(children, timeout):
  """Whether all ended; once one has failed the rest get a short time."""
  deadline = time.monotonic() + timeout
  failed = False
  while time.monotonic() < deadline:
    statuses = [child.poll() for child in children]
    if None not in statuses:
      return True
    if any(statuses) and not failed:
      failed, deadline = True, min(deadline, time.monotonic() + _GRACE_S)
    time.sleep(0.05)
  # A failed one explains more than that the others were waiting for it.
  return failed


def _environment(devices):
  flags = re.sub(rf'{_COUNT}=\S*', '', os.environ.get('XLA_FLAGS', ''))
  paths = [_ROOT, _ROOT / 'tests', os.environ.get('PYTHONPATH', '')]
  return {
    **os.environ,
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': f'{flags} {_COUNT}={devices}'.strip(),
    'PYTHONPATH': os.pathsep.join(str(path) for path in paths if str(path)),
    'PYTHONUNBUFFERED': '1',
  }


def _content(file):
  file.seek(0)
  return file.read()


def _free_port():
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    return probe.getsockname()[1]
