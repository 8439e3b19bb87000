"""A fixed share of query rows from what was collected online."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from offmeta.data import buffer as buffers, sampler
from offmeta.data.buffer import Replay
from offmeta.types import BatchSpec, Exploration, Rows, Transition

_OFFLINE = np.array([6, 10, 8])
_SIZES = np.array([20, 14, 8])  # nothing came for task 2
_SPEC = BatchSpec(4, Rows(8), Rows(5))


def _shared(share, spec=_SPEC):
  return spec._replace(query=spec.query._replace(online_share=share))


@pytest.fixture(name='replay', scope='module')
def _replay():
  """Rewards are 100 * task + row; one buffer serves both roles."""
  number = jnp.arange(20) + 100.0 * jnp.arange(3)[:, None]
  wide = number[..., None]
  buffer = buffers.make(
    Transition(wide, wide, number, jnp.ones_like(number), wide),
    jnp.asarray(_OFFLINE),
    20,
    1,
  )
  buffer = buffer._replace(size=jnp.asarray(_SIZES, jnp.int32))
  for task, (start, length) in enumerate([(6, 4), (10, 3)]):
    buffer = buffers.record_sequence(
      buffer, task, jnp.int32(start), jnp.int32(length)
    )
  return Replay(buffer, None)


@functools.partial(jax.jit, static_argnums=(1,))
def _draw(replay, spec, slots):
  return jax.vmap(
    lambda step: sampler.sample_batch(
      jax.random.key(0), step, slots, spec, replay
    )
  )(jnp.arange(400))


def _sample(replay, spec=_SPEC, slots=range(4)):
  return jax.device_get(_draw(replay, spec, jnp.array(list(slots))))


def _rows(batch):
  """Row number of each query transition."""
  return batch.query.reward - 100 * batch.task_id[..., None]


@pytest.mark.parametrize(
  'share, count', [(0.0, 0), (0.25, 2), (0.3, 2), (0.9, 7), (1.0, 8)]
)
def test_that_many_rows_of_every_batch_came_online(replay, share, count):
  batch = _sample(replay, _shared(share))
  rows = _rows(batch)
  for part in (batch.query.observation, batch.query.next_observation):
    np.testing.assert_array_equal(part[..., 0], batch.query.reward)
  for task in range(3):
    drawn = rows[batch.task_id == task]
    online = drawn >= _OFFLINE[task]
    expected = count if _SIZES[task] > _OFFLINE[task] else 0
    np.testing.assert_array_equal(online.sum(axis=1), expected)
    # Uniform in both parts, and from nowhere else.
    for part, start, stop in (
      (drawn[~online], 0, _OFFLINE[task]),
      (drawn[online], _OFFLINE[task], _SIZES[task]),
    ):
      if part.size:
        counts = np.bincount(part.astype(int) - start, minlength=stop - start)
        assert counts.size == stop - start
        assert stats.chisquare(counts).pvalue > 1e-4


def test_without_a_share_it_is_that_of_the_data(replay):
  batch = _sample(replay)
  rows = _rows(batch)
  for task in range(3):
    online = rows[batch.task_id == task] >= _OFFLINE[task]
    share = 1 - _OFFLINE[task] / _SIZES[task]
    error = np.sqrt(share * (1 - share) / online.size)
    assert abs(online.mean() - share) <= 4 * error
    if share:  # no batch is made to hold just so many
      assert len(set(online.sum(axis=1))) > 3


@pytest.mark.parametrize(
  'context',
  [
    Rows(5),
    Rows(5, 'offline'),
    Exploration(5, 6, 0.3),
  ],
  ids=str,
)
def test_contexts_and_tasks_are_the_same(replay, context):
  spec = _SPEC._replace(context=context)
  plain = _sample(replay, spec)
  shared = _sample(replay, _shared(0.5, spec))
  for name in ('task_id', 'context_mask'):
    np.testing.assert_array_equal(getattr(shared, name), getattr(plain, name))
  np.testing.assert_array_equal(shared.context.reward, plain.context.reward)
  assert not np.array_equal(shared.query.reward, plain.query.reward)


def test_a_slot_draws_the_same_on_any_device(replay):
  spec = _shared(0.5)
  whole, some = _sample(replay, spec), _sample(replay, spec, (2, 3))
  jax.tree.map(
    lambda x, y: np.testing.assert_array_equal(x[:, 2:], y), whole, some
  )
