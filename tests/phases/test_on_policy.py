"""Runs from rollouts alone: no data, resumed bit for bit, seeds and devices."""

import json

import helpers
import numpy as np
import pytest
import tiny_run

from offmeta import algorithms
from offmeta.algorithms import ppo
from offmeta.data.on_policy import Fresh
from offmeta.phases import budget, run as phases
from offmeta.results import report
from offmeta.training import config as configs, setup as setups, stopping
from offmeta.types import Rollouts

# Episodes of five steps straddle iterations of six. Four iterations.
_CONFIG = {
  'algorithm': 'ppo',
  'num_seeds': 2,
  'family': {
    'options': {'episode_length': 5},
    'num_train': 1,
    'num_test': 1,
  },
  'ppo': {
    'actor_hidden': (4,),
    'value_hidden': (4,),
    'actor_lr': 0.01,
    'num_envs': 4,
    'num_steps': 6,
    'num_epochs': 2,
    'num_minibatches': 2,
  },
  'online': {
    'iterations': 4,
    'headline': 'ppo',
    'oracle': '',
    'variants': {'ppo': {'description': 'from rollouts'}},
  },
  'evaluation': {'num_repeats': 1, 'num_steps': 5, 'num_train_tasks': 1},
}


def _setup(workdir, changes={}, stop=None, **runtime):
  config = configs.from_dict(changes, configs.from_dict(_CONFIG))
  configs.validate(config)
  options = {'checkpoint_every_s': -1.0, 'keep_checkpoints': True} | runtime
  return setups.make_setup(
    config, workdir, stop, setups.Runtime(quiet=True, **options)
  )


class _NoEvaluator:
  """Where scores do not matter."""

  curve = staticmethod(lambda state, replay: {})


def _train(workdir, changes={}, stop=None, **runtime):
  """All that training leaves: arrays of the last checkpoint, metric rows."""
  setup = _setup(workdir, changes, stop, **runtime)
  phases.online(setup, 'ppo', _NoEvaluator())
  return (
    tiny_run.last_progress(workdir, 'online/ppo'),
    tiny_run.metrics(workdir / 'online/ppo/metrics.jsonl'),
  )


@pytest.fixture(name='alone', scope='module')
def _alone(tmp_path_factory):
  """One uninterrupted training on one device."""
  return _train(tmp_path_factory.mktemp('ppo'), max_devices=1)


def test_a_run_without_data(tmp_path):
  """Every phase; nothing is logged, and the report has what was trained."""
  setup = _setup(tmp_path)
  planned = budget.check(setup, phases.PHASES)
  assert any('2 seeds x 4 environments x 6 steps' in line for line in planned)
  phases.run(setup, phases.PHASES[:-1])
  found = {p.name for p in (tmp_path / 'evaluations').iterdir()}
  assert found == {'collect.npz', 'online-ppo.npz'}
  assert not (tmp_path / 'dataset').exists()
  assert not (tmp_path / 'offline').exists()
  scores = dict(np.load(tmp_path / 'evaluations/online-ppo.npz'))
  assert not any('offline' in name for name in scores)
  rows = tiny_run.metrics(tmp_path / 'online/ppo/metrics.jsonl')
  assert [row['env_steps'] for row in rows] == [24, 48, 72, 96]
  assert all(row['values']['gather/diverged'] == [0.0] * 2 for row in rows)
  # What the commands write before the phases.
  online = setup.config.online
  about = {
    'num_seeds': 2,
    'headline_variant': online.headline,
    'oracle_variant': online.oracle,
    'variants': {'ppo': 'from rollouts'},
    'algorithm': 'ppo',
  }
  (tmp_path / 'run.json').write_text(json.dumps(about))
  summary = report.build(tmp_path)
  assert {'random', 'online_self_context', 'train_online_self_context'} <= set(
    summary['rows']
  )
  assert not any('offline' in name for name in summary['rows'])
  pictures = {path.stem for path in (tmp_path / 'report').glob('*.png')}
  assert {'training', 'episodes', 'trajectories'} <= pictures
  page = (tmp_path / 'report/index.html').read_text()
  assert 'not been tested yet' not in page


