"""Processes: how they agree, and a whole run that two of them share."""

import json
import os
import pathlib
import re

import jax
import numpy as np
import processes as children
import pytest
import tiny_run

from offmeta import processes
from offmeta.phases import run as phases

# One process.


def test_one_process_only_does_the_work():
  assert processes.is_main()
  for run in (processes.on_main, processes.in_all):
    assert run(lambda: {'any': object}) == {'any': object}  # no JSON
    with pytest.raises(ZeroDivisionError):
      run(lambda: 1 / 0)
  assert processes.any_process([False, True]) == [False, True]
  x = np.arange(3)
  assert processes.concatenate(x) is x


@pytest.mark.parametrize(
  'given',
  [
    dict(coordinator='127.0.0.1:1'),
    dict(num_processes=2),
    dict(process_id=0),
    dict(coordinator='127.0.0.1:1', process_id=0),
  ],
  ids=' '.join,
)
def test_start_wants_all_or_nothing(given, monkeypatch):
  monkeypatch.setattr(
    jax.distributed, 'initialize', lambda *args: pytest.fail('connected')
  )
  with pytest.raises(processes.ProcessError, match='together or not at all'):
    processes.start(**given)


@pytest.mark.parametrize('error', [ValueError, RuntimeError])
def test_start_says_why_it_failed(error, monkeypatch):

  def initialize(*args):
    raise error('no such cluster')

  monkeypatch.setattr(jax.distributed, 'initialize', initialize)
  with pytest.raises(
    processes.ProcessError,
    match='cannot connect the processes of this run: no such cluster',
  ):
    processes.start()


# A whole run: tasks shared out by two processes, then seeds, then one process
# alone, then two again.

_LAST = 'online/oracle'
_STOPPED = pathlib.Path(__file__).with_name('stopped_run.py')


def _run(workdir, *flags, program='experiments.run', args=(), check=True):
  """The command of the tiny run, in two processes of two devices."""
  return children.run_processes(
    program,
    [
      *args,
      f'--workdir={workdir}',
      '--config=tests/tiny_config.py',
      '--profile=smoke',
      '--keep_checkpoints',
      *flags,
    ],
    timeout=200,
    check=check,
  )


@pytest.fixture(name='shared', scope='module')
def _shared(tmp_path_factory):
  """(workdir, both processes) after phases in which they share tasks."""
  workdir = tmp_path_factory.mktemp('two') / 'run'
  return workdir, _run(workdir, '--phases=collect,offline', '--share=tasks')


@pytest.fixture(name='stopped', scope='module')
def _stopped(shared):
  """The same with seeds of their own, until one of them gets a SIGTERM."""
  workdir, _ = shared
  return workdir, _run(
    workdir,
    '--phases=online',
    '--checkpoint_every_s=900',
    check=False,
    program=_STOPPED,
    args=[workdir / _LAST / 'checkpoints', 1],
  )


@pytest.fixture(name='continued', scope='module')
def _continued(stopped):
  """The checkpoints that both left; then one process alone ends the phase."""
  workdir, _ = stopped
  steps = tiny_run.checkpoint_steps(workdir, _LAST)
  with tiny_run.shared_programs():
    phases.run(tiny_run.make_setup(workdir), ('online',))
  return workdir, steps


@pytest.fixture(name='scored', scope='module')
def _scored(continued):
  """Two processes score what all have left."""
  workdir, _ = continued
  return workdir, _run(workdir, '--phases=test,report')


def _assert_equal(ours, theirs):
  """Arrays by name; other programs round differently.

  Adam makes steps of what it is given: parameters agree to 1e-3 after up to 14
  updates at a rate of 3e-4, returns to 1e-2 of about -20.
  """
  assert ours.keys() == theirs.keys() and ours
  for name, value in ours.items():
    if '/final:' in name:
      np.testing.assert_allclose(
        value, theirs[name], rtol=1e-3, atol=1e-3, err_msg=name
      )
    elif re.match('(dataset|evaluations)/.*return', name):
      np.testing.assert_allclose(
        value, theirs[name], rtol=1e-3, atol=1e-2, err_msg=name
      )


def _only(found, *prefixes):
  return {k: v for k, v in found.items() if k.startswith(prefixes)}


