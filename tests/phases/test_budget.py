"""Memory that phases announce, against the replays that they make."""

import os
import pathlib
import shutil
import subprocess
import sys

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from experiments.configs import recipes
from offmeta import disk
from offmeta.collection.sources import pearl as collect_pearl
from offmeta.data import dataset as datasets, prepare
from offmeta.data.slices import slice_transitions
from offmeta.phases import budget, run as phases
from offmeta.training import (
  config as configs,
  loop,
  memory,
  setup as setups,
  streaming,
  updates,
  visits as visits_lib,
)
from offmeta.types import DataSpec, Loop, Visits

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_PLACES = [{}, {'share': 'tasks'}, {'replay': 'host'}]


@pytest.fixture(name='asked')
def _asked(monkeypatch):
  """Every (demands, devices) that a budget was checked for."""
  asked = []

  def available(devices):
    asked.append(devices)
    return None

  def check(demands, available, advice):
    if demands[0].what == 'list of visits':
      asked.pop()
    elif advice != budget._PASSING_ADVICE:
      asked[-1] = (demands, asked[-1])

  monkeypatch.setattr(memory, 'available_bytes', available)
  monkeypatch.setattr(memory, 'check', check)
  return asked


def _held(tree):
  """Bytes of a tree on all devices together; memory maps take none."""
  total = 0
  for leaf in jax.tree.leaves(tree):
    if not isinstance(leaf, np.ndarray):
      total += sum(shard.data.nbytes for shard in leaf.addressable_shards)
    elif not _is_mapped(leaf):
      total += leaf.nbytes
  return total


def _is_mapped(leaf):
  while isinstance(leaf, np.ndarray) and not isinstance(leaf, np.memmap):
    leaf = leaf.base
  return isinstance(leaf, np.memmap)


def _assert_announced(asked, setup, seeds, progress, **data):
  """Of the one phase that was asked for: data by name, learners, devices."""
  ((demands, devices),) = asked
  found = {demand.what: demand.nbytes for demand in demands}
  one = sum(
    helpers.numbers(leaf).nbytes for leaf in jax.tree.leaves(progress.state)
  )
  on_host = setup.runtime.replay == 'host'
  copied = seeds.layout.axis_name and not on_host
  expected = {'learners': one * (len(devices) if copied else 1)}
  if progress.replay is not None:
    data['replay'], data['replay for contexts'] = progress.replay
  expected.update(
    {
      name.replace('_', ' '): _held(x)
      for name, x in data.items()
      if x is not None
    }
  )
  assert found == expected
  assert devices == (
    [streaming.host()] if on_host else seeds.layout.local_devices
  )
  assert set(devices) == {
    shard.device
    for leaf in jax.tree.leaves(data)
    if not isinstance(leaf, np.ndarray)
    for shard in leaf.addressable_shards
  }


@pytest.mark.parametrize('runtime', _PLACES, ids=str)
def test_collect(asked, tmp_path, runtime):
  setup = tiny_run.make_setup(tmp_path, runtime=runtime)
  budget.check(setup, ('collect',))
  seeds = collect_pearl.behaviour_seeds(setup)
  algorithm = setup.algorithm('pearl', setup.config.collect.behaviour)
  progress = collect_pearl.start(setup, algorithm, seeds, fresh=False)
  assert progress.replay.context is not None
  visit = collect_pearl.visit_held_out(setup, algorithm, seeds, progress.state)
  _assert_announced(
    asked,
    setup,
    seeds,
    progress,
    **{
      'replay of held-out tasks': visit.query,
      'replay for contexts of held-out tasks': visit.context,
    },
  )


