"""Whole runs: what they leave behind, and that nothing depends on luck."""

import contextlib
import io
import json
import math
import os
import pathlib
import pprint
import re
import signal
import subprocess
import sys
import time
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
import tiny_run

from offmeta.collection import phase as collect
from offmeta.data import dataset as datasets
from offmeta.phases import run as phases
from offmeta.training import evaluator

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_NUMBER = {'mean', 'low', 'high', 'seeds'}
_ROWS = {
  'random',
  'behaviour',
  'offline_self_context',
  'offline_offline_context',
  'online_self_context',
  'online_offline_context',
  'oracle',
  'train_offline_self_context',
  'train_online_self_context',
}
_PAIRED = {
  'online_minus_offline',
  'gap_closed',
  'shift_before',
  'shift_after',
  'offline_adaptation',
  'offline_adaptation_given',
  'online_adaptation',
  'online_adaptation_given',
}


def _command(workdir, *flags):
  return [
    sys.executable,
    '-m',
    'experiments.run',
    f'--workdir={workdir}',
    '--profile=smoke',
    *flags,
  ]


def _environment():
  path = os.pathsep.join(
    x for x in (str(_ROOT), os.environ.get('PYTHONPATH')) if x
  )
  return {**os.environ, 'PYTHONPATH': path}


# The command.


class _Run(NamedTuple):
  """A run that got a SIGTERM, and went on by the same command.

  Attributes:
    workdir: of the run.
    flags: of the command.
    first: its first line.
    stopped: how the process ended, with what it printed on stderr.
    steps: checkpoints of the stage that was stopped, before it went on.
    status: of the second time.
    printed: the second time, on stdout and stderr.
    loads: names of the datasets that were loaded the second time.
  """

  workdir: pathlib.Path
  flags: list[str]
  first: str
  stopped: tuple[int, str]
  steps: list[int]
  status: int
  printed: tuple[str, str]
  loads: list[str]


@pytest.fixture(name='commanded', scope='module')
def _commanded(tmp_path_factory):
  """The second time in this process, which has the programs."""
  folder = tmp_path_factory.mktemp('command')
  config = folder / 'tiny.py'
  config.write_text(
    'import ml_collections\n'
    'from offmeta.training import config as configs\n'
    f'CONFIG = {pprint.pformat(tiny_run.CONFIG)}\n\n\n'
    'def get_config():\n'
    '  config = configs.to_dict(configs.from_dict(CONFIG))\n'
    "  return ml_collections.ConfigDict({**config, 'profiles': "
    "{'smoke': {}}})\n"
  )
  workdir = folder / 'run'
  command = _command(
    workdir,
    f'--config={config}',
    '--checkpoint_every_s=900',
    '--keep_checkpoints',
  )
  with subprocess.Popen(
    command,
    cwd=_ROOT,
    env=_environment(),
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  ) as process:
    first = process.stdout.readline()  # it listens by then
    deadline = time.monotonic() + 120
    while (
      process.poll() is None
      and time.monotonic() < deadline
      and not (workdir / 'collect' / 'checkpoints').exists()
    ):
      time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=240)
  steps = tiny_run.checkpoint_steps(workdir, 'collect')
  out, err = io.StringIO(), io.StringIO()
  load, loads = datasets.load, []

  def counted(path, *args, **kw):
    loads.append(pathlib.Path(path).name)
    return load(path, *args, **kw)

  with (
    mock.patch.object(datasets, 'load', counted),
    tiny_run.shared_programs(),
    tiny_run.command() as same_command,
    contextlib.redirect_stdout(out),
    contextlib.redirect_stderr(err),
  ):
    status = same_command(
      workdir,
      (*tiny_run.PHASES, 'report'),
      checkpoint_every_s=900.0,
      argv=command[3:],
    )
  return _Run(
    workdir,
    command[3:],
    first,
    (process.returncode, error),
    steps,
    status,
    (out.getvalue(), err.getvalue()),
    loads,
  )


def test_sigterm_then_the_same_command(commanded, finished_run):
  status, error = commanded.stopped
  assert 'workdir' in commanded.first, error
  assert status == 143, error
  assert 'the same command continues' in error
  assert 'Traceback' not in error
  (step,) = commanded.steps
  assert 0 < step < 8
  out, error = commanded.printed
  assert commanded.status == 0, error
  assert 'online' in out and 'index.html' in out
  # Once each, and not before they are there.
  assert sorted(commanded.loads) == ['dataset', 'dataset_test']
  assert not tiny_run.differing(
    tiny_run.results(finished_run), tiny_run.results(commanded.workdir)
  )


@pytest.mark.parametrize(
  'flag, message',
  [
    ('--config.smac.kl_wieght=1.0', 'kl_wieght'),
    ('--config.chunk=many', 'many'),
  ],
)
def test_bad_flag_is_one_message(tmp_path, flag, message):
  done = subprocess.run(
    _command(tmp_path / 'run', flag),
    cwd=_ROOT,
    env=_environment(),
    text=True,
    capture_output=True,
    timeout=120,
  )
  assert done.returncode == 1
  lines = done.stderr.strip().splitlines()
  assert len(lines) == 1 and lines[0].startswith('error:'), done.stderr
  assert message in lines[0]
  assert not (tmp_path / 'run').exists()


# What it leaves.


