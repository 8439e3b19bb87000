"""The table of reference returns: its schema, resuming and messages."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from unittest import mock

import numpy as np
import pytest

from experiments import references
from offmeta.training import stopping
from offmeta.training.config import ConfigError
from offmeta.training.metrics import DivergenceError, MetricsFileError

_ROOT = pathlib.Path(references.__file__).parents[1]


def _options(folder, **kw):
  return references.Options(
    **{
      'families': ('point_robot', 'humanoid_dir'),
      'profile': 'smoke',
      'out': str(folder / 'references.json'),
      'workdir': str(folder / 'runs'),
      **kw,
    }
  )


def _run(options):
  return references.run(options, 'the command', stopping.StopRequest())


@pytest.fixture(name='finished', scope='module')
def _finished(tmp_path_factory):
  """(folder, results) of a smoke run."""
  folder = tmp_path_factory.mktemp('references')
  return folder, _run(_options(folder))


def test_schema(finished):
  folder, results = finished
  written = json.loads((folder / 'references.json').read_text())
  assert written == json.loads(json.dumps(results, default=list))
  assert written['families']['point_robot']['command'] == 'the command'
  assert (written['profile'], written['seed']) == ('smoke', 0)
  entry = written['families']['point_robot']
  assert entry['task_index'] == [0, 16, 31]  # of 32: first, middle, last
  assert np.shape(entry['tasks']['goal']) == (3, 2)
  assert {'machine', 'versions', 'settings', 'options', 'config_hash'} <= set(
    entry
  )
  assert entry['env_steps'] == [80] * 3 and entry['updates'] == [6] * 3
  assert entry['wall_s'] > 0
  assert set(entry['diverged'].values()) == {0.0}
  random, final = entry['random'], entry['sac']['final']
  for part in (random, final):
    assert part['episodes_per_task'] == 20 and len(part['tasks']) == 3
    assert part['mean'] == pytest.approx(
      np.mean([task['mean'] for task in part['tasks']])
    )
  # 20 steps at about distance 1; chance moves the uniform policy alone.
  for task in random['tasks']:
    assert task['low'] < task['mean'] < task['high']
    assert -26 < task['mean'] < -14
  for task in final['tasks']:
    assert task['high'] - task['low'] < 1e-4


def test_best_is_of_the_curve(finished):
  sac = finished[1]['families']['point_robot']['sac']
  curve, best = sac['curve'], sac['best_of_curve']
  assert curve['env_steps'] == [[40] * 3, [60] * 3, [80] * 3]
  np.testing.assert_allclose(
    best['tasks'], np.max(curve['returns'], axis=0), atol=1e-3
  )
  assert all(step in (40, 60, 80) for step in best['env_steps'])
  # Deterministic policies and starts: the last evaluation is the final one.
  np.testing.assert_allclose(
    [task['mean'] for task in sac['final']['tasks']],
    curve['returns'][-1],
    atol=2e-3,
  )


def test_accelerator_families_are_skipped_with_their_command(finished):
  results = finished[1]
  assert 'humanoid_dir' not in results['families']
  assert results['skipped']['humanoid_dir']['command'] == (
    'python -m experiments.references --profile=paper --families=humanoid_dir'
  )


def test_finished_families_are_left_alone(finished):
  folder, before = finished
  with mock.patch.object(references, 'measure', side_effect=AssertionError):
    again = _run(_options(folder))
  assert again == json.loads(json.dumps(before, default=list))
  assert 'point_robot' in references.table(again)


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'seed': 1}, "is of profile 'smoke' and seed 0; give another --out"),
    ({'env_steps': 100}, "has 'point_robot' with other settings"),
  ],
)
def test_other_settings_need_another_file(finished, changes, message):
  with pytest.raises(ConfigError, match=message):
    _run(_options(finished[0], **changes))


_SAME = '"profile": "smoke", "seed": 0, "skipped": {}, "failed": {}'


@pytest.mark.parametrize(
  'text',
  [
    '[1]',
    '[' * 5000,
    '{"profile": "smoke", "seed": 0}',
    f'{{{_SAME}, "families": []}}',
    f'{{{_SAME}, "families": {{"point_robot": 3}}}}',
    f'{{{_SAME}, "families": {{"point_robot": {{}}}}}}',
    f'{{{_SAME}, "families": {{"x": {{"config_hash": "", "options": {{}}}}}}}}',
  ],
)
def test_another_file_is_not_overwritten(tmp_path, text):
  path = tmp_path / 'references.json'
  path.write_text(text)
  with pytest.raises(ConfigError, match='references.json: not a file of refer'):
    _run(_options(tmp_path))
  assert path.read_text() == text


def test_damaged_logs_give_one_message(tmp_path):
  """What `measure` reads of the training."""
  setup = mock.Mock(workdir=tmp_path)
  (tmp_path / 'specialists').mkdir()
  os.mkfifo(tmp_path / 'specialists' / 'metrics.jsonl')
  with pytest.raises(MetricsFileError, match='metrics.jsonl: cannot be read'):
    references.single_task.curves(setup)


def test_a_failure_is_noted_and_the_others_go_on(tmp_path):

  def measure(setup):
    if setup.config.family == 'point_robot':
      raise DivergenceError('critic is NaN')
    return {'env_steps': [1]}

  families = ('point_robot', 'sparse_point_robot')
  with (
    mock.patch.object(references, 'measure', measure),
    mock.patch.object(references, 'table'),
  ):
    results = _run(_options(tmp_path, families=families))
    assert results['failed'] == {'point_robot': 'critic is NaN'}
    assert list(results['families']) == ['sparse_point_robot']
  with (
    mock.patch.object(references, 'measure', lambda setup: {}),
    mock.patch.object(references, 'table'),
  ):
    results = _run(_options(tmp_path, families=families))  # tried again
  assert not results['failed'] and set(results['families']) == set(families)


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'families': ('walker',)}, 'unknown walker; known: .*point_robot'),
    ({'env_steps': -1}, 'env_steps'),
    ({'env_steps': 40}, 'env_steps 40 leave nothing'),
    ({'num_tasks': 0}, '--num_tasks: must be at least 1, not 0'),
    ({'env_steps': -1}, '--env_steps: must be at least 0, not -1'),
    ({'seed': 2**32}, '--seed: must be at most 4294967295'),
  ],
)
def test_bad_options(tmp_path, changes, message):
  with pytest.raises(ConfigError, match=message):
    _run(_options(tmp_path, **{'families': ('point_robot',), **changes}))


def test_budgets():
  """'cpu' and 'paper' update once per step; 'paper' is SAC as published."""
  spec = references.envs.make('point_robot').spec._replace(episode_length=200)
  for profile in ('cpu', 'paper'):
    for terminates in (False, True):
      config = references.budget(
        spec._replace(terminates=terminates),
        references.Options(profile=profile),
      )
      assert config.sac.num_updates == config.steps_per_iteration
      assert config.steps_per_iteration >= (1000 if terminates else 200)
  assert config.sac == references.sac.Config()


def test_the_command_honours_sigterm(tmp_path):
  command = [
    sys.executable,
    '-m',
    'experiments.references',
    '--families=point_robot',
    '--profile=smoke',
    '--env_steps=100000',
    '--num_tasks=1',
    f'--out={tmp_path / "r.json"}',
    f'--workdir={tmp_path / "runs"}',
  ]
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu'}
  metrics = tmp_path / 'runs/point_robot/specialists/metrics.jsonl'
  process = subprocess.Popen(
    command,
    cwd=_ROOT,
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  try:
    assert process.stdout.readline().startswith('point_robot')
    while not (metrics.exists() and metrics.stat().st_size):
      assert process.poll() is None, process.stderr.read()
      time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
  finally:
    process.kill()
  assert 'the same command continues' in process.stderr.read()
  assert not (tmp_path / 'r.json').exists()
  saved = metrics.parent / 'checkpoints'
  assert any(path.name.isdecimal() for path in saved.iterdir())


def test_bad_flags_give_one_message(tmp_path):
  done = subprocess.run(
    [
      sys.executable,
      '-m',
      'experiments.references',
      '--families=walker',
      f'--out={tmp_path / "r.json"}',
    ],
    cwd=_ROOT,
    capture_output=True,
    text=True,
    env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
    timeout=120,
  )
  assert done.returncode == 1
  assert done.stderr.strip().startswith('error: --families: unknown walker')
