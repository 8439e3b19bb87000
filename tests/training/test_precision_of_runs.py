"""A run's precision reaches its updates, and nothing else."""

import json

import helpers
import jax
import numpy as np
import pytest
import tiny_run

from experiments.runs import record
from offmeta.data import buffer as buffers
from offmeta.data.buffer import Replay
from offmeta.phases import run as phases
from offmeta.training import (
  config as configs,
  gatherers,
  updates,
  visits as visits_lib,
)


@pytest.fixture(name='make_setup')
def _make_setup(finished_run, tmp_path):
  """(precision, place) -> a setup with the finished run's data."""

  def make(precision, place='device'):
    return tiny_run.make_setup(
      tmp_path,
      {
        'collect': {'dataset': str(finished_run / 'dataset')},
        'matmul_precision': precision,
      },
      runtime={'replay': place},
    )

  return make


def _start(setup):
  """SMAC and its states [S]; parameters that are not small."""
  algorithm = setup.algorithm('smac', setup.config.settings)
  states = updates.init_states(algorithm, setup.seeds)
  return algorithm, states.replace(params=helpers.shaken(states.params))


def _distance(a, b):
  """Largest difference of two trees."""
  return helpers.largest(
    jax.tree.map(lambda x, y: helpers.numbers(x) - helpers.numbers(y), a, b)
  )


def test_updates(make_setup):
  """In either place of the replay, and the same there."""

  def updated(precision, place):
    setup = make_setup(precision, place)
    _, states = _start(setup)
    updater = updates.make_updater(
      setup,
      lambda axis: setup.algorithm('smac', setup.config.settings, axis).loop(
        'offline'
      ),
      setup.seeds,
      1,
      shared_replay=True,
      gathers=False,
    )
    states, _, count, metrics = updater(
      states, phases.offline_replays(setup).train, 0, 0, None
    )
    assert count == setup.config.chunk
    return states.params, metrics

  full, _ = updated('float32', 'device')
  half, metrics = updated('bfloat16', 'device')
  streamed, _ = updated('bfloat16', 'host')
  # 8 bits in products: Adam's steps of 3e-4 may change their sign.
  change = _distance(full, half)
  assert 1e-6 < change < 2e-3
  assert _distance(half, streamed) < 0.1 * change
  assert all(np.all(np.isfinite(value)) for value in metrics.values())


@pytest.mark.parametrize('place', ['device', 'host'])
def test_gathering_does_not_change(make_setup, place):
  """Bit for bit: episodes, their labels, and what they start from."""

  def gathered(precision):
    setup = make_setup(precision, place)
    algorithm, states = _start(setup)
    config = setup.config.online.gather
    assert config.rewards == 'decoder'
    replay = gatherers.new_replay(
      setup,
      setup.seeds,
      lambda data: Replay(
        buffers.make(data.query.data, data.query.size, 300, 4), None
      ),
      phases.offline_replays(setup).train,
    )
    gather = gatherers.gatherer(
      setup,
      algorithm,
      setup.seeds,
      visits_lib.online_visits(setup.config, setup.seeds),
      config,
    )
    return gather(states, replay, 0)

  full, half = gathered('float32'), gathered('bfloat16')
  helpers.assert_same(full, half)
  assert np.all(
    np.sum(full[0].query.size - full[0].query.offline_size, 1) >= 160
  )


def test_run_json_tells(make_setup, tmp_path):
  hashes = set()
  for precision in configs.PRECISIONS[::2]:
    setup = make_setup(precision)
    folder = tmp_path / precision
    folder.mkdir()
    record.write(setup.config, folder, 'smoke', 'the command')
    written = json.loads((folder / 'run.json').read_text())
    assert written['config']['matmul_precision'] == precision
    hashes.add(written['config_hash'])
  assert len(hashes) == 2