@pytest.mark.parametrize('runtime', _PLACES, ids=str)
@pytest.mark.parametrize('one_buffer', [True, False])
def test_offline_and_online(finished_run, asked, tmp_path, runtime, one_buffer):
  setup = tiny_run.make_setup(
    tmp_path,
    {
      'collect': {
        'dataset': str(finished_run / 'dataset'),
        'test_dataset': (one_buffer * str(finished_run / 'dataset_test')),
      },
      'online': {'share_buffer': one_buffer},
    },
    runtime=runtime,
  )
  algorithm = setup.algorithm('smac', setup.config.settings)
  dataset, test = phases.offline_replays(setup)
  assert (test is not None) == one_buffer
  data = {
    'dataset': dataset.query,
    'dataset of held-out tasks': test and test.query,
  }
  progress = loop.start(
    updates.init_states(algorithm, setup.seeds),
    phases._online_replays(
      setup, configs.variant(setup.config, 'matched'), dataset
    ),
  )
  assert (progress.replay.context is None) == one_buffer
  budget.check(setup, ('offline',))
  _assert_announced(
    asked, setup, setup.seeds, progress._replace(replay=None), **data
  )
  asked.clear()
  disk.write_json(tmp_path / 'online/oracle/done.json', {})
  budget.check(setup, ('online',))
  _assert_announced(asked, setup, setup.seeds, progress, **data)


_PREPARED = [
  DataSpec(stride=7),
  DataSpec(shared=True),
  DataSpec(context_part='last', context_rows=30),
  DataSpec(returns_discount=0.9),
  DataSpec(returns_discount=0.9, stride=3),
  DataSpec(sequence_episodes=2),
  DataSpec(sequence_episodes=2, mix_rewards=True),
]


@pytest.mark.parametrize('spec', _PREPARED, ids=str)
@pytest.mark.parametrize('encoder', [0, 20])
def test_prepared_data(finished_run, tmp_path, spec, encoder):
  """What an algorithm asks for is counted as it is made."""
  data = datasets.load(finished_run / 'dataset_test')
  if encoder:
    part = slice_transitions(data, 0, encoder)
    data = data._replace(context=part.transitions, context_size=part.size)
  setup = tiny_run.make_setup(tmp_path, {'num_seeds': 1})
  made = prepare.replay(
    data, spec, setup.family, setup.test_tasks, jax.random.key(0)
  )
  demand = budget._dataset(setup, spec, (80, encoder), 2, 'log')
  assert demand.nbytes == _held(made)


def test_annotations(finished_run, tmp_path):
  setup = tiny_run.make_setup(tmp_path)
  spec = DataSpec(sequence_episodes=1)
  algorithm = setup.learner()._replace(data=spec)
  annotate = lambda state, log, mask: {
    'belief': jnp.tile(log.extras['time'][:, None], 3)
  }
  stage = algorithm.loop('offline').stages[0]
  assert not budget._annotations(setup, algorithm, 80, 2)
  (demand,) = budget._annotations(
    setup,
    algorithm._replace(
      loops=(Loop('offline', (stage._replace(annotate=annotate), stage)),)
    ),
    80,
    2,
  )
  log = prepare.replay(
    datasets.load(finished_run / 'dataset_test'),
    spec,
    setup.family,
    setup.test_tasks,
    jax.random.key(0),
  )
  added = updates.annotate(
    setup,
    setup.seeds,
    stage._replace(annotate=annotate),
    updates.init_states(algorithm, setup.seeds),
    log,
  )
  assert added['belief'].shape == (2, 2, 80, 3)
  assert demand.nbytes == added['belief'].nbytes // 2 * 3  # 3 training tasks


def test_before_there_is_a_dataset_its_size_is_known(finished_run, tmp_path):
  """From the configuration as from the files."""
  before = budget.check(tiny_run.make_setup(tmp_path), phases.PHASES)
  for stage in ('collect', 'dataset', 'dataset_test'):
    shutil.copytree(finished_run / stage, tmp_path / stage)
  after = budget.check(tiny_run.make_setup(tmp_path), phases.PHASES)
  assert [line.split(':')[0] for line in before[:-1]] == [
    f'memory, {name}' for name in tiny_run.STAGES
  ]
  assert after[:-1] == before[1:-1]


