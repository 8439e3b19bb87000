"""A replay on the host and a replay on the device give the same."""

import shutil
import types

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from examples import cloning
from offmeta.algorithms import smac
from offmeta.data import buffer as buffers
from offmeta.data.buffer import Replay
from offmeta.phases import run as phases
from offmeta.testing import probes
from offmeta.training import (
  gatherers,
  setup as setups,
  streaming,
  updates,
)
from offmeta.training.config import ConfigError, Visits
from offmeta.types import Problem

_M, _ROWS = 4, 6
_CLONING = cloning.Config(
  latent_size=2, hidden=(6,), num_tasks=4, query_size=3, context_size=5
)
_ORACLE = 'online/oracle'
_TASKS = {
  'value': jnp.array([1.0, -2.0, 0.5, 3.0]),
  'lifetime': jnp.array([2.0, 5.0, 3.0, 4.0]),
}


def _buffer(family, seed, capacity=120):
  data = jax.jit(
    lambda: probes.random_transitions(
      jax.random.key(seed), family.spec, (_M, _ROWS)
    )
  )()
  return buffers.make(data, jnp.full(_M, _ROWS), capacity, 8)


def _stack(tree, number):
  return jax.tree.map(lambda x: jnp.stack([x] * number), tree)


# Every layout where seeds take different numbers of rounds, one of them where
# they do not.
@pytest.mark.parametrize(
  'terminates, layout',
  [
    (True, {}),
    (True, {'share': 'seeds'}),
    (True, {'num_tasks': 2, 'share': 'tasks'}),
    (False, {}),
  ],
  ids=['one device', 'seeds', 'tasks', 'as many rounds'],
)
def test_gather(terminates, layout):
  """The same rows, also where the seeds take different numbers of rounds."""
  family = probes.CountingFamily(terminates=terminates)
  config = Visits(
    prior_steps=9,
    posterior_steps=8,
    context_size=7,
    label_context_size=8,
    clear_context=False,
  )
  algorithm = smac.make(Problem(family.spec), helpers.SMAC)
  seeds = helpers.seeds(jax.random.split(jax.random.key(1), 2), **layout)
  states = updates.init_states(algorithm, seeds)
  task_id = np.array([[2, 0, 2], [1, 3, 3]])

  def run(place):
    setup = types.SimpleNamespace(
      family=family, train_tasks=_TASKS, runtime=setups.Runtime(replay=place)
    )
    replay = gatherers.new_replay(
      setup,
      seeds,
      lambda *parts: Replay(*parts),
      _buffer(family, 0),
      _buffer(family, 1),
    )
    gather = gatherers.make_gather(setup, algorithm, seeds, config)
    for number in range(2):
      replay, metrics = gather(
        states, replay, task_id, seeds.streams(f'round {number}')
      )
    return replay, metrics

  (device, logged), (host, logged_too) = run('device'), run('host')
  assert host.query.data.reward.devices() == {streaming.host()}
  np.testing.assert_array_equal(
    *[m['gather/diverged'] for m in (logged, logged_too)]
  )
  for one, other in zip(device, host):
    for name in (
      'size',
      'offline_size',
      'sequence_start',
      'sequence_length',
      'num_sequences',
    ):
      np.testing.assert_array_equal(
        getattr(one, name), getattr(other, name), name
      )
    held = np.arange(120) < np.asarray(one.size)[..., None]
    valid = lambda data: jax.tree.map(lambda x: np.asarray(x)[held], data)
    helpers.assert_close(valid(one.data), valid(other.data), 1e-5, 1e-6)
  new = np.asarray(host.query.size) - _ROWS
  # Twice 17 steps at least for each visit, and none elsewhere.
  assert np.all(new[0] >= [34, 0, 68, 0]) and not new[0, 1] and not new[0, 3]


