"""The comparison of algorithms: one dataset, resuming, failures, the table."""

import dataclasses
import json
import os
import shutil
from unittest import mock

import numpy as np
import pytest
import tiny_run

from experiments import compare
from experiments.configs import base, smac_families
from experiments.runs import cells, launch
from offmeta.algorithms import ALGORITHMS
from offmeta.collection import history, phase as collect
from offmeta.data.meta_dataset import MetaDataset
from offmeta.phases import run as phases
from offmeta.results import plots
from offmeta.training import (
  evaluator as evaluators,
  stopping,
  workdir_lock,
)
from offmeta.training.config import ConfigError, ExperimentConfig
from offmeta.types import Transition

pytestmark = pytest.mark.usefixtures('tiny')

_CLONING = """
from examples import cloning
from experiments.configs import base
from offmeta import algorithms

if 'cloning' not in algorithms.ALGORITHMS:
  algorithms.register('cloning', cloning.Config, cloning.make)

ABLATIONS = {
    'no_kl': {'description': 'no bottleneck', 'cloning': {'kl_weight': 0.0}},
    'first_data': {'collect': {'log_slice': 'first'}},
}
get_config = base.config_of('cloning', {'smoke': {'cloning': {
    'latent_size': 2, 'hidden': (8,), 'num_updates': 4, 'num_tasks': 2,
    'query_size': 4, 'context_size': 8}}})
"""
# Of the learner's own context, by what tells runs apart.
_SCORES = {
  ('cloning', 0.003): -3.0,
  ('cloning', 0.0): -4.0,
  ('smac', 0.1): -5.0,
}


class _Evaluator:
  """Scores that are known; how learners are scored is tested elsewhere."""

  def __init__(self, setup, *args):
    self._setup = setup

  def curve(self, state, data):
    return {}

  def full(self, state, data):
    config = self._setup.config
    key = config.algorithm, config.settings.kl_weight
    returns = np.full((2, 2, 2, 3), _SCORES[key])
    returns[..., 0] = -20.0
    returns[1] += 1.0
    return {
      'test_self_returns': returns,
      'test_offline_returns': returns[..., 1:] + 0.5,
    }, None


def _log(tasks, seed):
  """40 random rows of each task."""
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.uniform(-1, 1, shape).astype(np.float32)
  number = len(tasks['goal'])
  rows = (number, 40)
  return MetaDataset(
    Transition(
      draw(*rows, 2),
      draw(*rows, 2),
      draw(*rows),
      np.ones(rows, np.float32),
      draw(*rows, 2),
      {
        'features': draw(*rows, 2),
        'time': np.tile(np.arange(20.0, dtype=np.float32), 2)[None].repeat(
          number, 0
        ),
        'diverged': np.zeros(rows, np.float32),
      },
    ),
    np.full(number, 40, np.int32),
    None,
    None,
    {'goal': np.asarray(tasks['goal'])},
    np.full(number, -7.0, np.float32),
  )


def _make_log(setup):
  _made.append(setup.workdir.name)
  return history.Logs(
    _log(setup.train_tasks, 0),
    _log(setup.test_tasks, 1),
    'random numbers',
    'random numbers',
    {},
  )


_LOGS = collect.SOURCES['pearl']._replace(make=_make_log)
_made: list[str] = []


@pytest.fixture(name='tiny', scope='module')
def _tiny():
  """Families, data and scores that cost nothing."""
  before = dict(ALGORITHMS)
  parts = {
    key: value
    for key, value in tiny_run.CONFIG.items()
    if key not in ('online', 'smac')
  }
  with (
    mock.patch.dict(base.FAMILIES, {'point_robot': (parts, {'smoke': {}})}),
    mock.patch.dict(
      smac_families.FAMILIES,
      {'point_robot': ({'smac': tiny_run.CONFIG['smac']}, {})},
    ),
    mock.patch.dict(collect.SOURCES, {'pearl': _LOGS}),
    mock.patch.object(evaluators, 'Evaluator', _Evaluator),
    mock.patch.object(phases, '_paths', lambda *args: {}),
    mock.patch.object(plots, 'draw_all', lambda *args: {}),
  ):
    yield
  ALGORITHMS.clear()
  ALGORITHMS.update(before)


