"""Phases: kill and resume, absent rewards, bad input, kinds of buffers."""

import dataclasses
import errno
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import types

import jax
import numpy as np
import pytest
import tiny_run

from experiments.runs import launch
from offmeta import rollout
from offmeta.checkpoints import checkpointer as checkpointing
from offmeta.collection import phase as collect
from offmeta.collection.sources import pearl as collect_pearl
from offmeta.data import dataset as datasets
from offmeta.phases import run as phases
from offmeta.results import records
from offmeta.testing import probes
from offmeta.training import config as configs, loop, metrics, workdir_lock
from offmeta.training.stopping import Interrupted
from offmeta.types import Transition

pytestmark = pytest.mark.usefixtures('programs')


class _NoEvaluator:
  """Where scores do not matter."""

  curve = staticmethod(lambda state, replay: {})


@pytest.fixture(name='programs')
def _programs():
  with tiny_run.shared_programs():
    yield


@pytest.fixture(name='copied')
def _copied(finished_run, tmp_path):
  """A copy of the finished run, to be damaged."""
  return shutil.copytree(finished_run, tmp_path / 'run')


def _unfinish(workdir, stage):
  """As if the process had been killed before the stage was complete."""
  (workdir / stage / 'done.json').unlink()
  shutil.rmtree(workdir / stage / 'final')


def test_task_color():
  values, goals = np.array([1.0, 3.0]), np.array([[1.0, 0.0], [0.0, 2.0]])
  np.testing.assert_array_equal(phases.task_color({'v': values}), values)
  np.testing.assert_allclose(
    phases.task_color({'goal': goals}), [0.0, np.pi / 2]
  )
  for tasks in (
    {'a': values, 'b': values},
    {'v': values[:, None]},
    {'goal': np.ones((2, 3))},
    {'matrix': np.ones((2, 2, 2))},
  ):
    assert phases.task_color(tasks) is None


def _adaptation(lengths, places):
  """Of one seed, one repetition: tasks [M] with episodes of some lengths.

  Step t of a task goes from `places` [M, W + 1, 2] t to t + 1.
  """
  width = places.shape[1] - 1
  time, valid = np.zeros((2, len(lengths), width))
  for task, of_task in enumerate(lengths):
    steps = np.concatenate([np.arange(length) for length in of_task])
    time[task, : len(steps)], valid[task, : len(steps)] = steps, 1
  wide = lambda x: x[None, :, None]
  zeros = wide(np.zeros_like(time))
  return rollout.Adaptation(
    None,
    Transition(
      wide(places[:, :-1]),
      zeros,
      zeros,
      zeros,
      wide(places[:, 1:]),
      {'time': wide(time)},
    ),
    wide(valid),
    None,
  )


def _family(terminates, size, **hooks):
  spec = types.SimpleNamespace(
    episode_length=3, terminates=terminates, observation_shape=(size,)
  )
  return types.SimpleNamespace(spec=spec, **hooks)


def _paths(family, tasks, adaptation):
  num_test = len(next(iter(tasks.values())))
  return phases._paths(  # pylint: disable=protected-access
    types.SimpleNamespace(
      family=family,
      test_tasks=tasks,
      config=types.SimpleNamespace(
        family=types.SimpleNamespace(num_test=num_test)
      ),
    ),
    adaptation,
  )


def test_paths_of_a_family_that_says_where_it_is():
  """Of all held-out tasks, in their order."""
  rng = np.random.default_rng(0)
  places = rng.normal(size=(6, 7, 3))
  angle = np.array([0.5, 0.1, 0.3, 0.2, 0.6, 0.4])
  goals = np.stack([np.cos(angle), np.sin(angle)], -1)
  # Steps 0 to 2 and 3 to 5; one that blew up began anew after a step.
  adaptation = _adaptation([[1, 2, 3]] * 6, places)
  family = _family(False, 3, position=lambda x: x[..., [2, 0]])
  found = _paths(family, {'goal': goals}, adaptation)
  np.testing.assert_array_equal(found['trajectory_goals'], goals)
  seen = places[..., [2, 0]]
  np.testing.assert_array_equal(
    found['trajectories'], np.stack([seen[:, :4], seen[:, 3:7]], 1)
  )
  for other in (
    _family(False, 3),
    _family(False, 9, position=lambda x: x),  # cut down by `Policy.keep`
  ):
    assert not _paths(other, {'goal': goals}, adaptation)


