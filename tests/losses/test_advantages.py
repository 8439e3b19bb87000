"""Advantages by hand and against sums over time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from offmeta import parallel
from offmeta.losses import advantages

_GAMMA = 0.9
# One program each; outside jit, jax compiles one per operation and shape.
_generalized = jax.jit(advantages.generalized)
_standardise = jax.jit(advantages.standardise)


def test_termination_and_truncation_by_hand():
  """Both end an episode after two of four steps; gamma = lambda = 0.5.

  delta: 1 + 0.5 * 0 - 1 = 0; then 2 + 0 - 0 = 2 if nothing follows, or
  2 + 0.5 * 2 - 0 = 3 with V = 2 of the last observation; 3 + 0.5 * 1 - 2 = 1.5;
  4 + 0.5 * 3 - 1 = 4.5, bootstrapped where the data end.
  """
  reward = np.float32([1.0, 2.0, 3.0, 4.0])
  value = np.float32([1.0, 0.0, 2.0, 1.0])
  next_value = np.float32([0.0, 2.0, 1.0, 3.0])
  ends = np.float32([0.0, 1.0, 0.0, 0.0])
  rows = [
    _generalized(reward, discount, ends, value, next_value, 0.5, 0.5)
    for discount in (1.0 - ends, np.ones_like(ends))
  ]
  np.testing.assert_allclose(rows[0], [0.5, 2.0, 2.625, 4.5])
  np.testing.assert_allclose(rows[1], [0.75, 3.0, 2.625, 4.5])


@pytest.fixture(scope='module')
def steps():
  """Random steps [2, 3, 12] with ends of both kinds."""
  rng = np.random.default_rng(0)
  shape = (2, 3, 12)
  ends = rng.random(shape) < 0.3
  discount = 1.0 - ends * (rng.random(shape) < 0.5)
  draw = lambda: rng.normal(size=shape)
  return draw(), discount, ends.astype(float), draw(), draw()


def _by_sums(reward, discount, ends, value, next_value, decay):
  """Weighted mean of n-step advantages (arXiv 1506.02438, equation 15)."""
  result = np.zeros_like(reward)
  for at in np.ndindex(reward.shape):
    *env, t = at
    row = lambda x: x[tuple(env)]
    stop = t
    while stop < reward.shape[-1] - 1 and not row(ends)[stop]:
      stop += 1
    for n in range(1, stop - t + 2):
      last = t + n - 1
      total = sum(_GAMMA**i * row(reward)[t + i] for i in range(n))
      total += _GAMMA**n * row(discount)[last] * row(next_value)[last]
      # All later n agree with the last one.
      weight = decay ** (n - 1) * (1.0 if last == stop else 1.0 - decay)
      result[at] += weight * (total - row(value)[t])
  return result


@pytest.mark.parametrize('decay', [0.0, 0.7, 1.0])
def test_against_n_step_sums(steps, decay):
  # The sums take V(s') for V of the next step, as within an episode.
  reward, discount, ends, value, next_value = steps
  inside = np.where(ends[..., :-1] > 0, next_value[..., :-1], value[..., 1:])
  next_value = np.concatenate([inside, next_value[..., -1:]], axis=-1)
  arrays = reward, discount, ends, value, next_value
  found = _generalized(*map(np.float32, arrays), _GAMMA, decay)
  np.testing.assert_allclose(
    found, _by_sums(*arrays, decay), rtol=1e-4, atol=1e-5
  )
  if decay == 0.0:
    one_step = reward + _GAMMA * discount * next_value - value
    np.testing.assert_allclose(found, one_step, rtol=1e-4, atol=1e-5)


def test_no_gradient(steps):
  def total(value):
    return jnp.sum(
      advantages.generalized(*steps[:3], value, steps[4], _GAMMA, 0.5)
      + advantages.standardise(value)
    )

  assert not np.any(jax.jit(jax.grad(total))(np.float32(steps[3])))


def test_standardise_by_hand():
  found = _standardise(np.float32([[1.0, 2.0], [3.0, 6.0]]), eps=0.0)
  std = np.sqrt((4 + 1 + 0 + 9) / 4)
  np.testing.assert_allclose(
    found, np.array([[-2.0, -1.0], [0.0, 3.0]]) / std, rtol=1e-6
  )
  assert not np.any(_standardise(np.ones((2, 3), np.float32)))


def test_standardise_is_over_all_devices():
  layout = parallel.make_layout(1, 2, max_devices=2, share='tasks')
  axis = layout.axis_name

  def shared(x):
    mine = parallel.local_slots(4, axis)
    return parallel.all_gather(advantages.standardise(x[mine], axis), axis)

  x = np.random.default_rng(0).normal(size=(4, 3)) * np.arange(4)[:, None]
  x = np.float32(x)
  found = np.asarray(layout.compile(shared, (0,))(x[None]))[0]
  np.testing.assert_allclose(found, _standardise(x), rtol=1e-5, atol=1e-6)
