"""One device against several and two processes, on the whole state."""

import functools

import helpers
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
import numpy as np
import parallel_worker as worker
import processes
import pytest

from offmeta import parallel
from offmeta.losses import policy as policy_losses


def test_four_devices():
  assert jax.local_device_count() == 4


@pytest.fixture(name='run', scope='module')
def _run():
  """`worker.run`, once for each of its arguments."""
  return functools.cache(
    functools.partial(worker.run, replay=worker.make_replay())
  )


def _assert_as_on_one_device(state, metrics, one, metrics_one):
  # Sums of float32 in another order, 10 updates: relative 1e-4, and absolute
  # 2e-5, which is 0.2% of one step of the smallest learning rate. Gradients
  # of order 30 cancel to 0.08 in places: 2e-6 (16 ulp) of the leaf's largest.
  # It is rounding: with float64 throughout the difference is gone.
  helpers.assert_close(state, one, 1e-4, 2e-5, leaf_rtol=2e-6)
  helpers.assert_close(metrics, metrics_one, 1e-3, 1e-4)


@pytest.mark.parametrize(
  'case, share, devices',
  [
    *((case, 'tasks', 4) for case in worker.CASES if case != 'focal'),
    ('smac online', 'tasks', 2),
    ('sac', 'seeds', 4),
  ],
)
def test_one_device_against_several(run, case, share, devices):
  start, one, metrics_one = run(case, max_devices=1)
  _, several, metrics = run(case, max_devices=devices, share=share)
  _assert_as_on_one_device(several, metrics, one, metrics_one)
  assert np.all(np.asarray(one.step) == worker.UPDATES)
  # No device axis: as unsharded, and replicated or spread.
  for (path, leaf), before in zip(
    jax.tree.leaves_with_path(several), jax.tree.leaves(start)
  ):
    where = jax.tree_util.keystr(path)
    assert leaf.shape == before.shape and leaf.dtype == before.dtype, where
    assert leaf.sharding.is_fully_replicated == (share == 'tasks'), where
    assert len(leaf.sharding.device_set) == devices, where


@pytest.fixture(name='two_processes', scope='module')
def _two_processes(tmp_path_factory):
  """What the worker's two processes wrote; two devices each."""
  folder = tmp_path_factory.mktemp('processes')
  processes.run_processes(worker.__file__, [folder], timeout=200)
  return folder


@pytest.mark.parametrize('case, share', worker.SPLIT)
def test_one_device_against_two_processes(run, two_processes, case, share):
  one = worker.by_path(run(case, max_devices=1)[1:])
  with np.load(two_processes / f'{case} {share}.npz') as file:
    both = dict(file)
  if share == 'tasks':  # Each process has all seeds, the same to the bit.
    parts = {name: np.split(leaf, 2) for name, leaf in both.items()}
    both, others = ({k: v[i] for k, v in parts.items()} for i in range(2))
    helpers.assert_same(both, others)
  pick = lambda found, first: {
    k: v for k, v in found.items() if k.startswith(first)
  }
  _assert_as_on_one_device(
    *(pick(found, first) for found in (both, one) for first in ('[0]', '[1]'))
  )


# The cross-task softmax.


def _advantage():
  """[4, 5]; two tasks take nearly all the weight."""
  noise = np.random.default_rng(0).normal(size=(4, 5))
  return jnp.array(
    noise + np.array([0.0, 3.0, -2.0, 2.5])[:, None], jnp.float32
  )