def test_paths_of_episodes_that_end_early():
  """NaN after an end, and where a task has fewer episodes than another."""
  places = np.random.default_rng(0).normal(size=(2, 6, 2))
  adaptation = _adaptation([[1, 3], [2, 1, 2]], places)
  tasks = {'mass': np.ones((2, 3))}
  family = _family(True, 2, position=lambda x: x)
  found = _paths(family, tasks, adaptation)
  assert set(found) == {'trajectories'}
  expected = np.full((2, 3, 4, 2), np.nan)
  for task, episode, rows in (
    (0, 0, [0, 1]),
    (0, 1, [1, 2, 3, 4]),
    (1, 0, [0, 1, 2]),
    (1, 1, [2, 3]),
    (1, 2, [3, 4, 5]),
  ):
    expected[task, episode, : len(rows)] = places[task, rows]
  np.testing.assert_array_equal(found['trajectories'], expected)


def test_a_run_keeps_what_the_algorithm_says_of_itself(finished_run):
  """By 1, 2, 4 and 8 logged transitions; up to 40 of its own."""
  record = records.load(finished_run)
  for point in ('offline', 'online-matched', 'online-oracle'):
    found = records.diagnoses(record.evaluations[point])
    np.testing.assert_array_equal(
      found['logged_transitions'], [[1, 2, 4, 8]] * 2
    )
    np.testing.assert_array_equal(
      found['own_transitions'], [[1, 2, 4, 8, 16, 32, 40]] * 2
    )
    for name in ('kl_to_prior', 'reward_error'):
      assert (found[f'{name}_by_logged_transitions'] > 0).all()
      assert found[f'{name}_by_own_transitions'].shape == (2, 7)


# Kill and resume.


def test_stopped_in_every_phase(finished_run, tmp_path):
  """Each stop is honoured where it was asked for; the sum is one run."""
  asked = [
    ('collect', 6),
    ('offline', 2),
    ('offline', 6),
    ('online/matched', 6),
    ('online/oracle', 2),
  ]
  for stage, step in asked:
    setup = tiny_run.make_setup(
      tmp_path,
      stop=tiny_run.StopAt(tmp_path / stage, step),
      runtime={'checkpoint_every_s': 900.0},
    )
    with pytest.raises(Interrupted):
      phases.run(setup, tiny_run.PHASES)
    assert tiny_run.checkpoint_steps(tmp_path, stage)[-1] == step
    complete = (stage, step) == ('offline', 6)
    assert setup.is_done(stage) == complete
    following = tiny_run.STAGES[tiny_run.STAGES.index(stage) + 1 :]
    assert not any((tmp_path / later).exists() for later in following)
  phases.run(tiny_run.make_setup(tmp_path), tiny_run.PHASES)
  assert not tiny_run.differing(
    tiny_run.results(finished_run), tiny_run.results(tmp_path)
  )