def test_run_leaves_every_file(commanded):
  workdir = commanded.workdir
  for stage in tiny_run.STAGES:
    for name in (
      'metrics.jsonl',
      'done.json',
      'tensorboard',
      'checkpoints',
      'final/0/record.json',
    ):
      assert (workdir / stage / name).exists(), f'{stage}/{name}'
  points = {p.name for p in (workdir / 'evaluations').iterdir()}
  assert points == {
    'collect.npz',
    'offline.npz',
    'online-matched.npz',
    'online-oracle.npz',
  }
  assert {p.name for p in (workdir / 'report').iterdir()} >= {
    'summary.json',
    'table.txt',
    'table.csv',
    'table.md',
    'index.html',
  }
  timing = json.loads((workdir / 'timing.json').read_text())
  assert timing.keys() == {*tiny_run.STAGES, 'test'}
  assert min(timing.values()) > 0


def test_summary_has_the_documented_schema(commanded):
  workdir = commanded.workdir
  summary = json.loads((workdir / 'report' / 'summary.json').read_text())
  assert summary.keys() >= {
    'rows',
    'paired',
    'command',
    'wall_time_s',
    'config_hash',
  }
  assert summary['rows'].keys() >= _ROWS
  assert summary['paired'].keys() == _PAIRED
  for name in _ROWS | {'behaviour_data'}:
    row = summary['rows'][name]
    assert row.keys() >= _NUMBER, name
    assert math.isfinite(row['mean']), name
    few = name in ('behaviour', 'behaviour_data')  # one behaviour policy
    assert row['seeds'] == (1 if few else 2), name
    if not few:
      assert row['low'] <= row['mean'] <= row['high'], name
  for name in _PAIRED - {'gap_closed'}:  # a gap of two seeds may be undefined
    entry = summary['paired'][name]
    assert entry.keys() >= _NUMBER, name
    assert math.isfinite(entry['mean']) and entry['seeds'] == 2, name
  rows = summary['rows']
  assert summary['paired']['online_minus_offline']['mean'] == pytest.approx(
    rows['online_self_context']['mean'] - rows['offline_self_context']['mean']
  )
  assert summary['command'] == 'python -m experiments.run ' + ' '.join(
    commanded.flags
  )
  assert summary['wall_time_s'] > 0
  assert re.fullmatch('[0-9a-f]{12}', summary['config_hash'])


def test_page_is_self_contained(commanded):
  workdir = commanded.workdir
  summary = json.loads((workdir / 'report' / 'summary.json').read_text())
  page = (workdir / 'report' / 'index.html').read_text()
  assert page.count('data:image/png;base64,') >= 3
  assert summary['config_hash'] in page
  links = re.findall(r'(?:src|href)\s*=\s*["\']([^"\']*)', page)
  outside = [x[:60] for x in links if not x.startswith(('data:', '#'))]
  assert not outside
  assert '@import' not in page and 'url(' not in page


# Determinism.


@pytest.mark.parametrize(
  'changes, stages',
  [
    ({'seed': 1}, ('offline',)),
    ({'collect': {'seed': 1}}, ('collect', 'offline')),
  ],
  ids=['seed', 'collect.seed'],
)
def test_another_seed_gives_others(finished_run, tmp_path, changes, stages):
  if 'seed' in changes:  # same data
    changes = {**changes, 'collect': {'dataset': str(finished_run / 'dataset')}}
  setup = tiny_run.make_setup(tmp_path, changes)

  class NoEvaluator:
    curve = staticmethod(lambda state, data: {})
    full = staticmethod(
      lambda state, data: (
        {'test_self_returns': np.zeros(1), 'diverged': np.zeros(1)},
        None,
      )
    )

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(collect, '_score_references', lambda *args: None)
    patch.setattr(evaluator, 'Evaluator', lambda *args: NoEvaluator)
    collect.collect(setup)
    phases.offline(setup, NoEvaluator)
  for stage in stages:
    ours = tiny_run.saved(tmp_path / stage / 'final' / '0')
    theirs = tiny_run.saved(finished_run / stage / 'final' / '0')
    different = tiny_run.differing(ours, theirs)
    assert any('params.actor' in name for name in different), different
  if 'seed' not in changes:
    assert tiny_run.differing(
      dict(enumerate_dataset(tmp_path)), dict(enumerate_dataset(finished_run))
    )


def test_a_seed_alone_is_that_seed_among_others(finished_run, tmp_path):
  """Seed 1 as a run of its own, which shares out tasks instead of seeds.

  Other programs round differently, and Adam makes steps of what it is given:
  parameters agree to 1e-3 absolute after 10 updates at a rate of 3e-4 and two
  rounds of episodes, returns to 1e-2 of about -20.
  """
  setup = tiny_run.make_setup(
    tmp_path,
    {
      'first_seed': 1,
      'num_seeds': 1,
      'collect': {'dataset': str(finished_run / 'dataset')},
    },
    runtime={'share': 'tasks', 'checkpoint_every_s': 900.0},
  )
  assert setup.seeds.layout.axis_name == 'task'
  scorer = phases.make_evaluator(setup)
  phases.offline(setup, scorer)
  phases.online(setup, 'matched', scorer)
  phases.test(setup, scorer)
  stages = ('offline', 'online/matched')
  alone = tiny_run.results(tmp_path, stages)
  among = tiny_run.results(finished_run, stages)
  compared = 0
  for name, value in alone.items():
    if isinstance(value, np.ndarray) and 'final' in name:
      np.testing.assert_allclose(
        value, among[name][1:], rtol=1e-3, atol=1e-3, err_msg=name
      )
      compared += 1
    elif 'self_returns' in name and 'behaviour' not in name:
      np.testing.assert_allclose(
        value, among[name][1:], rtol=1e-3, atol=1e-2, err_msg=name
      )
      compared += 1
  assert compared > 50


def enumerate_dataset(workdir):
  """(name, bytes) of every array of a dataset."""
  for path in (workdir / 'dataset').glob('*.npy'):
    yield path.name, path.read_bytes()
