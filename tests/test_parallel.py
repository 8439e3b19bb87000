"""One device against four, on the whole learner state."""

import dataclasses

import helpers
import jax
from jax.sharding import Mesh, PartitionSpec
import jax.numpy as jnp
import numpy as np
import pytest

from offmeta import parallel
from offmeta.algorithms import pearl, smac
from offmeta.data import buffer as buffers
from offmeta.data.buffer import Replay
from offmeta.losses import policy as policy_losses
from offmeta.testing import probes
from offmeta.training import loop

_KEYS = jax.random.split(jax.random.key(0), 1)
_COLD = dataclasses.replace(helpers.SMAC, awac_temperature=0.1)


def test_four_devices():
  assert jax.local_device_count() == 4


@pytest.fixture(name='replay', scope='module')
def _replay():
  """Tasks of very different reward and action, so that advantages differ."""
  data = jax.jit(lambda key: probes.random_transitions(
      key, helpers.SPEC, (6, 30)))(jax.random.key(1))
  scale = 4.0 * jnp.arange(6.0)[:, None]
  data = data._replace(
      reward=data.reward * scale - scale,
      action=jnp.clip(data.action + 0.2 * scale[..., None] - 2.0, -1, 1))
  buffer = buffers.make(data, jnp.full(6, 30), 30, 2)
  for task in range(6):
    buffer = buffers.record_sequence(
        buffer, task, jnp.int32(3), jnp.int32(9))
  return Replay(buffer, None)


def _run(make, config, phase, replay, devices):
  init = jax.jit(jax.vmap(make(helpers.SPEC, config).init))
  state = init(_KEYS)
  state = state.replace(params=helpers.shaken(state.params))
  update = loop.make_update(
      lambda axis: getattr(make(helpers.SPEC, config, axis), phase)[0],
      helpers.seeds(
          _KEYS, num_tasks=4, share='tasks', max_devices=devices), 10,
      shared_replay=True)
  return state, *update(state, replay)


_OURS = dataclasses.replace(
    _COLD, train_context_online=True, kl_over_tasks='sum',
    backprop_q_into_encoder=True, online=dataclasses.replace(
        _COLD.online, context='episodes', sequence_size=8))


@pytest.mark.parametrize('make, config, phase', [
    (smac.make, _COLD, 'offline'),
    (smac.make, _OURS, 'online'),
    (pearl.make, helpers.PEARL, 'online'),
], ids=['smac offline', 'smac online', 'pearl'])
def test_one_device_against_four(replay, make, config, phase):
  start, one, metrics = _run(make, config, phase, replay, 1)
  _, four, metrics_four = _run(make, config, phase, replay, 4)
  # Sums of float32 in another order, 10 updates: relative 1e-4, and absolute
  # 2e-5, which is 0.2% of one step of the smallest learning rate. Gradients
  # of order 30 cancel to 0.08 in places: 2e-6 (16 ulp) of the leaf's largest.
  helpers.assert_close(four, one, 1e-4, 2e-5, leaf_rtol=2e-6)
  helpers.assert_close(metrics_four, metrics, 1e-3, 1e-4)
  assert np.all(np.asarray(one.step) == 10)
  # No device axis: as unsharded, and replicated.
  for (path, leaf), before in zip(
      jax.tree.leaves_with_path(four), jax.tree.leaves(start)):
    where = jax.tree_util.keystr(path)
    assert leaf.shape == before.shape and leaf.dtype == before.dtype, where
    assert leaf.sharding.is_fully_replicated, where
    assert len(leaf.sharding.device_set) == 4, where


# The cross-task softmax.


def _advantage():
  """[4, 5]; two tasks take nearly all the weight."""
  noise = np.random.default_rng(0).normal(size=(4, 5))
  return jnp.array(
      noise + np.array([0.0, 3.0, -2.0, 2.5])[:, None], jnp.float32)


