"""Logged data of training and held-out tasks: PEARL, scripts, the user's."""

import dataclasses
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from offmeta import envs, playback as restore, rollout
from offmeta.collection import history, phase as collect
from offmeta.data import dataset as datasets, slices
from offmeta.data.meta_dataset import MetaDataset
from offmeta.envs import point_robot
from offmeta.phases import run as phases
from offmeta.results import records
from offmeta.testing import probes
from offmeta.training.config import ConfigError
from offmeta.training.setup import PhaseError
from offmeta.types import Transition

_EPISODES = 3


class _Scripted(point_robot.PointRobot):
  """Knows its task: walks straight to the goal."""

  name = 'scripted'

  def scripted_policy(self):
    def act(task, state, observation, key):
      return jnp.clip(10.0 * (task['goal'] - observation), -1, 1), state, {}

    return rollout.uniform_policy(2)._replace(act=act)


@pytest.fixture
def scripted_family():
  envs.register('scripted', _Scripted)
  yield {
    'family': {'name': 'scripted'},
    'collect': {'source': 'script', 'script_episodes': _EPISODES},
  }
  del envs.FAMILIES['scripted']


def test_a_script_makes_the_datasets(tmp_path, scripted_family):
  setup = tiny_run.make_setup(tmp_path, scripted_family)
  assert collect.dataset_sizes(setup) == (_EPISODES * 20, 0)
  assert collect.test_dataset_sizes(setup) == (_EPISODES * 20, 0)
  phases.run(setup, ('collect',))
  for name, load, tasks in (
    ('dataset', collect.load_dataset, setup.train_tasks),
    ('dataset_test', collect.load_test_dataset, setup.test_tasks),
  ):
    data, horizon = load(setup), 20
    goal = np.asarray(tasks['goal'])
    np.testing.assert_array_equal(
      data.size, np.full(len(goal), _EPISODES * horizon)
    )
    position = data.transitions.observation.reshape(
      len(goal), _EPISODES, horizon, 2
    )
    np.testing.assert_array_equal(position[:, :, 0], 0.0)
    last = data.transitions.next_observation[:, -1]
    np.testing.assert_allclose(last, goal, atol=1e-5)
    np.testing.assert_allclose(
      data.episode_return,
      data.transitions.reward.sum(axis=1) / _EPISODES,
      rtol=1e-5,
    )
    made = datasets.load_manifest(tmp_path / name)['source']
    assert made['algorithm'] == 'script'
    assert made['log'] == '3 episodes of the scripted policy per task'
  assert setup.is_done('collect')


class _Fragile(probes.BlowsUp):
  """Blows up once in each episode of five steps."""

  def scripted_policy(self):
    return rollout.uniform_policy(1)


def test_steps_that_blew_up_are_counted(tmp_path):
  setup = dataclasses.replace(
    tiny_run.make_setup(
      tmp_path, {'collect': {'source': 'script', 'script_episodes': _EPISODES}}
    ),
    family=_Fragile(),
    train_tasks={'value': jnp.ones(3), 'lifetime': jnp.ones(3)},
    test_tasks={'value': jnp.ones(2), 'lifetime': jnp.ones(2)},
  )
  collect.collect(setup)
  scores = records.load_evaluation(tmp_path / 'evaluations' / 'collect.npz')
  np.testing.assert_array_equal(scores['dataset_diverged'], [3 * _EPISODES])
  # Per seed 2 tasks, 2 repetitions, 8 episodes.
  np.testing.assert_array_equal(scores['random_diverged'], [32, 32])


def test_rows_that_blew_up_count_where_they_are_held():
  flags = np.array([[1, 0, 1, 1], [0, 1, 1, 1]], np.float32)
  part = Transition(*[None] * 5, {'diverged': flags})
  data = MetaDataset(part, np.array([4, 2]), None, None, {}, np.zeros(2))
  assert history.num_diverged(data) == 3 + 1
  both = data._replace(context=part, context_size=np.array([0, 3]))
  assert history.num_diverged(both) == 4 + 2
  silent = part._replace(extras={})
  assert history.num_diverged(both._replace(context=silent)) == 4