def _options(folder, *algorithms, **kw):
  (folder / 'cloning.py').write_text(_CLONING)
  files = {'cloning': str(folder / 'cloning.py')}
  return compare.Options(
    **{
      'profile': 'smoke',
      'workdir': str(folder / 'runs'),
      'algorithms': tuple(files.get(name, name) for name in algorithms),
      'runtime': {'quiet': True, 'max_devices': 1},
      **kw,
    }
  )


def _run(options, stop=None):
  return compare.run(options, 'the command', stop or stopping.StopRequest())


@pytest.fixture(name='finished', scope='module')
def _finished(tmp_path_factory, tiny):
  """(folder, table) of an algorithm of one's own, an ablation, SMAC."""
  folder = tmp_path_factory.mktemp('compare')
  _made.clear()
  assert _run(_options(folder, 'cloning', 'smac', ablations=('no_kl',))) == 0
  assert _made == ['data']
  return folder, _table(folder)


@pytest.fixture(name='copied')
def _copied(finished, tmp_path):
  """A copy of its workdirs at another path: nothing there counts as finished
  for the command, but the table can be made."""
  shutil.copytree(finished[0] / 'runs', tmp_path / 'runs')
  return tmp_path


def _table(folder):
  return json.loads((folder / 'runs/comparison/comparison.json').read_text())


def _record(folder, name):
  return json.loads((folder / 'runs' / name / 'run.json').read_text())


def test_all_run_on_the_same_data(finished):
  folder, _ = finished
  data = folder / 'runs' / 'data'
  for name in ('cloning', 'cloning+no_kl', 'smac'):
    run = _record(folder, name)
    assert run['config']['collect']['dataset'] == str(data / 'dataset')
    assert run['config']['collect']['test_dataset'] == str(
      data / 'dataset_test'
    )
    assert run['command'] == 'the command'
    assert not (folder / 'runs' / name / 'dataset').exists()
    assert (folder / 'runs' / name / 'offline' / 'done.json').exists()
  assert _record(folder, 'cloning+no_kl')['config']['cloning'] == {
    **_record(folder, 'cloning')['config']['cloning'],
    'kl_weight': 0.0,
  }


def test_the_table(finished):
  folder, table = finished
  rows = {row['name']: row for row in table['rows']}
  assert list(rows) == ['cloning', 'cloning/no_kl', 'smac']
  for name, own in (('cloning', -3), ('cloning/no_kl', -4), ('smac', -5)):
    scores = rows[name]['scores']
    assert scores['self_context']['scores'] == [own, own + 1], name
    assert scores['given_context']['scores'] == [own + 0.5, own + 1.5]
    assert scores['unadapted']['scores'] == [-20, -19]
    assert rows[name]['training_s'] > 0
  assert rows['cloning/no_kl']['description'] == 'no bottleneck'
  assert table['command'] == 'the command' and table['num_seeds'] == 2
  assert not table['notes'] and not table['failed']
  assert table['references']['behaviour_data']['mean'] == -7.0
  assert table['references']['random']['seeds'] == 2
  run = _record(folder, 'smac')
  assert table['runs']['smac']['config_hash'] == run['config_hash']


def test_finished_runs_are_left_alone(finished, capsys):
  folder, before = finished
  with mock.patch.object(
    phases, 'offline', lambda *a: pytest.fail('trained again')
  ):
    assert _run(_options(folder, 'smac', 'cloning')) == 0
  out = capsys.readouterr().out
  assert out.count('finished before') == 2
  # In the order asked for; what else is there stays in the table.
  after = _table(folder)
  assert [row['name'] for row in after['rows']] == [
    'smac',
    'cloning',
    'cloning/no_kl',
  ]
  assert after['runs'] == before['runs']


