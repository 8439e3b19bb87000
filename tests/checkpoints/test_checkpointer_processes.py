"""Checkpoints of several processes; what two of them check is in the worker."""

import ast
import fcntl
import textwrap
import time
import warnings

import checkpointing_worker as worker
import processes
import pytest

from offmeta.checkpoints.checkpointer import Checkpointer


def test_two_processes_and_one(tmp_path):
  """Each reads what the other wrote."""
  one = worker.make(worker.numbers(1))
  Checkpointer(tmp_path / 'one', 'abc').save(3, one)
  processes.run_processes(worker.__file__, [tmp_path], timeout=100)
  template = worker.make(worker.numbers(3))
  for name in ('seeds', 'tasks'):
    checkpointer = Checkpointer(tmp_path / name, 'abc')
    assert checkpointer.latest_step() == 6
    aside = name == 'seeds'  # The worker left a newer one, damaged.
    with warnings.catch_warnings(record=True) as caught:
      warnings.simplefilter('always')
      restored = checkpointer.restore(template)
    said = [str(w.message) for w in caught]
    assert len(said) == aside and all("'damaged-7'" in s for s in said), said
    worker.assert_holds(restored, worker.numbers(2), template)


def _script(tmp_path, code):
  """A script whose processes, and what they start, hold a lock on a file."""
  path = tmp_path / 'script.py'
  path.write_text(
    textwrap.dedent("""
      import fcntl, os, subprocess, sys, time
      lock = open(sys.argv[1], 'w')
      fcntl.flock(lock, fcntl.LOCK_SH)
      os.set_inheritable(lock.fileno(), True)
  """)
    + textwrap.dedent(code)
  )
  return path


def _assert_nobody_holds(path):
  with path.open() as lock:
    for _ in range(100):
      try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
      except BlockingIOError:
        time.sleep(0.05)
  raise AssertionError('a process is still there')


def test_a_failing_process_is_shown_and_the_others_ended(tmp_path, monkeypatch):
  monkeypatch.setattr(processes, '_GRACE_S', 1.0)
  script = _script(
    tmp_path,
    """
      if sys.argv[-1] == '--process_id=1':
        sys.exit('no good')
      print(sys.argv[1:], flush=True)
      time.sleep(100)
  """,
  )
  lock = tmp_path / 'lock'
  results = processes.run_processes(
    script, [lock], num_processes=3, timeout=60, check=False
  )
  assert [r.returncode for r in results] == [-9, 1, -9]
  assert results[1].stderr == 'no good\n'
  said = ast.literal_eval(results[2].stdout)
  assert said[0] == str(lock)
  assert said[1].startswith('--coordinator=127.0.0.1:')
  assert said[2:] == ['--num_processes=3', '--process_id=2']
  assert 'status 1\nno good' in processes.show(results)
  _assert_nobody_holds(lock)


def test_processes_that_take_too_long_are_ended(tmp_path):
  script = _script(
    tmp_path,
    """
      print('begun', flush=True)
      subprocess.run(['sleep', '100'], close_fds=False)
  """,
  )
  lock = tmp_path / 'lock'
  with pytest.raises(AssertionError, match='not done after 2 s(.|\n)*begun'):
    processes.run_processes(script, [lock], timeout=2)
  _assert_nobody_holds(lock)


def test_a_status_that_is_not_0_is_an_error(tmp_path):
  script = _script(tmp_path, "sys.exit('no good')")
  with pytest.raises(AssertionError, match='process 1 ended with status 1'):
    processes.run_processes(script, [tmp_path / 'lock'], timeout=60)