def test_without_a_script(tmp_path):
  setup = tiny_run.make_setup(tmp_path, {'collect': {'source': 'script'}})
  with pytest.raises(ConfigError, match='point_robot.*no scripted policy'):
    phases.run(setup, ('collect',))
  with pytest.raises(ConfigError, match='point_robot.*no scripted policy'):
    restore.meta_test(setup, 'collect', 0, 0, record=lambda state: {})


def test_packing_keeps_the_order_of_what_took_place():
  # Two episodes of 3 steps; task 0 terminates after 1 and 2 steps.
  valid = np.array([[1, 0, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1]], bool)
  count = np.arange(12.0, dtype=np.float32).reshape(2, 6)
  zeros = jnp.zeros((2, 6, 2))
  data = history.pack(
    Transition(
      zeros,
      zeros,
      count,
      np.ones((2, 6), np.float32),
      zeros,
      {'time': np.tile(np.arange(3.0), (2, 2))},
    ),
    valid,
    {},
    3,
  )
  np.testing.assert_array_equal(data.size, [3, 6])
  np.testing.assert_array_equal(data.transitions.reward[0, :3], [0, 3, 4])
  np.testing.assert_array_equal(data.transitions.reward[1], count[1])


# What is kept of a log.


def _config(**changes):
  return dataclasses.replace(tiny_run.make_config().collect, **changes)


@pytest.mark.parametrize(
  'which, count, rows',
  [
    ('first', 4, [range(0, 4), range(0, 4)]),
    ('last', 4, [range(9, 13), range(16, 20)]),
    # Around 13 // 4 = 3 and 20 // 4 = 5.
    ('middle', 4, [range(1, 5), range(3, 7)]),
    ('middle', 5, [range(1, 6), range(3, 8)]),
    ('all', 4, [range(13), range(20)]),
  ],
  ids=str,
)
def test_the_part_that_is_kept(which, count, rows):
  number = np.arange(2 * 21.0, dtype=np.float32).reshape(2, 21)
  log = Transition(*[number] * 5, {'time': number})
  part, size = slices.cut(log, np.array([13, 20], np.int32), which, count)
  assert size.tolist() == [len(r) for r in rows] and size.dtype == np.int32
  for task in range(2):
    for leaf in (part.reward, part.extras['time']):
      np.testing.assert_array_equal(
        leaf[task, : size[task]], number[task, rows[task]]
      )


@pytest.mark.parametrize(
  'which, count, fits',
  [
    ('first', 13, True),
    ('last', 14, False),
    ('all', 10**6, True),
    ('middle', 7, True),
    ('middle', 8, False),
  ],
)
def test_parts_that_no_log_will_hold(which, count, fits):
  held = np.array([20, 13])
  config = _config(log_slice=which, log_size=count)
  if fits:
    history.check_cut(config, held)
    # What passes can be cut.
    number = np.zeros((2, 20), np.float32)
    slices.cut(Transition(*[number] * 5), held, which, count)
    return
  with pytest.raises(
    ConfigError,
    match=(
      rf'collect\.log_size: {count} transitions .* only'
      rf' {"7 around the first quarter of 13" if count == 8 else 13} in'
      ' training task 1'
    ),
  ):
    history.check_cut(config, held)


# PEARL's visit to the held-out tasks.


