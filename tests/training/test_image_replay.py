"""Images: stored once, and streamed from memory maps as from the device."""

import frame_learner as learner
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from offmeta import envs, testing
from offmeta.algorithms import ALGORITHMS
from offmeta.collection import phase as collecting
from offmeta.data import (
  buffer as buffers,
  dataset as datasets,
  frames,
  prepare,
  sampler,
)
from offmeta.data.meta_dataset import DatasetError
from offmeta.phases import run as phases
from offmeta.testing import blob
from offmeta.training import (
  config as configs,
  memory,
  setup as setups,
  streaming,
  updates,
)
from offmeta.types import (
  Exploration,
  Problem,
  Rows,
  Slice,
)

_T, _EPISODES, _TASKS = 8, 40, 3
_CONFIG = {
  'algorithm': 'frames',
  'num_seeds': 2,
  'chunk': 8,
  'family': {
    'name': 'blob',
    'task_list': 'random:0',
    'num_train': _TASKS,
    'num_test': 2,
  },
  'collect': {'source': 'script', 'script_episodes': _EPISODES},
  'evaluation': {
    'num_repeats': 1,
    'num_steps': _T,
    'context_size': 4,
    'num_train_tasks': 2,
    'every_updates': 8,
  },
}
_PHASES = ('collect', 'offline')


@pytest.fixture(autouse=True, scope='module')
def _known():
  learner.register()
  yield
  del envs.FAMILIES['blob'], ALGORITHMS['frames']


def _problem():
  return Problem(blob.Blob().spec, _TASKS)


def _setup(workdir, place):
  return setups.make_setup(
    configs.from_dict(_CONFIG),
    workdir,
    runtime=setups.Runtime(
      checkpoint_every_s=-1.0, keep_checkpoints=True, quiet=True, replay=place
    ),
  )


@pytest.fixture(name='setup', scope='module')
def _finished(tmp_path_factory):
  """A whole run with the replay on the device."""
  setup = _setup(tmp_path_factory.mktemp('images') / 'run', 'device')
  phases.run(setup, _PHASES)
  return setup


def test_the_family_keeps_the_contract():
  testing.check_env_family(blob.Blob(), num_steps=6)


def test_the_contract_refuses_other_pixels():
  family = blob.Blob()
  family.spec = family.spec._replace(observation_dtype='float32')
  with pytest.raises(AssertionError, match='observation is uint8, not float32'):
    testing.check_env_family(family, num_steps=2)
  family.spec = family.spec._replace(observation_shape=(16, 16))
  with pytest.raises(AssertionError, match='observation_shape must be'):
    testing.check_env_family(family, num_steps=2)


def test_the_learner_keeps_the_contract():
  testing.check_algorithm(
    learner.make, learner.Config(), blob.Blob().spec, quick=True
  )


def test_the_script_sees_where_the_blob_is():
  for position in ((0.0, 0.0), (0.3, -0.4)):
    found = jax.jit(lambda at: blob.locate(blob.draw(at)))(np.float32(position))
    np.testing.assert_allclose(found, position, atol=0.02)


def test_vectors_only():
  with pytest.raises(ValueError, match=r'shape \(16, 16, 1\), not vectors'):
    _ = blob.Blob().spec.observation_size


def _collected(setup):
  """What was collected, before frames were stored once."""
  return collecting.SOURCES['script'].make(setup).train


def test_frames_are_stored_once_and_nothing_is_lost(setup):
  stored = collecting.load_dataset(setup)
  assert stored.transitions.next_observation is None
  observation = stored.transitions.observation
  assert observation.dtype == np.uint8
  assert observation.shape == (_TASKS, _EPISODES * (_T + 1), 16, 16, 1)
  assert collecting.dataset_sizes(setup)[0] == observation.shape[1]
  whole = _collected(setup).transitions
  replay = prepare.replay(
    stored,
    learner.make(_problem(), learner.Config()).data,
    setup.family,
    setup.train_tasks,
    jax.random.key(0),
  ).query
  np.testing.assert_array_equal(replay.sequence_length, _T)
  steps = np.arange(_EPISODES * _T)
  rows = steps + steps // _T
  found = buffers.take(replay, np.arange(_TASKS)[:, None], rows[None])
  for name in whole._fields[:-1]:
    np.testing.assert_array_equal(
      getattr(found, name), getattr(whole, name), name
    )
  np.testing.assert_array_equal(found.extras['time'], whole.extras['time'])


