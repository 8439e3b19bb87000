"""Memory that phases announce, against the replays that they make."""

import os
import pathlib
import shutil
import subprocess
import sys

import helpers
import jax
import pytest
import tiny_run

from offmeta.training import budget, collect, memory, phases, streaming
from offmeta.training import config as configs
from offmeta.training import stage as stages
from offmeta.training.setup import write_json

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
    asked[-1] = (demands, asked[-1])

  monkeypatch.setattr(memory, 'available_bytes', available)
  monkeypatch.setattr(memory, 'check', check)
  return asked


def _held(tree):
  """Bytes of a tree on all devices together."""
  return sum(
      shard.data.nbytes
      for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards)


def _assert_announced(asked, setup, seeds, progress, dataset=None):
  """Of the one phase that was asked for: data, learners, devices."""
  (demands, devices), = asked
  found = {demand.what: demand.nbytes for demand in demands}
  one = sum(
      helpers.numbers(leaf).nbytes for leaf in jax.tree.leaves(progress.state))
  on_host = setup.runtime.replay == 'host'
  copied = seeds.layout.axis_name and not on_host
  expected = {'learners': one * (len(devices) if copied else 1)}
  data = [dataset]
  if progress.replay is not None:
    data += progress.replay
  names = 'dataset', 'replay', 'replay for contexts'
  data = {name: x for name, x in zip(names, data) if x is not None}
  expected.update({name: _held(x) for name, x in data.items()})
  assert found == expected
  assert devices == (
      [streaming.host()] if on_host else seeds.layout.local_devices)
  assert set(devices) == {
      shard.device for leaf in jax.tree.leaves(data)
      for shard in leaf.addressable_shards}


@pytest.mark.parametrize('runtime', _PLACES, ids=str)
def test_collect(asked, tmp_path, runtime):
  setup = tiny_run.make_setup(tmp_path, runtime=runtime)
  budget.check(setup, ('collect',))
  seeds = collect.behaviour_seeds(setup)
  algorithm = setup.algorithm('pearl', setup.config.collect.behaviour)
  progress = collect._behaviour_start(setup, algorithm, seeds, fresh=False)
  assert progress.replay.encoder is not None
  _assert_announced(asked, setup, seeds, progress)


@pytest.mark.parametrize('runtime', _PLACES, ids=str)
@pytest.mark.parametrize('one_buffer', [True, False])
def test_offline_and_online(
    compile_once, finished_run, asked, tmp_path, monkeypatch, runtime,
    one_buffer):
  setup = tiny_run.make_setup(tmp_path, {
      'collect': {'dataset': str(finished_run / 'dataset')},
      'online': {'share_encoder_buffer': one_buffer}}, runtime=runtime)
  algorithm = setup.algorithm('smac', setup.config.smac)
  monkeypatch.setattr(
      stages, 'final_states', lambda setup, stage, algorithm, seeds: (
          stages.init_states(algorithm, seeds)))
  dataset = phases.offline_replay(setup)
  progress = phases._online_start(
      setup, configs.variant(setup.config, 'matched'), algorithm, dataset)
  assert (progress.replay.encoder is None) == one_buffer
  budget.check(setup, ('offline',))
  _assert_announced(
      asked, setup, setup.seeds, progress._replace(replay=None), dataset.rl)
  asked.clear()
  write_json(tmp_path / 'online/oracle/done.json', {})
  budget.check(setup, ('online',))
  _assert_announced(asked, setup, setup.seeds, progress, dataset.rl)


def test_before_there_is_a_dataset_its_size_is_known(
    compile_once, finished_run, tmp_path):
  """From the configuration as from the files."""
  before = budget.check(tiny_run.make_setup(tmp_path), phases.PHASES)
  for stage in ('collect', 'dataset'):
    shutil.copytree(finished_run / stage, tmp_path / stage)
  after = budget.check(tiny_run.make_setup(tmp_path), phases.PHASES)
  assert [line.split(':')[0] for line in before[:-1]] == [
      f'memory, {name}' for name in tiny_run.STAGES]
  assert after[:-1] == before[1:-1]


def test_finished_phases_are_left_out(compile_once, finished_run):
  setup = tiny_run.make_setup(finished_run)
  assert not budget.check(setup, phases.PHASES)


def test_only_what_is_asked_for(asked, tmp_path):
  setup = tiny_run.make_setup(tmp_path)
  assert not budget.check(setup, ('test', 'report')) and not asked
  assert len(budget.check(setup, ('collect',))) == len(asked) == 1


@pytest.mark.parametrize('replay, place', [
    ('device', 'on the devices in use'), ('host', 'in the host')])
def test_what_is_available_is_told(tmp_path, monkeypatch, replay, place):
  monkeypatch.setattr(memory, 'available_bytes', lambda devices: 5 * 10 ** 9)
  setup = tiny_run.make_setup(tmp_path, runtime={'replay': replay})
  *_, last = budget.check(setup, phases.PHASES)
  assert last == f'memory available {place}: 5.00 GB'


def test_the_phase_that_does_not_fit_is_named(tmp_path, monkeypatch):
  """Collecting fits, with the margin; a later phase does not."""
  setup = tiny_run.make_setup(tmp_path)
  monkeypatch.setattr(memory, 'available_bytes', lambda devices: 10 ** 9)
  lines = budget.check(setup, phases.PHASES)
  assert lines[0].startswith('memory, collect: 45.5 kB')
  size = lines[2].removeprefix('memory, online/matched: ').split(' (')[0]
  monkeypatch.setattr(memory, 'available_bytes', lambda devices: 60_000)
  with pytest.raises(configs.ConfigError) as error:
    budget.check(setup, phases.PHASES)
  message = str(error.value)
  assert message.startswith(
      f'phase online/matched: this run would keep {size} in memory')
  assert '2 seeds x 3 tasks x' in message and '60.0 kB  available' in message
  assert '--replay=host' in message


def test_a_run_that_cannot_fit_ends_before_it_starts(tmp_path):
  """The command, asked for 14 TB per task."""
  workdir = tmp_path / 'run'
  done = subprocess.run(
      [sys.executable, '-m', 'experiments.run', f'--workdir={workdir}',
       '--config=tests/tiny_config.py', '--profile=smoke',
       '--config.collect.initial_steps=300000000000'],
      cwd=_ROOT, text=True, capture_output=True, timeout=120,
      env={**os.environ, 'JAX_COMPILATION_CACHE_DIR': str(tmp_path / 'xla'),
           'PYTHONPATH': f'{_ROOT}{os.pathsep}{_ROOT / "tests"}'})
  assert done.returncode == 1, done.stderr
  assert done.stderr.startswith(
      '\nerror: phase collect: this run would keep 86.4 TB in memory')
  assert '1 seed x 3 tasks x 300,000,000,180 transitions x 48 B' in done.stderr
  assert 'Traceback' not in done.stderr and not done.stdout
  assert not workdir.exists()