def test_the_behaviour_policy_visits_held_out_tasks(finished_run):
  """Two episodes under the prior, as many more: a visit of its training."""
  setup = tiny_run.make_setup(finished_run)
  data = collect.load_test_dataset(setup)
  assert collect.test_dataset_sizes(setup) == (80, 0) and data.context is None
  goal = np.asarray(setup.test_tasks['goal'])
  np.testing.assert_array_equal(data.size, [80, 80])
  np.testing.assert_array_equal(
    data.transitions.extras['time'], np.tile(np.arange(20), (2, 4))
  )
  np.testing.assert_allclose(
    data.transitions.reward,
    -np.linalg.norm(data.transitions.next_observation - goal[:, None], axis=-1),
    rtol=1e-5,
  )
  # Tasks and episodes have random numbers of their own.
  assert len(np.unique(data.transitions.action[..., 0])) == 160
  made = datasets.load_manifest(finished_run / 'dataset_test')['source']
  assert made['algorithm'] == 'pearl' and '40 steps under' in made['log']
  made = datasets.load_manifest(finished_run / 'dataset')['source']
  assert made['log'].endswith('training, per task the last 40 transitions')


def test_held_out_tasks_change_nothing_for_the_others(finished_run, tmp_path):
  with tiny_run.shared_programs():
    phases.run(
      tiny_run.make_setup(
        tmp_path, {'family': {'num_test': 1}, 'collect': {'context_size': 30}}
      ),
      ('collect',),
    )
  ours, theirs = (
    datasets.load(folder / 'dataset') for folder in (tmp_path, finished_run)
  )
  for field in Transition._fields[:-1]:
    np.testing.assert_array_equal(
      getattr(ours.transitions, field), getattr(theirs.transitions, field)
    )
  # Encoder data of its own: the last of the prior episodes.
  data = datasets.load(tmp_path / 'dataset_test')
  assert ours.context_size.tolist() == [30] * 3
  assert data.size.tolist() == [80] and data.context_size.tolist() == [30]
  np.testing.assert_array_equal(
    data.context.action[0], data.transitions.action[0, 10:40]
  )


def test_rows_before_there_is_a_log(finished_run, tmp_path):
  setup = tiny_run.make_setup(
    tmp_path, {'collect': {'log_slice': 'all', 'context_size': 50}}
  )
  held = tiny_run.last_progress(finished_run, 'collect')['replay.query.size']
  assert len(np.unique(held)) > 1
  assert collect.dataset_sizes(setup) == (held.max(), 50)
  assert collect.test_dataset_sizes(setup) == (80, 40)


# Whose data they are.


def _brought(finished_run, tmp_path, name='dataset_test'):
  return tiny_run.make_setup(
    tmp_path / 'run',
    {
      'collect': {
        'dataset': str(finished_run / 'dataset'),
        'test_dataset': name and str(finished_run / name),
      }
    },
  )


def test_brought_data(finished_run, tmp_path):
  setup = _brought(finished_run, tmp_path)
  ours = collect.load_test_dataset(setup).transitions.reward
  theirs = datasets.load(finished_run / 'dataset_test').transitions.reward
  np.testing.assert_array_equal(ours, theirs)
  without = _brought(finished_run, tmp_path, '')
  assert collect.load_test_dataset(without) is None
  assert collect.test_dataset_sizes(without) is None
  assert collect.test_dataset_sizes(setup) == (80, 0)


def test_data_of_other_tasks(finished_run, tmp_path, monkeypatch):
  """Refused before anything is trained or scored."""
  monkeypatch.setattr(
    collect, '_score_references', lambda *a: pytest.fail('scored')
  )
  with pytest.raises(
    PhaseError,
    match=(
      r"dataset: task parameter 'goal' differs from the held-out tasks of"
      r" config\.family \(task_list 'default', num_test 2\)"
    ),
  ):
    collect.collect(_brought(finished_run, tmp_path, 'dataset'))


def test_no_data_yet(tmp_path):
  setup = tiny_run.make_setup(tmp_path)
  for load in (collect.load_dataset, collect.load_test_dataset):
    with pytest.raises(PhaseError, match='run --phases=collect first'):
      load(setup)


def test_a_missing_half_is_noticed(finished_run, tmp_path):
  shutil.copytree(finished_run / 'dataset', tmp_path / 'dataset')
  setup = tiny_run.make_setup(tmp_path)
  collect.load_dataset(setup)
  with pytest.raises(PhaseError, match='dataset_test: no dataset'):
    collect.load_test_dataset(setup)