def test_only_the_table(copied, capsys):
  shutil.rmtree(copied / 'runs' / 'comparison')
  with mock.patch.object(launch, 'execute', pytest.fail):
    assert _run(_options(copied, 'cloning', 'nowhere', only_table=True)) == 0
  assert '-2.50 [-8.85, 3.85]' in capsys.readouterr().out  # t(0.975, 1) / 2
  assert {path.name for path in (copied / 'runs/comparison').iterdir()} == {
    'comparison.json',
    'comparison.png',
    'table.csv',
    'table.md',
    'table.txt',
  }


def test_stopped_and_continued(tmp_path):
  stop = tiny_run.StopAt(tmp_path / 'runs/cloning/offline', 2)
  options = _options(
    tmp_path,
    'cloning',
    runtime={'quiet': True, 'max_devices': 1, 'checkpoint_every_s': -1.0},
  )
  status, message = launch.attempt(lambda: _run(options, stop))
  assert status == 143 and 'the same command continues' in message
  assert not (tmp_path / 'runs/comparison').exists()
  assert tiny_run.checkpoint_steps(tmp_path / 'runs/cloning', 'offline') == [2]
  assert _run(options) == 0
  steps = [
    row['step']
    for row in tiny_run.metrics(tmp_path / 'runs/cloning/offline/metrics.jsonl')
  ]
  assert steps == [2, 4]


def test_a_failure_is_one_line_and_the_others_run(tmp_path, capsys):
  broken = tmp_path / 'broken.py'
  broken.write_text(
    _CLONING.replace("'no_kl'", "'x'")
    + (
      'get_config = base.config_of("cloning", {"smoke": {"cloning": {'
      '"hidden": ("wide",), "num_updates": 4}}})\n'
    )
  )
  (tmp_path / 'wrong.py').write_text(
    'from experiments.configs import base\n'
    'get_config = base.config_of("smac", {"all": {"smac": {"rate": 1}}})\n'
  )
  options = _options(
    tmp_path, str(tmp_path / 'wrong.py'), str(broken), 'cloning'
  )
  assert _run(options) == 1
  lines = [
    line
    for line in capsys.readouterr().err.splitlines()
    if line.startswith('failed: ')
  ]
  assert len(lines) == 2
  assert 'wrong: config file' in lines[0] and 'config.smac.rate' in lines[0]
  assert lines[1].startswith('failed: broken: ')
  assert 'error.txt' in lines[1]
  assert 'Traceback' in (tmp_path / 'runs/broken/error.txt').read_text()
  table = _table(tmp_path)
  assert [row['name'] for row in table['rows']] == ['cloning']
  assert set(table['failed']) == {'wrong', 'broken'}


def test_files_with_mistakes_cost_only_themselves(tmp_path):
  texts = {
    'a': ('nothing', 'a.py, line 1: NameError: '),
    'b': ('1 / 0', 'b.py, line 1: ZeroDivisionError: '),
    'c': ('ABLATIONS = [1]', 'c.py: ABLATIONS must map names'),
    'd': ('ABLATIONS = {"x": 3}', 'd.py: ABLATIONS must map names'),
    'e': ('get_config = lambda family: {}[family]', 'e.py, line 1: KeyError: '),
    'f': (_CLONING.replace("'no_kl': {'desc", "'no_kl': 3, 'x': {'desc"), ''),
  }
  for name, (text, _) in texts.items():
    (tmp_path / f'{name}.py').write_text(text)
  files = [str(tmp_path / f'{name}.py') for name in texts]
  options = dataclasses.replace(_options(tmp_path), algorithms=tuple(files))
  chosen, failed = compare._choose(options)
  experiments = compare._resolve(options, chosen, {}, failed)
  assert not experiments and list(failed) == ['a', 'b', 'c', 'd', 'f', 'e']
  for name, (_, message) in texts.items():
    assert failed[name].startswith(f'config file {tmp_path}/{message}'), name