@pytest.mark.parametrize(
  'shared, layout',
  [
    (True, {}),
    (True, {'num_tasks': 4, 'share': 'tasks'}),
    (False, {'share': 'seeds'}),
    (False, {'num_tasks': 4, 'share': 'tasks'}),
  ],
  ids=['one device', 'tasks', 'own, seeds', 'own, tasks'],
)
def test_updates(shared, layout):
  """An algorithm of few operations, which compile twice for each layout."""
  family = probes.CountingFamily()
  seeds = helpers.seeds(jax.random.split(jax.random.key(0), 2), **layout)
  replay = Replay(_buffer(family, 0), _buffer(family, 1))
  if not shared:  # every seed has its own
    replay = jax.tree.map(lambda x: jnp.stack([x, x]), replay)
    data = replay.query.data
    replay = replay._replace(
      query=replay.query._replace(
        data=data._replace(
          action=data.action * jnp.array([1.0, -0.5])[:, None, None, None]
        )
      )
    )
  make = lambda axis: cloning.make(Problem(family.spec), _CLONING, axis)
  make_stage = lambda axis: make(axis).loop('offline').stages[0]

  def run(make_update, replay):
    state = updates.init_states(make(None), seeds)
    update = make_update(make_stage, seeds, 8, shared_replay=shared)
    for _ in range(2):
      state, metrics = update(state, replay)
    return state, metrics

  state, metrics = run(updates.make_update, replay)
  streamed, logged = run(streaming.make_update, streaming.to_host(replay))
  # The same batches, other programs: rounding, which Adam makes steps of.
  helpers.assert_close(streamed, state, 1e-4, 2e-5, leaf_rtol=2e-6)
  helpers.assert_close(logged, metrics, 1e-4, 1e-5)
  assert np.all(np.asarray(streamed.step) == 16)


def test_batches_come_to_the_learner(monkeypatch):
  """Where host and device are not the same, and after a checkpoint too."""
  host = jax.devices()[3]
  monkeypatch.setattr(streaming, 'host', lambda: host)
  family = probes.CountingFamily()
  seeds = helpers.seeds(jax.random.split(jax.random.key(0), 2))
  algorithm = smac.make(Problem(family.spec), helpers.SMAC)
  setup = types.SimpleNamespace(
    family=family, train_tasks=_TASKS, runtime=setups.Runtime(replay='host')
  )
  replay = gatherers.new_replay(
    setup, seeds, lambda x: Replay(x, None), _buffer(family, 0)
  )
  update = streaming.make_update(
    lambda axis: (
      smac.make(Problem(family.spec), helpers.SMAC, axis)
      .loop('offline')
      .stages[0]
    ),
    seeds,
    2,
    shared_replay=False,
  )
  gather = gatherers.make_gather(
    setup,
    algorithm,
    seeds,
    Visits(
      prior_steps=5, posterior_steps=5, context_size=3, label_context_size=3
    ),
  )
  state = updates.init_states(algorithm, seeds)
  for committed in (False, True):
    if committed:
      state = jax.device_put(state, jax.devices()[0])
    state, metrics = update(state, replay)
    replay, _ = gather(state, replay, np.array([[0], [1]]), seeds.keys)
    for leaf in jax.tree.leaves((state, metrics)):
      assert leaf.devices() == {jax.devices()[0]}
    for leaf in jax.tree.leaves(replay):
      assert leaf.devices() == {host}


def test_whole_run(finished_run, tmp_path):
  """On given logs, one variant; the other is there to be scored with it."""
  setup = tiny_run.make_setup(tmp_path / 'run', runtime={'replay': 'host'})
  for given in ('collect', 'dataset', 'dataset_test', _ORACLE):
    shutil.copytree(finished_run / given, tmp_path / 'run' / given)
  phases.run(setup, tiny_run.PHASES)
  host, device = (
    tiny_run.results(tmp_path / 'run'),
    tiny_run.results(finished_run),
  )
  assert device.keys() - host.keys() == {
    name for name in device if name.startswith('evaluations/collect')
  }
  for name in (
    'evaluations/offline:test_self_returns',
    'evaluations/online-matched:test_self_returns',
  ):
    np.testing.assert_allclose(
      host[name], device[name], rtol=1e-3, atol=1e-3, err_msg=name
    )


def test_no_cpu_backend(monkeypatch):

  def local_devices(backend):
    raise RuntimeError(f'Unknown backend {backend}')

  monkeypatch.setattr(jax, 'local_devices', local_devices)
  with pytest.raises(ConfigError, match='--replay=host: .*cuda,cpu'):
    streaming.host()