def test_softmax_weights_over_devices():
  advantage = _advantage()
  expected = np.exp(np.asarray(advantage, np.float64) / 0.7)
  expected *= advantage.size / expected.sum()
  weights = lambda a: policy_losses.softmax_advantage_weights(
    a, 0.7, parallel.TASK_AXIS
  )
  spec = PartitionSpec(parallel.TASK_AXIS)
  mesh = Mesh(np.array(jax.devices()[:4]), (parallel.TASK_AXIS,))
  sharded = jax.jit(
    jax.shard_map(
      weights, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
    )
  )
  np.testing.assert_allclose(sharded(advantage), expected, rtol=1e-5)
  np.testing.assert_allclose(
    jax.pmap(weights, axis_name=parallel.TASK_AXIS)(advantage[:, None])[:, 0],
    expected,
    rtol=1e-5,
  )
  # What a softmax per device would give is far away.
  alone = jax.vmap(lambda a: policy_losses.softmax_advantage_weights(a, 0.7))(
    advantage
  )
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
    return (
      parallel.pmean(mine, parallel.TASK_AXIS),
      parallel.psum(mine, parallel.TASK_AXIS),
      parallel.pmax(mine, parallel.TASK_AXIS),
      jnp.float32(parallel.axis_size(parallel.TASK_AXIS)),
    )

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
      lambda x: jax.lax.axis_index(parallel.TASK_AXIS), parallel.TASK_AXIS, (0,)
    )(x)
    return parallel.shared_vmap(fn, parallel.TASK_AXIS, (None, 0, 0))(
      shared, x, keys
    ), own

  keys = jax.random.split(jax.random.key(0), 2)
  shared = jnp.array([10.0, 20.0])
  layout = parallel.make_layout(2, 4, share='tasks')
  assert len(layout.devices) == 4 and layout.axis_name == parallel.TASK_AXIS
  result, own = layout.compile(whole, (0, 0))(shared, keys)
  for s in range(2):
    expected = jax.vmap(fn, (None, 0, 0))(
      shared[s], jnp.arange(1.0, count + 1), jax.random.split(keys[s], count)
    )
    helpers.assert_same(jax.tree.map(lambda x: x[s], result), expected)
  # Every device did its share.
  each = -(-count // 4)
  np.testing.assert_array_equal(own[0], np.arange(count) // each)


def test_meta_batches_divide_over_devices():
  fn = lambda x: parallel.local_slots(6, parallel.TASK_AXIS)
  layout = parallel.make_layout(1, 4, share='tasks')
  with pytest.raises(ValueError, match='6 tasks does not divide over 4'):
    layout.compile(fn, (0,))(jnp.zeros(1))


@pytest.mark.parametrize(
  'number, limit, expected',
  [(4, 4, 4), (4, 3, 2), (4, 8, 4), (6, 4, 3), (5, 4, 1), (16, 1, 1)],
)
def test_largest_divisor(number, limit, expected):
  assert parallel.largest_divisor(number, limit) == expected


@pytest.mark.parametrize(
  'seeds, tasks, options, devices, axis',
  [
    (8, 4, {}, 4, None),
    (6, 4, {}, 3, None),
    (5, 4, {}, 1, None),
    (1, 4, {}, 1, None),
    (8, 4, {'max_devices': 2}, 2, None),
    (1, 4, {'share': 'tasks'}, 4, 'task'),
    (1, 6, {'share': 'tasks'}, 3, 'task'),
    (8, 4, {'share': 'tasks'}, 4, 'task'),
    (1, 5, {'share': 'tasks'}, 1, None),
    (1, 4, {'share': 'tasks', 'max_devices': 1}, 1, None),
  ],
)
def test_layout(seeds, tasks, options, devices, axis):
  layout = parallel.make_layout(seeds, tasks, **options)
  assert (len(layout.devices), layout.axis_name) == (devices, axis)
  assert layout.seeds == range(seeds) and not layout.split
  what = 'tasks shared out' if axis else 'seeds spread'
  assert layout.describe() == f'{what} over {devices} of 4 devices'


@pytest.mark.parametrize(
  'options',
  [{'max_devices': 1}, {}, {'num_tasks': 4, 'share': 'tasks'}],
  ids=['one', 'seeds', 'tasks'],
)
def test_results_are_on_the_layout_wherever_arguments_were(options):
  layout = parallel.make_layout(4, **options)
  elsewhere = jax.device_put(jnp.ones((4, 3)), jax.devices()[3])
  compiled = layout.compile(lambda x, shared: x * shared, (0, None))
  result = compiled(elsewhere, elsewhere[0])
  assert result.devices() == set(layout.devices)
  for axis, x in ((0, elsewhere), (None, elsewhere[0])):
    placed = layout.place(x, axis)
    assert placed.devices() == set(layout.devices)
    np.testing.assert_array_equal(placed, x)
  assert compiled(result, layout.place(elsewhere[0], None)).shape == (4, 3)


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
    expected,
    1e-6,
    1e-6,
  )