@pytest.mark.parametrize('change', [3, None, [1], 'x', {'options': 3}])
@pytest.mark.parametrize('group', ['collect', 'cloning', 'family', 'no_group'])
def test_ablations_of_something_else(tmp_path, group, change):
  options = _options(tmp_path, 'cloning')
  file, failed = options.algorithms[0], {}
  chosen = [compare.Chosen('cloning', file, {'x': {group: change}})]
  assert not compare._resolve(options, chosen, {}, failed)
  assert 'config' in failed['cloning/x'] and group in failed['cloning/x']


def test_an_ablation_of_the_data_makes_its_own(tmp_path):
  _made.clear()
  options = _options(
    tmp_path, 'cloning', ablations=('cloning/first_data',), seeds=2
  )
  assert _run(options) == 0
  assert _made == ['data', 'cloning+first_data']
  assert (tmp_path / 'runs/cloning+first_data/dataset').exists()
  (note,) = [note for note in _table(tmp_path)['notes'] if '.dataset' in note]
  assert note.startswith(
    'cloning/first_data: collect.dataset is not set, but /'
  )


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'ablations': ('magic',)}, "--ablations: no 'magic'; known: cloning/fir"),
    ({'family': 'moon'}, "--family: no config for family 'moon'"),
    ({'profile': 'huge'}, "no profile 'huge'"),
    ({'algorithms': ()}, '--algorithms: empty; known: smac, macaw'),
    ({'algorithms': ('smac', 'typo')}, "--algorithms: no 'typo'; known: smac"),
    ({'algorithms': ('/no/file.py',)}, "--algorithms: no '/no/file.py'"),
    ({'seeds': -1}, '--seeds: must be at least 1'),
    ({'seeds': 10**12}, '--algorithms: none can be run: .*num_seeds: must be'),
  ],
)
def test_bad_options(tmp_path, changes, message):
  """Refused before anything is made."""
  with pytest.raises(ConfigError, match=message):
    _run(_options(tmp_path, 'cloning', **changes))
  assert not (tmp_path / 'runs').exists()


def test_other_settings_need_another_workdir(finished, capsys):
  assert _run(_options(finished[0], 'cloning', seeds=3)) == 1
  (line,) = capsys.readouterr().err.splitlines()
  assert 'holds a run of another configuration' in line
  assert 'num_seeds: 2 -> 3' in line


def test_one_comparison_at_a_time(tmp_path):
  options = _options(tmp_path, 'cloning')
  with (
    workdir_lock.hold(tmp_path / 'runs'),
    mock.patch.object(launch, 'execute', pytest.fail),
  ):
    status, message = launch.attempt(lambda: _run(options))
    assert status == 1
    assert message.startswith(f'{tmp_path / "runs"}: process {os.getpid()} on')
    # The table of what is there may be looked at meanwhile.
    options = _options(tmp_path, 'cloning', only_table=True)
    with pytest.raises(ConfigError, match='no run has been tested yet'):
      _run(options)


@pytest.mark.parametrize(
  'text', ['[1]', '3', 'null', '[' * 5000, '{"config_hash": ["a"]}', '{']
)
def test_a_damaged_summary_is_none(tmp_path, text):
  (tmp_path / 'report').mkdir()
  (tmp_path / 'report' / 'summary.json').write_text(text)
  cell = cells.Cell('x', '', ExperimentConfig())
  assert not cells.is_finished(cell, tmp_path)


def test_an_algorithm_named_twice(tmp_path):
  with pytest.raises(ConfigError, match='cloning is named twice'):
    _run(_options(tmp_path, 'cloning', 'cloning'))


def test_nothing_to_show(tmp_path):
  with pytest.raises(ConfigError, match='no run has been tested yet'):
    _run(_options(tmp_path, 'cloning', only_table=True))