def test_finished_phases_are_left_out(finished_run):
  setup = tiny_run.make_setup(finished_run)
  assert not budget.check(setup, phases.PHASES)


def test_only_what_is_asked_for(asked, tmp_path):
  setup = tiny_run.make_setup(tmp_path)
  assert not budget.check(setup, ('test', 'report')) and not asked
  assert len(budget.check(setup, ('collect',))) == len(asked) == 1


@pytest.mark.parametrize(
  'replay, place',
  [('device', 'on the devices in use'), ('host', 'in the host')],
)
def test_what_is_available_is_told(tmp_path, monkeypatch, replay, place):
  monkeypatch.setattr(memory, 'available_bytes', lambda devices: 5 * 10**9)
  setup = tiny_run.make_setup(tmp_path, runtime={'replay': replay})
  *_, last = budget.check(setup, phases.PHASES)
  assert last == f'memory available {place}: 5.00 GB'


def test_the_phase_that_does_not_fit_is_named(tmp_path, monkeypatch):
  """Collecting fits, with the margin; a later phase does not."""
  setup = tiny_run.make_setup(tmp_path)
  monkeypatch.setattr(memory, 'available_bytes', lambda devices: 10**9)
  lines = budget.check(setup, phases.PHASES)
  assert lines[0].startswith('memory, collect: 60.9 kB')
  size = lines[2].removeprefix('memory, online/matched: ').split(' (')[0]
  monkeypatch.setattr(memory, 'available_bytes', lambda devices: 70_000)
  with pytest.raises(configs.ConfigError) as error:
    budget.check(setup, phases.PHASES)
  message = str(error.value)
  assert message.startswith(
    f'phase online/matched: this run would keep {size} in memory'
  )
  assert '2 seeds x 3 tasks x' in message and '70.0 kB  available' in message
  assert '--replay=host' in message


_MOST = 2**31 - 1
_SAC = {
  'collect': {
    'source': 'sac',
    'specialists': {'env_steps': 80, 'initial_steps': 20, 'num_episodes': 2}
    | {'steps_per_iteration': 20, 'sac': {'actor_hidden': (8,)}},
  }
}
_MACAW = {
  'algorithm': 'macaw',
  'macaw': {'hidden': (8,), 'latent_size': 2, 'num_tasks': 2},
  'online': {'variants': {}},
  'finetune': {'iterations': 2},
}


@pytest.fixture(name='plan')
def _plan(finished_run, tmp_path):
  """(changes, key, value, phase) -> what its budget is."""

  def plan(changes, key, value, *asked):
    if asked[0] != 'collect':
      dataset = {'dataset': str(finished_run / 'dataset')}
      changes = recipes.merge({'collect': dataset}, changes)
    for part in reversed(key.split('.')):
      value = {part: value}
    config = configs.from_dict(tiny_run.CONFIG)
    config = configs.from_dict(recipes.merge(changes, value), config)
    configs.validate(config)
    return budget.check(setups.make_setup(config, tmp_path), asked)

  return plan


@pytest.mark.parametrize(
  'changes, key, phase, message',
  [
    ({}, 'collect.gather.context_size', 'collect', 'contexts of visits'),
    ({}, 'online.gather.context_size', 'online/matched', 'contexts of visits'),
    (
      {},
      'online.gather.label_context_size',
      'online/matched',
      'contexts of visits',
    ),
    (
      _SAC,
      'collect.specialists.num_episodes',
      'collect',
      'scored episodes +5 learners x 2,147,483,647 episodes',
    ),
    (_MACAW, 'finetune.num_episodes', 'finetune', 'scored episodes'),
    (_MACAW, 'finetune.context_size', 'finetune', 'random transitions'),
    (
      _SAC,
      'collect.specialists.sac.num_updates',
      'collect',
      '4 iterations of 2,147,483,647 updates; a learner counts',
    ),
    (
      _MACAW,
      'macaw.finetune.value_updates',
      'finetune',
      '2 iterations of [0-9,]* updates; a learner counts',
    ),
  ],
)
def test_sizes_up_to_the_largest_are_counted(
  plan, monkeypatch, changes, key, phase, message
):
  monkeypatch.setattr(memory, 'available_bytes', lambda devices: 5 * 10**9)
  asked = phase.split('/')[0]
  assert plan(changes, key, 3, asked)
  with pytest.raises(
    configs.ConfigError, match=rf'^phase {phase}: (.|\n)*{message}'
  ):
    plan(changes, key, _MOST, asked)