def test_episodes_of_any_length_and_cut_logs(setup):
  """Terminations, logs that begin and end within an episode."""
  whole = _collected(setup)
  time = np.array([[5, 6, 0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 0, 1, 7, 7]])
  size = np.array([8, 6], np.int32)
  rng = np.random.default_rng(0)
  image = lambda: rng.integers(0, 255, (2, 8, 2, 2, 1), np.uint8)
  observation, after = image(), image()
  follows = time[:, 1:] != 0
  after[:, :-1][follows] = observation[:, 1:][follows]
  log = whole.transitions._replace(
    observation=observation,
    next_observation=after,
    action=rng.uniform(0.1, 1.0, (2, 8, 2)).astype(np.float32),
    reward=rng.normal(size=(2, 8)).astype(np.float32),
    discount=np.ones((2, 8), np.float32),
    extras={
      'time': time.astype(np.float32),
      'features': rng.normal(size=(2, 8, 2)).astype(np.float32),
    },
  )
  data = frames.once(
    whole._replace(
      transitions=log,
      size=size,
      tasks={'target': np.zeros((2, 2), np.float32)},
      episode_return=np.zeros(2, np.float32),
    )
  )
  np.testing.assert_array_equal(data.size, [8 + 4, 6 + 2])
  spec = setup.family.spec._replace(observation_shape=(2, 2, 1))
  datasets.validate(data, spec)
  replay = prepare._frames_once(
    data, learner.make(_problem(), learner.Config()).data
  ).query
  np.testing.assert_array_equal(
    replay.sequence_length, [[2, 3, 1, 2], [4, 2, 0, 0]]
  )
  for m in range(2):
    rows = np.concatenate(
      [
        start + np.arange(length)
        for start, length in zip(
          np.asarray(replay.sequence_start)[m],
          np.asarray(replay.sequence_length)[m],
        )
      ]
    )
    found = buffers.take(replay, np.int32(m), rows)
    for name in ('observation', 'action', 'reward', 'next_observation'):
      expected = getattr(log, name)[m, : size[m]]
      np.testing.assert_array_equal(getattr(found, name), expected, name)
  # Loose rows are steps, all of them, none more often than others.
  drawn, mask = jax.device_get(
    jax.jit(
      jax.vmap(
        lambda task: sampler.draw_rows(
          jax.random.key(0), replay, task, Rows(4000)
        )
      )
    )(np.arange(2))
  )
  assert np.all(mask == 1)
  for m, ends in enumerate(([2, 6, 8, 11], [4, 7])):
    counts = np.bincount(np.asarray(drawn[m]), minlength=data.size[m])
    assert not counts[ends].any()
    steps = np.delete(counts, ends)[: size[m]]
    assert np.all(np.abs(steps / 4000 - 1 / size[m]) < 0.03)
  for asked in (Slice(2), Exploration(2, 3, 0.5), Rows(2, online_share=0.5)):
    with pytest.raises(ValueError, match='store frames once'):
      sampler.rows_of(jax.random.key(0), replay, jnp.int32(0), asked)
  with pytest.raises(ValueError, match='nothing is appended'):
    buffers.append(replay, 0, log, jnp.int32(1))
  broken = log._replace(observation=image())
  with pytest.raises(DatasetError, match='task 0 that begins in row 0'):
    frames.once(data._replace(transitions=broken, size=size))


