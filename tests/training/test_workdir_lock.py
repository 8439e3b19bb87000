"""A workdir is held by one process, and free when that ends."""

import os
import socket
import subprocess
import sys
import warnings

import pytest

from offmeta.training import workdir_lock

_HOLD = """
import runpy, sys, pathlib
hold = runpy.run_path(sys.argv[1])['hold']
with hold(pathlib.Path(sys.argv[2])):
  print('held', flush=True)
  sys.stdin.read()
"""


def _child(workdir):
  child = subprocess.Popen(
    [sys.executable, '-c', _HOLD, workdir_lock.__file__, str(workdir)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  assert child.stdout.readline() == 'held\n'
  return child


def test_another_process_is_told_who_holds_it(tmp_path):
  workdir = tmp_path / 'new' / 'run'
  child = _child(workdir)
  try:
    with pytest.raises(workdir_lock.WorkdirBusyError) as error:
      with workdir_lock.hold(workdir):
        pytest.fail('two processes')
    message = str(error.value)
    assert message.startswith(
      f'{workdir}: process {child.pid} on {socket.gethostname()} (since 20'
    )
  finally:
    child.kill()
    child.communicate()
  with workdir_lock.hold(workdir):  # whatever a killed holder left
    assert f'"pid": {os.getpid()}' in (workdir / '.lock').read_text()


def test_a_holder_that_has_not_written_yet(tmp_path):
  with workdir_lock.hold(tmp_path):
    (tmp_path / '.lock').write_text('')
    with pytest.raises(workdir_lock.WorkdirBusyError, match='another process'):
      with workdir_lock.hold(tmp_path):
        pass


def test_it_is_free_after_a_failure(tmp_path):
  for _ in range(2):
    with pytest.raises(KeyError):
      with workdir_lock.hold(tmp_path):
        raise KeyError


def test_a_file_system_without_locks(tmp_path, monkeypatch):
  def flock(*args):
    raise OSError(workdir_lock.errno.ENOLCK, 'No locks available')

  monkeypatch.setattr(workdir_lock.fcntl, 'flock', flock)
  with pytest.warns(UserWarning, match='has no locks'):
    with workdir_lock.hold(tmp_path):
      pass
  with warnings.catch_warnings():
    monkeypatch.undo()
    warnings.simplefilter('error')
    with workdir_lock.hold(tmp_path):
      pass