def test_the_phase_test_scores_all_training_tasks(tmp_path):
  setup = tiny_run.make_setup(tmp_path)  # 2 of 3, and 2 held-out ones
  during, after = (budget._evaluation(setup, 1, x).nbytes for x in (0, 1))
  assert after * 4 == during * 5
  first, *_ = budget._training(setup, ('offline', 'test'))
  assert 2 * after in [demand.nbytes for demand in first.passing]


def test_updates_of_all_offline_loops_are_counted(tmp_path, monkeypatch):
  setup = tiny_run.make_setup(tmp_path)
  algorithm = setup.learner()
  last, online = algorithm.loops
  first = last._replace(name='offline/first', iterations=2**30)
  made = algorithm._replace(loops=(first, last, online))
  monkeypatch.setattr(setups.Setup, 'learner', lambda *args, **kw: made)
  with pytest.raises(configs.ConfigError, match='^phase offline/first: 1,073'):
    budget.check(setup, ('offline',))


def test_the_memory_of_a_loop_is_counted(tmp_path):
  """What `begin` makes; of several loops, the largest."""
  algorithm = tiny_run.make_setup(tmp_path).learner()

  def remembers(rows):
    begin = lambda state: state.replace(memory=jnp.zeros((rows, 2)))
    return algorithm.loops[0]._replace(begin=begin)

  plain = budget._learners(algorithm, 3).nbytes
  loops = (remembers(50), remembers(7))
  held = budget._learners(algorithm, 3, loops=loops).nbytes
  assert held == plain + 3 * 50 * 2 * 4


def test_a_run_that_cannot_fit_ends_before_it_starts(tmp_path):
  """The command, asked for 96 GB per buffer and task."""
  workdir = tmp_path / 'run'
  done = subprocess.run(
    [
      sys.executable,
      '-m',
      'experiments.run',
      f'--workdir={workdir}',
      '--config=tests/tiny_config.py',
      '--profile=smoke',
      '--config.collect.initial_steps=2000000000',
      '--config.family.task_list=random:1',
      '--config.family.num_train=900',
    ],
    cwd=_ROOT,
    text=True,
    capture_output=True,
    timeout=120,
    env={
      **os.environ,
      'JAX_COMPILATION_CACHE_DIR': str(tmp_path / 'xla'),
      'PYTHONPATH': f'{_ROOT}{os.pathsep}{_ROOT / "tests"}',
    },
  )
  assert done.returncode == 1, done.stderr
  assert done.stderr.startswith(
    '\nerror: phase collect: this run would keep 173 TB in memory'
  )
  assert '1 seed x 900 tasks x 2,000,000,' in done.stderr
  assert 'Traceback' not in done.stderr and not done.stdout
  assert not workdir.exists()


def test_a_list_of_visits_is_counted_before_it_is_made(monkeypatch):
  monkeypatch.setattr(memory, 'available_bytes', lambda devices: 5 * 10**9)
  keys = jax.random.split(jax.random.key(0), 2)
  with pytest.raises(
    configs.ConfigError, match='list of visits +2 seeds x 1,000,000,000 iter'
  ):
    visits_lib.visits(keys, 10**9, Visits(), 32)
  assert visits_lib.visits(keys, 3, Visits(), 32).shape == (2, 3, 5)