@pytest.mark.parametrize('stage', ['collect', 'offline', 'online/matched'])
def test_killed_without_warning(finished_run, copied, stage):
  """Goes on from the checkpoint before; what came after it is forgotten."""
  _unfinish(copied, stage)
  checkpoints = copied / stage / 'checkpoints'
  *_, before, last = tiny_run.checkpoint_steps(copied, stage)
  # Before its record was written; a complete one would be taken.
  (checkpoints / str(last)).rename(checkpoints / f'.tmp-{last}')
  (checkpoints / f'.tmp-{last}' / 'record.json').unlink()
  with (copied / stage / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 9, "valu')
  if stage == 'collect':
    (copied / 'dataset').rename(copied / '.dataset.tmp')
  seen = []
  setup = tiny_run.make_setup(copied)
  with pytest.MonkeyPatch.context() as patch:
    run = loop.run
    patch.setattr(
      loop,
      'run',
      lambda progress, updater, **kw: (
        seen.append(
          int(progress.iteration) * updater.total + int(progress.updates)
        ),
        run(progress, updater, **kw),
      )[1],
    )
    phases.run(setup, (stage.split('/')[0],))
  assert seen == [before]
  assert not tiny_run.differing(
    tiny_run.results(finished_run), tiny_run.results(copied)
  )


def test_damaged_checkpoint_falls_back(finished_run, copied):
  _unfinish(copied, 'online/matched')
  checkpoints = copied / 'online' / 'matched' / 'checkpoints'
  last = tiny_run.checkpoint_steps(copied, 'online/matched')[-1]
  largest = max(
    (p for p in (checkpoints / str(last)).rglob('*') if p.is_file()),
    key=lambda p: p.stat().st_size,
  )
  os.truncate(largest, largest.stat().st_size // 2)
  with pytest.warns(UserWarning, match=f'step {last} is damaged'):
    phases.run(tiny_run.make_setup(copied), ('online',))
  assert not tiny_run.differing(
    tiny_run.results(finished_run), tiny_run.results(copied)
  )


def test_finished_phases_are_not_repeated(copied, monkeypatch):
  monkeypatch.setattr(
    loop, 'run', lambda *a, **k: pytest.fail('a stage ran again')
  )
  phases.run(tiny_run.make_setup(copied), ('collect', 'offline', 'online'))


def test_finished_stages_drop_their_replays(finished_run, copied):
  """What later phases read stays."""
  setup = tiny_run.make_setup(copied, runtime={'keep_checkpoints': False})
  for stage in ('collect', 'offline'):
    setup.mark_done(stage)
    assert not (copied / stage / 'checkpoints').exists()
  assert (copied / 'online' / 'matched' / 'checkpoints').exists()
  _unfinish(copied, 'online/matched')
  shutil.rmtree(copied / 'online' / 'matched')
  phases.run(setup, tiny_run.PHASES)
  online = ('online/oracle',)
  ours, theirs = (
    {k: v for k, v in tiny_run.results(where, online).items()}
    for where in (copied, finished_run)
  )
  assert not tiny_run.differing(ours, theirs)
  assert not (copied / 'online' / 'matched' / 'checkpoints').exists()
  assert (copied / 'online' / 'matched' / 'final').exists()


# Rewards are absent from the self-supervised phase.


def _online_with_poison(finished_run, workdir, variant, value):
  """(unpoisoned, poisoned) learner state, replay and metrics at the end."""
  shutil.copytree(finished_run, workdir)
  stage = f'online/{variant}'
  shutil.rmtree(workdir / 'online')
  setup = tiny_run.make_setup(workdir)
  clean = phases.make_evaluator(setup)
  poisoned = dataclasses.replace(
    setup, family=probes.PoisonedReward(setup.family, value)
  )
  phases.online(poisoned, variant, clean)
  return [
    {
      **tiny_run.last_progress(folder, stage),
      'metrics': tiny_run.metrics(folder / stage / 'metrics.jsonl'),
    }
    for folder in (finished_run, workdir)
  ]


def test_self_supervision_reads_no_reward(finished_run, tmp_path):
  clean, poisoned = _online_with_poison(
    finished_run, tmp_path / 'run', 'matched', float('nan')
  )
  assert any(name.startswith('replay.query.') for name in clean)
  assert any(name.startswith('state.params.') for name in clean)
  assert not tiny_run.differing(clean, poisoned)


def test_oracle_does_read_it(finished_run, tmp_path):
  clean, poisoned = _online_with_poison(
    finished_run, tmp_path / 'run', 'oracle', 7.0
  )
  differing = tiny_run.differing(clean, poisoned)
  assert 'replay.query.data.reward' in differing
  assert any('params.critic' in name for name in differing)


# Bad input: one message, a non-zero status, earlier results intact.


@pytest.fixture(name='command')
def _command(capsys):
  """(workdir, phases, overrides, profile) -> (exit status, message)."""
  with tiny_run.command() as command:

    def run(*args, **kw):
      capsys.readouterr()
      status = command(*args, **kw)
      error = capsys.readouterr().err
      lines = [x for x in error.splitlines() if x.startswith('error: ')]
      assert len(lines) == (status == 1), error
      return status, error[error.find('error: ') :]

    yield run


def _digests(workdir):
  """Every file that must survive a failure."""
  kept = ('dataset', 'final', 'checkpoints', 'evaluations', 'report')
  found = {
    str(path): hashlib.sha256(path.read_bytes()).hexdigest()
    for path in workdir.rglob('*')
    if path.is_file() and set(kept) & set(path.relative_to(workdir).parts)
  }
  assert found
  return found


_BAD_SETTINGS = [
  ({'smac.kl_wieght': 1.0}, r'config\.smac\.kl_wieght: unknown key; known'),
  ({'chunk': 'many'}, r"config\.chunk: 'many' is str, but int is needed"),
  ({'chunk': 0}, r'config\.chunk: must be at least 1'),
  ({'family.name': 'moon'}, "unknown family 'moon'; known: ant_dir"),
  ({'family.options': {'goal': 1}}, "unknown option 'goal' of family"),
  ({'family.task_list': 'lost'}, r"task_list: .*'lost'"),
  ({'family.task_list': 'random:x'}, 'write "random:SEED"'),
  ({'family.task_list': 'random:4294967296'}, 'number from 0 to 4294967295'),
  ({'family.num_train': 10_000}, 'num_train: 10000 asked for, but task list'),
  ({'seed': 5}, r'another configuration(.|\n)*seed: 0 -> 5'),
]


@pytest.mark.parametrize(
  'overrides, message', _BAD_SETTINGS, ids=[str(x[0]) for x in _BAD_SETTINGS]
)
def test_bad_setting(copied, command, overrides, message):
  before = _digests(copied)
  run_json = (copied / 'run.json').read_text()
  status, error = command(copied, tiny_run.PHASES, overrides)
  assert status == 1
  assert re.search(message, error), error
  assert _digests(copied) == before
  assert (copied / 'run.json').read_text() == run_json


@pytest.mark.parametrize(
  'key, value, phase, message',
  [
    ('collect.iterations', 10**9, 'collect', '1,000,000,000 iterations'),
    ('online.iterations', 10**9, 'online', 'updates; a learner counts up'),
    ('smac.offline.query_size', 2 * 10**9, 'offline', 'a batch '),
    ('smac.critic_hidden', (10**6, 10**6), 'offline', 'TB  learners'),
    ('evaluation.num_repeats', 10**9, 'offline', 'an evaluation '),
    ('finetune.iterations', 10**9, 'finetune', 'TB  replay'),
  ],
)
def test_a_size_that_no_memory_holds(
  finished_run, tmp_path, command, key, value, phase, message
):
  data = {'collect.dataset': str(finished_run / 'dataset')}
  if phase == 'collect':
    data = {}
  status, error = command(tmp_path / 'run', (phase,), data | {key: value})
  assert status == 1 and message in error, error
  assert not (tmp_path / 'run').exists()


def test_seeds_that_do_not_divide_over_processes(monkeypatch, tmp_path):
  """All processes would do the same."""
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  with pytest.raises(
    configs.ConfigError, match='num_seeds: 3 seeds .* over 2 processes'
  ):
    tiny_run.make_setup(tmp_path, {'num_seeds': 3})
  setup = tiny_run.make_setup(tmp_path, {'num_seeds': 4})
  assert setup.seeds.layout.split and setup.seeds.keys.shape == (2,)


def test_unknown_phase_and_profile(tmp_path, command):
  status, error = command(tmp_path / 'run', ('collect', 'tune'))
  assert status == 1 and 'unknown tune; known: collect,off' in error
  status, error = command(tmp_path / 'run', ('collect',), profile='huge')
  assert status == 1 and "no profile 'huge'; it has: smoke" in error
  assert not (tmp_path / 'run').exists()


def test_a_package_that_is_missing(tmp_path, command, monkeypatch):
  monkeypatch.setitem(sys.modules, 'brax', None)
  status, error = command(
    tmp_path / 'run', ('collect',), {'family.name': 'ant_goal'}
  )
  assert status == 1 and 'need brax, mujoco, mujoco-mjx: ' in error, error


@pytest.mark.parametrize(
  'name, message',
  [
    ('offline', 'no dataset; run --phases=collect first'),
    ('online', "not finished; run the phase 'offline' first"),
    ('test', 'no dataset; run --phases=collect first'),
    ('report', 'nothing that was trained has been tested'),
  ],
)
def test_phase_before_its_input(finished_run, tmp_path, command, name, message):
  if name == 'online':
    for name_ in ('dataset', 'dataset_test'):
      shutil.copytree(finished_run / name_, tmp_path / 'run' / name_)
  status, error = command(tmp_path / 'run', (name,))
  assert status == 1 and message in error, error


@pytest.mark.parametrize(
  'overrides, message',
  [
    ({'family.name': 'sparse_point_robot'}, 'family of the data is'),
    ({'family.options': {'goals': 'circle'}}, 'made with other options: goals'),
    ({'family.task_list': 'random:3'}, "task parameter 'goal' differs"),
    ({'family.num_train': 2}, "task parameter 'goal' differs"),
    ({'collect.dataset': '/nowhere'}, 'not a dataset; check the path'),
  ],
  ids=['family', 'options', 'task_list', 'num_train', 'missing'],
)
def test_dataset_of_something_else(
  finished_run, tmp_path, command, overrides, message
):
  data = {'collect.dataset': str(finished_run / 'dataset')}
  status, error = command(tmp_path / 'run', ('collect',), data | overrides)
  assert status == 1 and message in error, error
  assert not (tmp_path / 'run' / 'collect' / 'done.json').exists()


def _rewrite(dataset, name, change):
  """Alters an array and makes the manifest agree with it."""
  path = dataset / f'{name}.npy'
  array = np.load(path)
  change(array)
  np.save(path, array)
  manifest = json.loads((dataset / 'manifest.json').read_text())
  manifest['leaves'][name]['sha256'] = hashlib.sha256(
    path.read_bytes()
  ).hexdigest()
  (dataset / 'manifest.json').write_text(json.dumps(manifest))


def _truncate(dataset):
  path = dataset / 'transitions.reward.npy'
  os.truncate(path, path.stat().st_size - 8)


def _alter(dataset):
  path = dataset / 'transitions.reward.npy'
  data = bytearray(path.read_bytes())
  data[-1] ^= 1
  path.write_bytes(data)


def _put_nan(dataset):
  def change(array):
    array[1, 2] = np.nan

  _rewrite(dataset, 'transitions.reward', change)


@pytest.mark.parametrize(
  'damage, message',
  [
    (lambda d: (d / 'transitions.reward.npy').unlink(), 'file is missing'),
    (lambda d: shutil.rmtree(d), 'no dataset; run'),
    (_truncate, 'is truncated'),
    (_alter, 'was altered'),
    (_put_nan, r'transitions.reward(.|\n)*finite'),
  ],
  ids=['leaf', 'all', 'truncated', 'altered', 'nan'],
)
def test_damaged_dataset(copied, command, damage, message):
  damage(copied / 'dataset')
  _unfinish(copied, 'offline')
  before = _digests(copied)
  for name in ('offline', 'test'):
    status, error = command(copied, (name,))
    assert status == 1 and re.search(message, error), error
  assert _digests(copied) == before


def test_diverged_run(finished_run, tmp_path, command):
  """The second update cannot be finite; what the first left still can be."""
  overrides = {
    'collect.dataset': str(finished_run / 'dataset'),
    'chunk': 1,
    'smac.critic_lr': 1e30,
    'smac.actor_lr': 1e30,
    'smac.context_lr': 1e30,
  }
  workdir = tmp_path / 'run'
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(collect, '_score_references', lambda *args: None)
    patch.setattr(phases, 'make_evaluator', lambda setup: _NoEvaluator)
    status, error = command(workdir, ('collect', 'offline'), overrides)
  assert status == 1 and 'training diverged at smac, step ' in error, error
  last = tiny_run.last_progress(workdir, 'offline')
  assert all(np.isfinite(x).all() for k, x in last.items() if 'params' in k)
  assert not (workdir / 'offline' / 'done.json').exists()


def test_disk_full_while_checkpointing(
  finished_run, copied, command, monkeypatch
):
  _unfinish(copied, 'offline')
  shutil.rmtree(copied / 'offline')
  before = _digests(copied)
  save, calls = checkpointing.ocp.save, []

  def full(*args, **kwargs):
    calls.append(1)
    if len(calls) == 2:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return save(*args, **kwargs)

  with monkeypatch.context() as patch:
    patch.setattr(checkpointing.ocp, 'save', full)
    status, error = command(copied, ('offline',))
  assert status == 1 and 'disk is full' in error, error
  assert 'checkpoint of step 2 is intact' in error
  assert {k: v for k, v in _digests(copied).items() if k in before} == before
  assert command(copied, ('offline',))[0] == 0
  assert not tiny_run.differing(
    tiny_run.results(finished_run), tiny_run.results(copied)
  )


def test_disk_full_while_scoring(copied, command, monkeypatch):
  def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(np, 'savez', full)
  before = _digests(copied)
  status, error = command(copied, ('test',))
  assert status == 1
  assert re.match(
    r'error: .*/evaluations/\w+\.npz: No space left on device; what was',
    error,
  ), error
  assert _digests(copied) == before


# The workdir, and what was noted in it.


def test_a_workdir_that_is_a_file(tmp_path, command):
  file = tmp_path / 'file'
  file.write_text('mine')
  for workdir in (file, file / 'run'):
    status, error = command(workdir, ('collect',))
    assert status == 1 and f'{file} is a file, no folder' in error, error
    assert 'intact' not in error
  assert file.read_text() == 'mine'


def test_a_workdir_in_use(copied, command):
  before = _digests(copied)
  with workdir_lock.hold(copied):
    status, error = command(copied, tiny_run.PHASES)
  assert status == 1 and f'process {os.getpid()} on ' in error, error
  assert _digests(copied) == before
  assert command(copied, ('collect',))[0] == 0  # it is free again


@pytest.mark.parametrize(
  'text', ['', 'garbage', '[]', '3', '{"config_hash": 3}', '{"other": 1}']
)
def test_a_description_of_the_run_that_is_none(copied, command, text):
  (copied / 'run.json').write_text(text)
  status, error = command(copied, ('collect',))
  assert status == 1 and 'use another --workdir' in error, error
  assert (copied / 'run.json').read_text() == text


@pytest.mark.parametrize('text', ['', 'garbage', '[]', '{"offline": "long"}'])
def test_times_that_cannot_be_read(copied, command, text):
  (copied / 'timing.json').write_text(text)
  with pytest.warns(UserWarning, match='timing.json.*counting begins anew'):
    assert command(copied, ('collect',))[0] == 0
  assert list(json.loads((copied / 'timing.json').read_text())) == ['collect']


def test_metrics_that_cannot_be_read(copied, command):
  _unfinish(copied, 'offline')
  file = copied / 'offline' / 'metrics.jsonl'
  rows = file.read_text()
  file.write_text('garbage\n' + rows)
  status, error = command(copied, ('offline',))
  assert status == 1 and 'line 1 is not a row of metrics' in error, error


# Stopping.


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_second_one_ends(
  copied, command, monkeypatch, number
):
  _unfinish(copied, 'online/matched')
  shutil.rmtree(copied / 'online' / 'matched')
  monkeypatch.setattr(phases, 'make_evaluator', lambda setup: _NoEvaluator)
  write, seen = metrics.JsonlWriter.write, []

  def kill(self, step, *args, **kw):
    write(self, step, *args, **kw)
    if not seen:
      os.kill(os.getpid(), number)
      seen.append([signal.getsignal(n) for n in (number, signal.SIGTERM)])

  monkeypatch.setattr(metrics.JsonlWriter, 'write', kill)
  status, error = command(copied, ('online',))
  assert status == 143, error
  assert seen == [[signal.SIG_DFL] * 2]
  assert tiny_run.checkpoint_steps(copied, 'online/matched') == [2]


def test_interrupted_before_anything_listens():
  def work():
    raise KeyboardInterrupt

  status, message = launch.attempt(work)
  assert status == 143 and 'the same command continues' in message


# Slices and buffers.


@pytest.mark.parametrize(
  'key, value', [('collect.log_size', 999), ('collect.context_size', 41)]
)
def test_slice_that_no_log_will_hold(
  tmp_path, command, monkeypatch, key, value
):
  monkeypatch.setattr(
    loop, 'run_loop', lambda *a, **k: pytest.fail('began to train')
  )
  status, error = command(tmp_path / 'run', ('collect',), {key: value})
  assert status == 1 and f'config.{key}: {value} transitions' in error, error


def _behaviour_replay(workdir):
  """The behaviour policy's two buffers at the end, as `collect` cuts them."""
  arrays = tiny_run.last_progress(workdir, 'collect')

  def part(name):
    get = lambda field: arrays[f'replay.{name}.{field}'][0]
    data = Transition(
      *(get(f'data.{field}') for field in Transition._fields[:-1]),
      extras={x: get(f'data.extras.{x}') for x in ('features', 'time')},
    )
    return types.SimpleNamespace(data=data, size=get('size'))

  return types.SimpleNamespace(query=part('query'), context=part('context'))


@pytest.mark.parametrize('log_slice', ['first', 'last'])
def test_slices_of_the_behaviour_log(finished_run, tmp_path, log_slice):
  replay = _behaviour_replay(finished_run)
  setup = tiny_run.make_setup(
    tmp_path,
    {'collect': {'log_slice': log_slice, 'log_size': 30, 'context_size': 20}},
  )
  data = collect_pearl.cut(setup, replay)
  assert (data.size == 30).all() and (data.context_size == 20).all()
  assert len(set(replay.query.size)) > 1 or log_slice == 'first'
  for task, size in enumerate(replay.query.size):
    rows = slice(0, 30) if log_slice == 'first' else slice(size - 30, size)
    np.testing.assert_array_equal(
      data.transitions.reward[task], replay.query.data.reward[task, rows]
    )
    end = replay.context.size[task]
    np.testing.assert_array_equal(
      data.context.observation[task],
      replay.context.data.observation[task, end - 20 : end],
    )


def test_steps_that_blew_up_are_recorded(finished_run):
  record = records.load(finished_run)
  for point, name, size in (
    ('collect', 'dataset_diverged', 1),
    ('collect', 'random_diverged', 2),
    ('collect', 'behaviour_diverged', 1),
    ('offline', 'diverged', 2),
    ('online-matched', 'diverged', 2),
  ):
    np.testing.assert_array_equal(record.array(point, name), np.zeros(size))


def test_default_dataset_is_the_last_part(finished_run):
  replay = _behaviour_replay(finished_run)
  data = datasets.load(finished_run / 'dataset')
  assert data.context is None
  for task, size in enumerate(replay.query.size):
    np.testing.assert_array_equal(
      data.transitions.action[task],
      replay.query.data.action[task, size - 40 : size],
    )


def test_shared_buffer_is_one(finished_run):
  setup = tiny_run.make_setup(finished_run)
  data = phases.offline_replays(setup).train
  assert data.context is None
  config = configs.from_dict({'online': {'share_buffer': False}}, setup.config)
  separate = phases._online_replays(setup, config, data)
  size = data.query.data.reward.shape[1]
  for buffer in separate:
    assert buffer.data.reward.shape[2] > size
    for seed in range(2):
      np.testing.assert_array_equal(
        buffer.data.reward[seed, :, :size], data.query.data.reward
      )
  names = tiny_run.last_progress(finished_run, 'online/matched')
  assert not any(name.startswith('replay.context') for name in names)


def test_separate_encoder_data(finished_run, tmp_path):
  """Own context data: posterior episodes go to the query buffer alone."""
  changes = {
    'collect': {'context_size': 20, 'dataset': str(tmp_path / 'data')},
    'online': {'share_buffer': False},
  }
  setup = tiny_run.make_setup(tmp_path / 'run', changes)
  data = collect_pearl.cut(setup, _behaviour_replay(finished_run))
  datasets.save(tmp_path / 'data', data, setup.family.spec, {})
  phases.offline(setup, _NoEvaluator)
  phases.online(setup, 'matched', _NoEvaluator)
  last = tiny_run.last_progress(tmp_path / 'run', 'online/matched')
  rl = last['replay.query.size'] - data.size
  encoder = last['replay.context.size'] - data.context_size
  assert (encoder.sum(-1) == 2 * 2 * 40).all()  # prior steps of 4 visits
  np.testing.assert_array_equal(rl, 2 * encoder)  # and as many posterior ones
  new = last['replay.context.data.observation'][:, :, :20]
  np.testing.assert_array_equal(
    new, np.broadcast_to(data.context.observation, new.shape)
  )
