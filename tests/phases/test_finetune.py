"""Fine-tuning in each held-out task, and stages that annotate their data."""

import shutil

import jax
import numpy as np
import pytest
import tiny_run

from offmeta.data import dataset as datasets
from offmeta.data.meta_dataset import MetaDataset
from offmeta.envs import point_robot
from offmeta.phases import run as phases
from offmeta.training import config as configs, setup as setups, stopping
from offmeta.training.config import ConfigError
from offmeta.types import Transition

_CONFIG = {
  'num_seeds': 2,
  'chunk': 2,
  'algorithm': 'macaw',
  'family': {'num_train': 3, 'num_test': 2},
  'macaw': {
    'hidden': (6,),
    'latent_size': 3,
    'head_hidden': 4,
    'stride': 1,
    'num_updates': 4,
    'num_tasks': 2,
    'context_size': 8,
    'query_size': 8,
    'finetune': {
      'lr': 0.01,
      'value_updates': 2,
      'policy_updates': 2,
      'batch_size': 8,
    },
  },
  'finetune': {
    'iterations': 3,
    'burn_in': 2,
    'context_size': 30,
    'num_episodes': 2,
    'every_iterations': 2,
  },
  'evaluation': {
    'num_repeats': 2,
    'num_steps': 40,
    'context_size': 8,
    'num_train_tasks': 2,
    'every_updates': 4,
  },
}


class _NoScores:
  curve = staticmethod(lambda state, data: {})


@pytest.fixture(autouse=True, scope='module')
def _programs():
  """Runs that differ in nothing but where they stop are compiled once."""
  with tiny_run.shared_programs():
    yield


@pytest.fixture(name='dataset', scope='module')
def _dataset(tmp_path_factory):
  """Random logs of 4 episodes per training task."""
  family = point_robot.PointRobot()
  config = configs.from_dict(_CONFIG)
  tasks, _ = setups.make_tasks(family, config.family.task_list, 3, 2)
  rng = np.random.default_rng(0)
  shape = (3, 80)
  draw = lambda *size: rng.normal(size=shape + size).astype(np.float32)
  time = np.broadcast_to(np.arange(80) % 20, shape).astype(np.float32)
  path = tmp_path_factory.mktemp('data') / 'dataset'
  datasets.save(
    path,
    MetaDataset(
      Transition(
        draw(2),
        np.tanh(draw(2)),
        draw(),
        np.ones(shape, np.float32),
        draw(2),
        {'time': time, 'features': draw(family.spec.feature_size)},
      ),
      np.full(3, 80, np.int32),
      None,
      None,
      jax.tree.map(np.asarray, tasks),
      np.zeros(3, np.float32),
    ),
    family.spec,
    {},
  )
  return path


def _setup(workdir, dataset, changes={}, stop=None):
  config = configs.from_dict(
    {'collect': {'dataset': str(dataset)}}, configs.from_dict(_CONFIG)
  )
  config = configs.from_dict(changes, config)
  configs.validate(config)
  return setups.make_setup(
    config,
    workdir,
    stop,
    setups.Runtime(checkpoint_every_s=-1.0, keep_checkpoints=True, quiet=True),
  )


