"""Returns of logged episodes, against a loop over steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from offmeta.losses import returns
from offmeta.types import Transition

_GAMMA = 0.9


def _log(lengths, discounts, padding=0, first_time=0):
  """Episodes of these lengths in a row; rows of NaN behind them.

  Args:
    lengths: of the episodes.
    discounts: of their last steps.
    padding: rows that are not valid.
    first_time: the step at which the first episode's log begins.
  """
  rng = np.random.default_rng(0)
  count = sum(lengths)
  time = np.concatenate([np.arange(length) for length in lengths])
  time[: lengths[0]] += first_time
  discount = np.ones(count)
  discount[np.cumsum(lengths) - 1] = discounts
  leaves = dict(
    observation=rng.normal(size=(count, 2)),
    action=rng.normal(size=(count, 1)),
    reward=rng.normal(size=count),
    discount=discount,
    next_observation=rng.normal(size=(count, 2)),
    extras={'time': time, 'features': rng.normal(size=(count, 1))},
  )
  pad = lambda x: np.float32(
    np.concatenate([x, np.full((padding,) + x.shape[1:], np.nan)])
  )
  valid = np.float32([1] * count + [0] * padding)
  return Transition(**jax.tree.map(pad, leaves)), valid


_annotate = jax.jit(returns.annotate)


def _loop(log, size):
  """The same, one row at a time, forward in time from every row."""
  log = jax.tree.map(lambda x: np.asarray(x, np.float64), log)
  time = log.extras['time']
  rows = []
  for start in range(size):
    end = start
    while end + 1 < size and time[end + 1] > 0:
      end += 1
    steps = end - start + 1
    rows.append(
      (
        sum(_GAMMA**k * log.reward[start + k] for k in range(steps)),
        _GAMMA**steps,
        log.next_observation[end],
        log.discount[end],
      )
    )
  names = ('return_to_go', 'bootstrap', 'last_observation', 'last_discount')
  return {name: np.array(leaf) for name, leaf in zip(names, zip(*rows))}


@pytest.mark.parametrize(
  'lengths, discounts, padding, first_time',
  [
    ((4,), (1,), 0, 0),  # a time limit
    ((3, 1, 5), (0, 0, 1), 0, 0),  # falls, one of them at once
    ((3, 2), (1, 0), 4, 0),  # rows that do not count
    ((2, 3), (1, 1), 1, 7),  # a log that begins in the middle of an episode
    ((1,), (1,), 0, 0),
  ],
  ids=str,
)
def test_annotate_against_a_loop(lengths, discounts, padding, first_time):
  log, valid = _log(lengths, discounts, padding, first_time)
  found = jax.device_get(_annotate(log, valid, _GAMMA))
  size = sum(lengths)
  expected = _loop(log, size)
  assert set(found) == set(expected)
  for name, leaf in expected.items():
    assert found[name].shape == (size + padding,) + leaf.shape[1:], name
    np.testing.assert_allclose(
      found[name][:size], leaf, rtol=1e-5, atol=1e-6, err_msg=name
    )
    np.testing.assert_array_equal(found[name][size:], 0.0, err_msg=name)


def test_annotate_by_hand():
  """Rewards 1, 2, 4 to a fall; then 8 and the log's end."""
  log, valid = _log((3, 1), (0, 1))
  log = log._replace(reward=np.float32([1.0, 2.0, 4.0, 8.0]))
  found = _annotate(log, valid, 0.5)
  np.testing.assert_allclose(found['return_to_go'], [3, 4, 4, 8])
  # Gamma of a last step is gamma; a fall does not make it 0.
  np.testing.assert_allclose(found['bootstrap'], [0.125, 0.25, 0.5, 0.5])
  np.testing.assert_array_equal(found['last_discount'], [0, 0, 0, 1])
  np.testing.assert_array_equal(
    found['last_observation'], log.next_observation[np.array([2, 2, 2, 3])]
  )


def test_a_log_that_is_cut_ends_its_episode():
  log, valid = _log((5,), (0,))
  valid[3:] = 0.0
  found = jax.device_get(_annotate(log, valid, _GAMMA))
  np.testing.assert_allclose(
    found['return_to_go'][0],
    sum(_GAMMA**k * float(log.reward[k]) for k in range(3)),
    rtol=1e-5,
  )
  np.testing.assert_array_equal(
    found['last_observation'][:3], np.tile(log.next_observation[2], (3, 1))
  )
  np.testing.assert_array_equal(found['last_discount'][:3], 1.0)
  np.testing.assert_allclose(found['bootstrap'][2], _GAMMA)


def test_annotate_over_tasks():
  logs = [_log((3, 2), (0, 1), 2), _log((2, 5), (1, 1))]
  stacked = jax.tree.map(lambda *x: np.stack(x), *logs)
  annotate = jax.jit(lambda *given: returns.annotate(*given, _GAMMA))
  found = jax.device_get(jax.jit(jax.vmap(annotate))(*stacked))
  for m, given in enumerate(logs):
    for name, leaf in annotate(*given).items():
      np.testing.assert_array_equal(found[name][m], leaf)


def test_bootstrapped_by_hand():
  # 3 + 0.5 * 4; -1 + 0 * 7
  given = np.float32([[3.0, -1.0], [0.5, 0.0], [4.0, 7.0]])
  found, gradients = jax.jit(
    lambda *x: (
      returns.bootstrapped(*x),
      jax.grad(lambda *x: jnp.sum(returns.bootstrapped(*x)), (0, 1, 2))(*x),
    )
  )(*given)
  np.testing.assert_array_equal(found, [5.0, -1.0])
  assert not np.any(np.stack(gradients))
  with pytest.raises(AssertionError):
    returns.bootstrapped(given[0], given[1], given[2][:, None])