def test_resumed_equals_uninterrupted(alone, tmp_path):
  """Environments in the middle of their episodes are in the checkpoint."""
  stop = tiny_run.StopAt(tmp_path / 'online/ppo', 2)
  with pytest.raises(stopping.Interrupted):
    _train(tmp_path, stop=stop, max_devices=1)
  saved = tiny_run.last_progress(tmp_path, 'online/ppo')
  time = [v for k, v in saved.items() if k.endswith('actors.time')]
  assert len(time) == 1 and np.all(time[0] == 2)  # 12 steps, episodes of 5
  arrays, rows = _train(tmp_path, max_devices=1)
  helpers.assert_same(arrays, alone[0])
  assert rows == alone[1]


@pytest.mark.parametrize(
  'runtime',
  [
    dict(max_devices=2),
    dict(max_devices=2, share='tasks'),
    dict(replay='host'),
  ],
  ids=['seeds', 'tasks', 'host'],
)
def test_devices_share_seeds_or_environments(alone, tmp_path, runtime):
  arrays, _ = _train(tmp_path, **runtime)
  _assert_close(arrays, alone[0])


def test_a_seed_alone_is_that_seed_among_others(alone, tmp_path):
  arrays, _ = _train(tmp_path, {'num_seeds': 1, 'first_seed': 1}, max_devices=1)
  _assert_close(
    arrays, {k: v[1:] if v.ndim else v for k, v in alone[0].items()}
  )


def _assert_close(arrays, expected):
  assert arrays.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_allclose(
      np.asarray(arrays[name], float),
      np.asarray(value, float),
      rtol=1e-4,
      atol=1e-5,
      err_msg=name,
    )


@pytest.mark.parametrize(
  'changes, message',
  [
    (
      {'family': {'num_train': 3}},
      '4 environments do not spread evenly over 3 training tasks',
    ),
    (
      {'algorithm': 'focal', 'online': {'variants': {}}},
      'num_train: 1 training task, but focal compares tasks .* at least 2',
    ),
  ],
)
def test_tasks_that_do_not_do(tmp_path, changes, message):
  values = configs.to_dict(configs.from_dict(_CONFIG))
  if 'algorithm' in changes:
    values.pop('ppo')
    changes = {**changes, 'online': {**values['online'], 'variants': {}}}
  config = configs.from_dict({**values, **changes})
  with pytest.raises(configs.ConfigError, match=message):
    setups.make_setup(config, tmp_path)


@pytest.mark.parametrize(
  'changes, message',
  [
    (dict(gather=None), "loop 'online' is fed by rollouts, but the loop"),
    (dict(name='offline'), "loops of the phase 'online' whose stages are all"),
    (dict(gather=Rollouts(8, 6)), 'as many tasks as there are environments'),
  ],
  ids=['none', 'phase', 'number'],
)
def test_loops_that_do_not_fit_their_stages(
  tmp_path, monkeypatch, changes, message
):
  def make(problem, config, axis_name=None):
    made = ppo.make(problem, config, axis_name)
    return made._replace(loops=(made.loops[0]._replace(**changes),))

  entry = algorithms.ALGORITHMS['ppo']._replace(make=make)
  monkeypatch.setitem(algorithms.ALGORITHMS, 'ppo', entry)
  with pytest.raises(configs.ConfigError, match=message):
    _setup(tmp_path)


def test_a_dataset_is_not_read(tmp_path, capsys):
  setup = _setup(tmp_path, {'collect': {'dataset': 'nowhere'}})
  phases.run(setup, ('collect',))
  assert 'ppo has no use for logged data; nowhere is' in capsys.readouterr().out


def test_rollouts_have_no_annotations():
  with pytest.raises(ValueError, match='annotations are for logged data'):
    Fresh((), (), (), ()).with_extras({'x': np.ones(1)})
