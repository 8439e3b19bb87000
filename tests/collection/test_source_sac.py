"""One SAC learner per task as the source of all logged data."""

import dataclasses

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from offmeta import playback as restore
from offmeta.collection import phase as collect, single_task
from offmeta.collection.sources import sac as collect_sac
from offmeta.data import dataset as datasets
from offmeta.phases import budget
from offmeta.testing import probes
from offmeta.training import loop, stopping, updates
from offmeta.training.config import ConfigError

_FAMILY = probes.CountingFamily(terminates=True)
_TRAIN = {
  'value': jnp.array([1.0, -2.0, 0.5]),
  'lifetime': jnp.array([2.0, 5.0, 3.0]),
}
_TEST = {'value': jnp.array([3.0, 4.0]), 'lifetime': jnp.array([4.0, 1.0])}
_HORIZON = 5
# One uniform round and two of the policy, of at least 5 steps each.
_SAC = {
  'source': 'sac',
  'log_slice': 'all',
  'specialists': {
    'env_steps': 15,
    'initial_steps': 5,
    'steps_per_iteration': 5,
    'num_evaluations': 2,
    'num_episodes': 2,
    'sac': {
      'critic_hidden': (8,),
      'actor_hidden': (8,),
      'num_updates': 3,
      'batch_size': 4,
    },
  },
}
_STEPS = {'train': np.array([18, 15, 18]), 'test': np.array([24, 15])}


def _setup(folder, changes={}, test=_TEST, stop=None, runtime={}):
  setup = tiny_run.make_setup(
    folder, {'collect': {**_SAC, **changes}}, stop, runtime
  )
  return dataclasses.replace(
    setup, family=_FAMILY, train_tasks=_TRAIN, test_tasks=test
  )


@pytest.fixture(autouse=True, scope='module')
def _programs():
  """Runs that differ in nothing but where they stop are compiled once."""
  with tiny_run.shared_programs():
    yield


@pytest.fixture(name='finished', scope='module')
def _finished(tmp_path_factory):
  """The setup of a phase that nothing interrupted."""
  setup = _setup(tmp_path_factory.mktemp('sac') / 'run')
  collect.collect(setup)
  return setup


@pytest.mark.parametrize('part', ['train', 'test'])
def test_every_task_has_its_whole_life(finished, part):
  """In order; sizes differ where episodes end early."""
  load = {'train': collect.load_dataset, 'test': collect.load_test_dataset}
  data, tasks = load[part](finished), {'train': _TRAIN, 'test': _TEST}[part]
  assert data.size.tolist() == _STEPS[part].tolist()
  assert data.transitions.reward.shape[1] == _STEPS[part].max()
  for task, steps in enumerate(_STEPS[part]):
    log = jax.tree.map(lambda x: x[task, :steps], data.transitions)
    life, value = (float(tasks[name][task]) for name in ('lifetime', 'value'))
    time = np.tile(np.arange(life), int(steps / life))
    np.testing.assert_array_equal(log.extras['time'], time)
    np.testing.assert_array_equal(log.observation[:, 0], time)
    np.testing.assert_array_equal(log.reward, np.float32(value) * (time + 1))
    np.testing.assert_array_equal(log.discount, time < life - 1)
    # One random start per episode, all of them different.
    starts = log.observation[:, 1].reshape(-1, int(life))
    assert len(np.unique(starts)) == steps / life
    np.testing.assert_allclose(
      data.episode_return[task], value * life * (life + 1) / 2
    )


def test_learners_have_random_numbers_of_their_own(finished):
  actions = np.concatenate(
    [
      load(finished).transitions.action[:, :15]
      for load in (collect.load_dataset, collect.load_test_dataset)
    ]
  )
  assert actions.shape[0] == 5
  assert len(np.unique(actions)) == actions.size


def test_what_else_it_leaves(finished):
  made = datasets.load_manifest(finished.workdir / 'dataset_test')['source']
  assert made['algorithm'] == 'sac'
  assert made['log'] == (
    'from the training history of one SAC learner per task, from random'
    ' actions to its last policy, all transitions'
  )
  scores = np.load(finished.workdir / 'evaluations' / 'collect.npz')
  best = lambda tasks: np.asarray(
    tasks['value'] * tasks['lifetime'] * (tasks['lifetime'] + 1) / 2
  )
  for name, tasks in (('train', _TRAIN), ('test', _TEST)):
    np.testing.assert_allclose(
      scores[f'specialist_{name}_returns'], np.tile(best(tasks)[:, None], 2)
    )
  np.testing.assert_allclose(scores['behaviour_data_returns'], best(_TRAIN))
  assert scores['specialist_diverged'] == 0
  assert 'random_test_returns' in scores and finished.is_done('collect')
  curve = single_task.curves(finished, 'collect')
  np.testing.assert_array_equal(
    curve['eval/env_steps'][-1],
    np.concatenate([_STEPS['train'], _STEPS['test']]),
  )


def test_resumed_equals_uninterrupted(finished, tmp_path):
  stop = tiny_run.StopAt(tmp_path / 'collect', 3)
  with pytest.raises(stopping.Interrupted):
    collect.collect(_setup(tmp_path, stop=stop))
  assert not (tmp_path / 'dataset').exists()
  collect.collect(_setup(tmp_path))
  for name in ('dataset', 'dataset_test'):
    helpers.assert_same(
      *(datasets.load(folder / name) for folder in (tmp_path, finished.workdir))
    )
  rows = lambda folder: tiny_run.metrics(folder / 'collect/metrics.jsonl')
  assert rows(tmp_path) == rows(finished.workdir)