@pytest.fixture(name='finished', scope='module')
def _finished(dataset, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('finetuned')
  setup = _setup(workdir, dataset)
  phases.offline(setup, _NoScores())
  phases.run(setup, ('finetune',))
  return workdir


def test_what_is_written(finished):
  arrays = np.load(finished / 'evaluations' / 'finetune.npz')
  # The meta-policy, after the offline step, iterations 2 and 3.
  assert arrays['finetune_returns'].shape == (2, 2, 4)
  np.testing.assert_array_equal(
    arrays['finetune_env_steps'],
    np.broadcast_to(
      # One episode per iteration, those of the burn-in before the first.
      [0, 30, (2 + 2) * 20, (2 + 3) * 20],
      (2, 2, 4),
    ),
  )
  returns = arrays['finetune_returns']
  assert np.isfinite(returns).all() and np.all(returns < 0)
  # Every step of the way changes the policy, apart for seeds and tasks.
  assert np.all(np.diff(returns, axis=-1) != 0)
  assert len(np.unique(returns)) == returns.size


def test_learners_own_their_tasks_and_data(finished):
  last = tiny_run.last_progress(finished, 'finetune')
  replay = {k: v for k, v in last.items() if k.startswith('replay')}
  size = next(
    v for k, v in replay.items() if k.endswith("size']") or k.endswith('.size')
  )
  assert size.shape == (4, 1) and np.all(size == 5 * 20)
  rewards = next(v for k, v in replay.items() if 'reward' in k)
  assert len({row.tobytes() for row in rewards}) == 4
  # Three rounds of 2 value and 2 policy updates.
  step = next(v for k, v in last.items() if k.endswith('step'))
  np.testing.assert_array_equal(step, np.full(4, 12))


def test_stopped_and_continued(finished, dataset, tmp_path):
  workdir = tmp_path / 'run'
  shutil.copytree(finished / 'offline', workdir / 'offline')
  stop = tiny_run.StopAt(workdir / 'finetune', 6)
  with pytest.raises(stopping.Interrupted):
    phases.run(_setup(workdir, dataset, stop=stop), ('finetune',))
  assert not (workdir / 'evaluations' / 'finetune.npz').exists()
  phases.run(_setup(workdir, dataset), ('finetune',))
  expected, actual = [
    dict(np.load(folder / 'evaluations' / 'finetune.npz'))
    for folder in (finished, workdir)
  ]
  assert tiny_run.differing(actual, expected) == []


def test_needs_an_algorithm_that_can(dataset, tmp_path):
  setup = _setup(
    tmp_path,
    dataset,
    {
      'algorithm': 'meta_bc',
      'meta_bc': {'hidden': (4,), 'latent_size': 2, 'num_tasks': 2},
    },
  )
  with pytest.raises(ConfigError, match='meta_bc has no fine-tuning'):
    phases.run(setup, ('finetune',))


def test_no_iterations_no_phase(dataset, tmp_path):
  setup = _setup(tmp_path, dataset, {'finetune': {'iterations': 0}})
  phases.run(setup, ('finetune',))
  assert not (tmp_path / 'finetune').exists()


# A stage that annotates its data.

_BOREL = {
  'algorithm': 'borel',
  'borel': {
    'latent_size': 2,
    'gru_size': 4,
    'decoder_hidden': (4,),
    'vae': {
      'num_updates': 4,
      'num_tasks': 2,
      'num_sequences': 2,
      'num_decoded': 3,
    },
    'rl': {
      'critic_hidden': (4,),
      'actor_hidden': (4,),
      'num_updates': 6,
      'num_tasks': 2,
      'batch_size': 4,
    },
  },
  'finetune': {'iterations': 0},
  'evaluation': {'every_updates': 1000},
}


def test_beliefs_are_the_same_after_a_stop(dataset, tmp_path):
  """They are computed again, with the encoder that has not changed since."""

  def run(name, stop=None):
    phases.offline(_setup(tmp_path / name, dataset, _BOREL, stop), _NoScores())
    return tiny_run.saved(tmp_path / name / 'offline' / 'final' / '0')

  expected = run('whole')
  stop = tiny_run.StopAt(tmp_path / 'parts' / 'offline', 8)
  with pytest.raises(stopping.Interrupted):
    run('parts', stop)
  assert tiny_run.checkpoint_steps(tmp_path / 'parts', 'offline')[-1] == 8
  assert tiny_run.differing(run('parts'), expected) == []


def test_too_few_rows_for_a_batch_without_replacement(dataset, tmp_path):
  setup = _setup(tmp_path, dataset, {'macaw': {'stride': 20}})
  with pytest.raises(ConfigError, match='batches of 8 rows .* has only 4'):
    phases.offline(setup, _NoScores())