def test_softmax_weights_over_devices():
  advantage = _advantage()
  expected = np.exp(np.asarray(advantage, np.float64) / 0.7)
  expected *= advantage.size / expected.sum()
  weights = lambda a: policy_losses.softmax_advantage_weights(
      a, 0.7, parallel.TASK_AXIS)
  spec = PartitionSpec(parallel.TASK_AXIS)
  mesh = Mesh(np.array(jax.devices()[:4]), (parallel.TASK_AXIS,))
  sharded = jax.jit(jax.shard_map(
      weights, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
  np.testing.assert_allclose(sharded(advantage), expected, rtol=1e-5)
  np.testing.assert_allclose(
      jax.pmap(weights, axis_name=parallel.TASK_AXIS)(advantage[:, None])[:, 0],
      expected, rtol=1e-5)
  # What a softmax per device would give is far away.
  alone = jax.vmap(
      lambda a: policy_losses.softmax_advantage_weights(a, 0.7))(advantage)
  assert np.abs(alone - expected).max() > 0.5


def test_collectives_without_an_axis_are_the_identity():
  x = jnp.array([1.0, 2.0])
  for fn in (parallel.pmean, parallel.psum, parallel.pmax):
    np.testing.assert_array_equal(fn(x, None), x)
  assert parallel.axis_size(None) == 1
  np.testing.assert_array_equal(parallel.local_slots(4, None), np.arange(4))


def test_collectives_over_devices():

  def fn(x):
    slots = parallel.local_slots(8, parallel.TASK_AXIS)
    mine = jnp.sum(x[slots])
    return (parallel.pmean(mine, parallel.TASK_AXIS),
            parallel.psum(mine, parallel.TASK_AXIS),
            parallel.pmax(mine, parallel.TASK_AXIS),
            jnp.float32(parallel.axis_size(parallel.TASK_AXIS)))

  # Slots 01 23 45 67 hold 1 2 4 8 16 32 64 128: sums 3, 12, 48, 192.
  layout = parallel.make_layout(1, 8, share='tasks')
  result = layout.compile(fn, (0,))(2.0 ** jnp.arange(8)[None])
  np.testing.assert_array_equal(np.concatenate(result), [63.75, 255, 192, 4])


@pytest.mark.parametrize('count', [1, 4, 6, 9])
def test_shared_vmap(count):
  """As vmap, whether devices divide the entries or not."""

  def fn(shared, x, key):
    return {'sum': shared + x, 'noise': jax.random.normal(key, (2,))}

  def whole(shared, key):
    x = jnp.arange(1.0, count + 1)
    keys = jax.random.split(key, count)
    own = parallel.shared_vmap(
        lambda x: jax.lax.axis_index(parallel.TASK_AXIS),
        parallel.TASK_AXIS, (0,))(x)
    return parallel.shared_vmap(fn, parallel.TASK_AXIS, (None, 0, 0))(
        shared, x, keys), own

  keys = jax.random.split(jax.random.key(0), 2)
  shared = jnp.array([10.0, 20.0])
  layout = parallel.make_layout(2, 4, share='tasks')
  assert len(layout.devices) == 4 and layout.axis_name == parallel.TASK_AXIS
  result, own = layout.compile(whole, (0, 0))(shared, keys)
  for s in range(2):
    expected = jax.vmap(fn, (None, 0, 0))(
        shared[s], jnp.arange(1.0, count + 1),
        jax.random.split(keys[s], count))
    helpers.assert_same(jax.tree.map(lambda x: x[s], result), expected)
  # Every device did its share.
  each = -(-count // 4)
  np.testing.assert_array_equal(own[0], np.arange(count) // each)


def test_meta_batches_divide_over_devices():
  fn = lambda x: parallel.local_slots(6, parallel.TASK_AXIS)
  layout = parallel.make_layout(1, 4, share='tasks')
  with pytest.raises(ValueError, match='6 tasks does not divide over 4'):
    layout.compile(fn, (0,))(jnp.zeros(1))


@pytest.mark.parametrize('number, limit, expected', [
    (4, 4, 4), (4, 3, 2), (4, 8, 4), (6, 4, 3), (5, 4, 1), (16, 1, 1)])
def test_largest_divisor(number, limit, expected):
  assert parallel.largest_divisor(number, limit) == expected


@pytest.mark.parametrize('seeds, tasks, options, devices, axis', [
    (8, 4, {}, 4, None),
    (6, 4, {}, 3, None),  # seeds first: nothing is exchanged
    (1, 4, {}, 4, 'task'),
    (1, 6, {}, 3, 'task'),
    (5, 5, {}, 1, None),
    (8, 4, {'share': 'tasks'}, 4, 'task'),
    (1, 4, {'share': 'seeds'}, 1, None),
    (8, 4, {'max_devices': 2}, 2, None),
    (1, 4, {'max_devices': 1}, 1, None),
])
def test_layout(seeds, tasks, options, devices, axis):
  layout = parallel.make_layout(seeds, tasks, **options)
  assert (len(layout.devices), layout.axis_name) == (devices, axis)
  assert layout.seeds == range(seeds) and not layout.split
  what = 'tasks shared out' if axis else 'seeds spread'
  assert layout.describe() == f'{what} over {devices} of 4 devices'


def test_unknown_share():
  with pytest.raises(ValueError, match="share='hosts'; choose"):
    parallel.make_layout(1, 4, share='hosts')


@pytest.mark.parametrize('seeds', [4, 3, 5])
def test_seeds_over_devices(seeds):
  """As plain vmap, whether devices divide the seeds or not."""

  def one(state, shared, key):
    noise = jax.random.normal(key, (3,))
    return {'w': state['w'] * shared + noise}, jnp.sum(noise)

  state = {'w': jnp.arange(3.0 * seeds).reshape(seeds, 3)}
  keys = jax.random.split(jax.random.key(0), seeds)
  axes = (0, None, 0)
  expected = jax.jit(jax.vmap(one, axes))(state, 2.0, keys)
  # The state comes last: it may be donated.
  layout = parallel.make_layout(seeds, share='seeds')
  helpers.assert_close(
      layout.compile(one, axes, donate=(0,))(state, 2.0, keys),
      expected, 1e-6, 1e-6)