def test_held_out_tasks_change_nothing_for_the_others(finished, tmp_path):
  """Nor does what the other training tasks are."""
  other = {'value': jnp.array([9.0]), 'lifetime': jnp.array([5.0])}
  setup = dataclasses.replace(
    _setup(tmp_path, test=other),
    train_tasks=jax.tree.map(lambda x: x[:2], _TRAIN),
  )
  log = _logs(setup, num_train=2).train.transitions
  before = collect.load_dataset(finished).transitions
  for task in range(2):
    rows = slice(0, int(_STEPS['train'][task]))
    np.testing.assert_array_equal(
      log.reward[task, rows], before.reward[task, rows]
    )
    # Three learners of five, two of three share a device: rounding.
    np.testing.assert_allclose(
      log.action[task, rows], before.action[task, rows], rtol=1e-4, atol=1e-5
    )


def _logs(setup, **family):
  config = setup.config
  return collect_sac.make(
    dataclasses.replace(
      setup,
      config=(
        dataclasses.replace(
          config, family=dataclasses.replace(config.family, **family)
        )
      ),
    )
  )


@pytest.mark.parametrize(
  'which, rows',
  [
    ('first', [range(5)] * 5),
    (
      'middle',
      [range(2, 7), range(1, 6), range(2, 7), range(4, 9), range(1, 6)],
    ),
    (
      'last',
      [
        range(13, 18),
        range(10, 15),
        range(13, 18),
        range(19, 24),
        range(10, 15),
      ],
    ),
  ],
)
def test_parts_of_a_life(finished, tmp_path, which, rows, monkeypatch):
  """Held-out tasks' logs are cut in the same way."""
  setup = _setup(tmp_path, {'log_slice': which, 'log_size': 5})
  assert collect.dataset_sizes(setup) == (5, 0)

  def trained(setup, config, evaluator, stage, precision):
    assert (stage, precision) == ('collect', 'float32')
    states = updates.init_states(
      setup.algorithm('sac', config.sac), setup.seeds
    )
    return loop.start(states, _replay(finished))

  monkeypatch.setattr(single_task, 'train', trained)
  made = collect_sac.make(setup)
  assert 'transitions' in made.train_origin and 'all' not in made.train_origin
  whole = [collect.load_dataset(finished), collect.load_test_dataset(finished)]
  for part, before, mine in zip(
    (made.train, made.test), whole, (rows[:3], rows[3:])
  ):
    assert part.size.tolist() == [5] * len(mine)
    for task, kept in enumerate(mine):
      np.testing.assert_array_equal(
        part.transitions.action[task], before.transitions.action[task, kept]
      )


def _replay(finished):
  """The learners' replays at the end, from the last checkpoint."""
  everyone = collect_sac.learners(finished)
  start = single_task._start(
    everyone,
    finished.config.collect.specialists,
    everyone.algorithm('sac', finished.config.collect.specialists.sac),
  )
  return finished.checkpointer('collect', everyone.seeds).restore(start).replay


def test_rows_before_there_is_a_log(finished, tmp_path):
  """At most, where episodes can end early."""
  setup = _setup(tmp_path)
  assert collect.dataset_sizes(setup) == (3 * (5 + _HORIZON - 1), 0)
  assert collect.test_dataset_sizes(setup) == collect.dataset_sizes(setup)
  fixed = dataclasses.replace(setup, family=probes.CountingFamily())
  assert collect.dataset_sizes(fixed) == (15, 0)
  assert collect.dataset_sizes(finished) == (18, 0)
  assert collect.test_dataset_sizes(finished) == (24, 0)


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'log_slice': 'last', 'log_size': 16}, 'log_size: 16 .* only 15 in'),
    ({'log_slice': 'middle', 'log_size': 8}, 'log_size: 8 .* only 7 around'),
    ({'context_size': 5}, 'context_size: 5 .* source "sac" has no'),
    ({'specialists': {'env_steps': 5}}, 'env_steps 5 leave nothing'),
  ],
  ids=str,
)
def test_what_cannot_be_met_is_said_before_the_training(
  tmp_path, monkeypatch, changes, message
):
  monkeypatch.setattr(
    loop, 'run_loop', lambda *a, **k: pytest.fail('began to train')
  )
  with pytest.raises(ConfigError, match=message):
    collect.collect(_setup(tmp_path, changes))


def test_there_is_no_behaviour_policy(finished):
  with pytest.raises(ConfigError, match='SAC learner of its own'):
    restore.meta_test(finished, 'collect', 0, 0, record=lambda state: {})


@pytest.mark.parametrize('replay', ['device', 'host'])
def test_memory(tmp_path, monkeypatch, replay):
  """What is announced is what is kept, on the devices in any case."""
  setup = _setup(tmp_path, runtime={'replay': replay})
  asked = []
  monkeypatch.setattr(
    budget.memory, 'available_bytes', lambda devices: len(devices) * 10**6
  )
  monkeypatch.setattr(budget.memory, 'check', lambda *args: asked.append(args))
  lines = budget.check(setup, ('collect',))
  (demands, available, advice), *passing = asked
  # What exists for a moment only: one of these at a time.
  assert {only.what for (only,), *_ in passing} <= {
    'a batch',
    'scored episodes',
  }
  everyone = collect_sac.learners(setup)
  config = setup.config.collect.specialists
  progress = single_task._start(
    everyone, config, everyone.algorithm('sac', config.sac)
  )
  held = lambda tree: sum(
    helpers.numbers(leaf).nbytes for leaf in jax.tree.leaves(tree)
  )
  assert {d.what: d.nbytes for d in demands} == {
    'replay': held(progress.replay),
    'learners': held(progress.state),
  }
  assert available == len(everyone.seeds.layout.devices) * 10**6
  assert 'env_steps' in advice and '--replay' not in advice
  assert '5 learners x 1 tasks x 32 transitions' in lines[0]
  assert lines[1].startswith('memory available on the devices in use')