@pytest.mark.parametrize('changed', ['action', 'no time', 'single'])
def test_what_is_no_data_of_frames(setup, changed):
  stored = collecting.load_dataset(setup)
  log, size = stored.transitions, np.array(stored.size)
  if changed == 'action':
    action = np.array(log.action)
    action[1, _T] = 0.5  # where the first episode's last frame is
    log, message = log._replace(action=action), f'row {_T} of task 1'
  elif changed == 'no time':
    extras = {'features': log.extras['features']}
    log, message = log._replace(extras=extras), "no 'time'"
  else:  # a first row, alone
    size[2], message = _T + 2, f'row {_T + 1} of task 2'
  with pytest.raises(DatasetError, match=message):
    datasets.validate(
      stored._replace(transitions=log, size=size), setup.family.spec
    )


def test_no_replay_of_frames_grows(setup):
  data = phases.offline_replays(setup).train
  with pytest.raises(configs.ConfigError, match="'blob' observes images"):
    phases._online_replays(setup, setup.config, data)


def test_what_frames_cannot_be_prepared_for(setup):
  stored = collecting.load_dataset(setup)
  asked = learner.make(_problem(), learner.Config()).data
  with pytest.raises(DatasetError, match='stores every frame once'):
    prepare.replay(
      stored,
      asked._replace(returns_discount=0.9),
      setup.family,
      setup.train_tasks,
      jax.random.key(0),
    )


def test_a_run_on_memory_maps_is_the_run_on_the_device(setup, tmp_path):
  mapped = _setup(tmp_path / 'run', 'host')
  phases.run(mapped, _PHASES)
  device, host = (
    tiny_run.results(run.workdir, ('offline',)) for run in (setup, mapped)
  )
  # Means over blocks are summed otherwise than a mean over the chunk.
  logged = [found.pop('offline/metrics') for found in (device, host)]
  assert tiny_run.differing(device, host) == []
  one, other = ([*jax.tree.leaves(rows)] for rows in logged)
  assert len(one) > 2
  for a, b in zip(one, other, strict=True):
    assert a == b if isinstance(a, str) else np.isclose(a, b, 1e-5)


def test_a_file_larger_than_the_blocks(setup):
  """Every block is drawn, looked up and sent; one program, the same result."""
  stored = collecting.load_dataset(setup)
  images = stored.transitions.observation
  while images.base is not None and not isinstance(images, np.memmap):
    images = images.base
  assert isinstance(images, np.memmap)
  config = learner.Config(num_updates=12)
  algorithm = learner.make(_problem(), config)
  replay = prepare.replay(
    stored,
    algorithm.data,
    setup.family,
    setup.train_tasks,
    jax.random.key(0),
  )
  assert np.shares_memory(replay.query.data.observation, images)
  seeds = helpers.seeds(jax.random.split(jax.random.key(3), 2))
  traces = []

  def make_stage(axis):
    [stage] = learner.make(_problem(), config, axis).loop('offline').stages

    def update(state, batch):
      traces.append(batch.query.observation.shape)
      return stage.update(state, batch)

    return stage._replace(update=update)

  # Two seeds, tasks of 3 windows of 5 frames.
  one = 2 * 2 * 3 * 5 * 256
  budget = int(2.5 * one)
  assert memory.nbytes(stored.transitions) > 5 * budget

  def run(make_update, replay, **kw):
    state = updates.init_states(algorithm, seeds)
    update = make_update(make_stage, seeds, 12, True, **kw)
    for _ in range(2):
      state, metrics = update(state, replay)
    return state, metrics

  sent = []
  place = streaming.sampler.collect
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      streaming.sampler,
      'collect',
      lambda *args: sent.append(place(*args)) or sent[-1],
    )
    streamed, logged = run(streaming.make_update, replay, block_bytes=budget)
  assert len(traces) == 1, f'{len(traces)} traces of the update'
  sizes = {memory.nbytes(batch) for batch in sent if len(batch.slot) == 2}
  assert max(sizes) <= budget
  state, metrics = run(updates.make_update, seeds.layout.place(replay, None))
  helpers.assert_same(streamed, state)
  helpers.assert_close(logged, metrics, 1e-5)
  assert np.all(np.asarray(state.step) == 24)