def test_processes_share_tasks(shared, finished_run):
  workdir, results = shared
  assert 'tasks shared out over 2 of 4 devices' in results[0].stdout
  ours, theirs = (
    tiny_run.results(path, ('collect', 'offline'))
    for path in (workdir, finished_run)
  )
  parts = 'collect/', 'offline/', 'dataset/', 'evaluations/collect'
  _assert_equal(_only(ours, *parts), _only(theirs, *parts))


def test_sigterm_in_one_process_stops_both(stopped):
  _, results = stopped
  assert [r.returncode for r in results] == [143, 143], children.show(results)
  assert '1 of 2 devices in each of 2 processes' in results[0].stdout
  for result in results:
    assert 'the same command continues' in result.stderr
    assert 'Traceback' not in result.stderr
  # Only the main process reports.
  assert 'point_robot' not in results[1].stdout
  assert 'updates/s' not in results[1].stderr


def test_one_process_continues(continued, finished_run):
  workdir, steps = continued
  assert steps and 0 < steps[-1] < 8
  stages = 'online/matched', _LAST
  ours, theirs = (
    tiny_run.results(path, stages) for path in (workdir, finished_run)
  )
  _assert_equal(_only(ours, *stages), _only(theirs, *stages))


def test_two_processes_score(scored, finished_run):
  workdir, results = scored
  assert 'online_self_context' in results[0].stdout
  assert 'online_self_context' not in results[1].stdout
  ours, theirs = (
    _only(tiny_run.results(path, ()), 'evaluations')
    for path in (workdir, finished_run)
  )
  _assert_equal(ours, theirs)
  summary = json.loads((workdir / 'report' / 'summary.json').read_text())
  assert summary['rows']['online_self_context']['seeds'] == 2
  record = json.loads((workdir / 'run.json').read_text())
  assert record['execution']['processes'] == 2


def test_metrics_are_written_once_and_of_all_seeds(continued, finished_run):
  workdir, _ = continued
  for stage in tiny_run.STAGES:
    ours, theirs = (
      tiny_run.metrics(path / stage / 'metrics.jsonl')
      for path in (workdir, finished_run)
    )
    assert len(ours) == len(theirs), stage
    for row, expected in zip(ours, theirs):
      counts = 'step', 'iteration', 'env_steps'
      assert [row[k] for k in counts] == [expected[k] for k in counts], stage
      assert row['values'].keys() == expected['values'].keys()
      for name, values in row['values'].items():
        assert len(values) == (1 if stage == 'collect' else 2), name
        np.testing.assert_allclose(
          values,
          expected['values'][name],
          rtol=1e-2,
          atol=1e-2,
          err_msg=f'{stage} {row["step"]} {name}',
        )
    # A writer that was opened again makes another file.
    files = list((workdir / stage / 'tensorboard').iterdir())
    assert len(files) == (2 if stage == _LAST else 1), stage


# Failures.


def _errors(result):
  """The one message of a process."""
  return [x for x in result.stderr.splitlines() if x.startswith('error: ')]


def test_a_failure_in_one_process_ends_both(tmp_path):
  (tmp_path / 'run.json').write_text(
    json.dumps({'config': {'seed': 7}, 'config_hash': 'abc'})
  )
  main, other = results = _run(tmp_path, check=False)
  assert [r.returncode for r in results] == [1, 1], children.show(results)
  assert 'Traceback' not in children.show(results)
  (message,) = _errors(main)
  assert 'holds a run of another configuration (abc, this is' in message
  (message,) = _errors(other)
  assert message.startswith('error: the main process failed: ')
  assert os.listdir(tmp_path) == ['run.json']


def test_where_processes_do_not_agree_none_is_left_waiting(tmp_path):
  """The main process fails at something that only it does."""
  (tmp_path / 'collect' / 'metrics.jsonl').mkdir(parents=True)
  main, other = results = _run(tmp_path, '--phases=collect', check=False)
  assert main.returncode == 1, children.show(results)
  (message,) = _errors(main)
  assert 'metrics.jsonl: Is a directory' in message
  # jax ends it as soon as the main process is gone; -9 is `run_processes`.
  assert other.returncode not in (0, -9), children.show(results)
