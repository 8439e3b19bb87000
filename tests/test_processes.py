"""Processes: how they agree, and a whole run that two of them share."""

import json
import os
import pathlib
import re
import shutil
from typing import NamedTuple

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
# alone; and another one, which two processes score.

_STOPPED = 'online/matched'
_PROGRAM = pathlib.Path(__file__).with_name('several_runs.py')
_FLAGS = (
  '--config=tests/tiny_config.py',
  '--profile=smoke',
  '--keep_checkpoints',
)


class _Two(NamedTuple):
  """What two processes of two devices left.

  Attributes:
    workdir: in which they shared tasks, then seeds until a SIGTERM.
    scored: a finished run, which they scored.
    refused: a workdir in which they were not to run.
    said: {part: [(stdout, stderr) of each process]}.
    statuses: {part: [exit status of each process]}.
  """

  workdir: pathlib.Path
  scored: pathlib.Path
  refused: pathlib.Path
  said: dict[str, list[tuple[str, str]]]
  statuses: dict[str, list[int]]


@pytest.fixture(name='two', scope='module')
def _two(finished_run, tmp_path_factory):
  """One pair of processes does all, with the command."""
  folder = tmp_path_factory.mktemp('two')
  workdir = folder / 'run'
  other = folder / 'other'  # holds a run of another configuration
  other.mkdir()
  (other / 'run.json').write_text(
    json.dumps({'config': {'seed': 7}, 'config_hash': 'abc'})
  )
  scored = shutil.copytree(finished_run, folder / 'scored')
  for path in (scored / 'evaluations').iterdir():
    if path.stem != 'collect':
      path.unlink()
  parts = {
    'shared': (workdir, 'collect,offline', 'tasks', None),
    'scored': (scored, 'test,report', 'seeds', None),
    'stopped': (
      workdir,
      'online',
      'seeds',
      [f'{workdir / _STOPPED}/checkpoints', 1],
    ),
    'refused': (other, 'collect', 'seeds', None),
  }
  commands = [
    {
      'flags': [
        *_FLAGS,
        f'--workdir={where}',
        f'--phases={names}',
        f'--share={share}',
        f'--checkpoint_every_s={900 if stop else 60}',
      ],
      'stop': stop,
    }
    for where, names, share, stop in parts.values()
  ]
  (folder / 'commands.json').write_text(json.dumps(commands))
  results = children.run_processes(
    _PROGRAM, [folder / 'commands.json'], timeout=300, check=False
  )
  streams = [
    [
      re.split(r'^=== \d+\n', text, flags=re.M)[1:]
      for text in (r.stdout, r.stderr)
    ]
    for r in results
  ]
  assert all(len(part) == len(parts) for s in streams for part in s), (
    children.show(results)
  )
  # Of the last command, which fails, that of the process.
  statuses = [
    json.loads(re.findall(r'^\[.*\]$', r.stdout, re.M)[-1]) + [r.returncode]
    for r in results
  ]
  return _Two(
    workdir,
    scored,
    other,
    {
      name: [(out[i], error[i]) for out, error in streams]
      for i, name in enumerate(parts)
    },
    {name: [s[i] for s in statuses] for i, name in enumerate(parts)},
  )


@pytest.fixture(name='continued', scope='module')
def _continued(two, tmp_path_factory):
  """The checkpoints that both left; then one process alone ends the run."""
  steps = tiny_run.checkpoint_steps(two.workdir, _STOPPED)
  workdir = shutil.copytree(
    two.workdir, tmp_path_factory.mktemp('continued') / 'run'
  )
  with tiny_run.shared_programs():
    phases.run(tiny_run.make_setup(workdir), ('online', 'test'))
  return workdir, steps


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


def test_processes_share_tasks(two, finished_run):
  assert two.statuses['shared'] == [0, 0]
  assert 'tasks shared out over 2 of 4 devices' in two.said['shared'][0][0]
  ours, theirs = (
    tiny_run.results(path, ('collect', 'offline'))
    for path in (two.workdir, finished_run)
  )
  parts = 'collect/', 'offline/', 'dataset/', 'evaluations/collect'
  _assert_equal(_only(ours, *parts), _only(theirs, *parts))


def test_sigterm_in_one_process_stops_both(two):
  (main, main_errors), (other, other_errors) = two.said['stopped']
  assert two.statuses['stopped'] == [143, 143], main_errors + other_errors
  assert '1 of 2 devices in each of 2 processes' in main
  for errors in (main_errors, other_errors):
    assert 'the same command continues' in errors
    assert 'Traceback' not in errors
  # Only the main process reports.
  assert 'point_robot' not in other
  assert 'updates/s' not in other_errors


def test_one_process_continues(continued, finished_run):
  """It trains, and scores what all have left."""
  workdir, steps = continued
  assert steps and 0 < steps[-1] < 8
  stages = 'online/matched', 'online/oracle'
  ours, theirs = (
    tiny_run.results(path, stages) for path in (workdir, finished_run)
  )
  parts = *stages, 'evaluations'
  _assert_equal(_only(ours, *parts), _only(theirs, *parts))


def test_two_processes_score(two, finished_run):
  assert two.statuses['scored'] == [0, 0]
  (main, _), (other, _) = two.said['scored']
  assert 'self-collected context' in main
  assert 'self-collected context' not in other
  ours, theirs = (
    _only(tiny_run.results(path, ()), 'evaluations')
    for path in (two.scored, finished_run)
  )
  _assert_equal(ours, theirs)
  summary = json.loads((two.scored / 'report' / 'summary.json').read_text())
  assert summary['rows']['online_self_context']['seeds'] == 2
  record = json.loads((two.scored / 'run.json').read_text())
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
    assert len(files) == (2 if stage == _STOPPED else 1), stage


# Failures.


def _run(workdir, *flags):
  """The command of the tiny run, in two processes of two devices."""
  return children.run_processes(
    'experiments.run',
    [f'--workdir={workdir}', *_FLAGS, *flags],
    timeout=200,
    check=False,
  )


def _errors(text):
  """The messages in what a process said."""
  return [x for x in text.splitlines() if x.startswith('error: ')]


def test_a_failure_in_one_process_ends_both(two):
  """What the main process finds, it tells the other; neither hangs."""
  assert two.statuses['refused'] == [1, 1]
  (_, main), (_, other) = two.said['refused']
  assert 'Traceback' not in main + other
  (message,) = _errors(main)
  assert 'holds a run of another configuration (abc, this is' in message
  (message,) = _errors(other)
  assert message.startswith('error: the main process failed: ')
  assert sorted(os.listdir(two.refused)) == ['.lock', 'run.json']


def test_where_processes_do_not_agree_none_is_left_waiting(tmp_path):
  """The main process fails at something that only it does."""
  (tmp_path / 'collect' / 'metrics.jsonl').mkdir(parents=True)
  main, other = results = _run(tmp_path, '--phases=collect')
  assert main.returncode == 1, children.show(results)
  (message,) = _errors(main.stderr)
  assert 'metrics.jsonl: is a folder, not a file' in message
  # jax ends it as soon as the main process is gone; -9 is `run_processes`.
  assert other.returncode not in (0, -9), children.show(results)
