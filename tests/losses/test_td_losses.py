"""Temporal-difference losses by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from offmeta.losses import td


def test_td_target_by_hand():
  # 5 * 1 + 0.9 * 1 * 10 = 14; a termination: 5 * 2 + 0 = 10; -5 + 4.5 = -0.5
  td_target = jax.jit(td.td_target)
  target = td_target(
    np.float32([1.0, 2.0, -1.0]),
    np.float32([1.0, 0.0, 1.0]),
    np.float32([10.0, 10.0, 5.0]),
    0.9,
    5.0,
  )
  np.testing.assert_allclose(target, [14.0, 10.0, -0.5], rtol=1e-6)
  # Without scale: 1 + 9.
  np.testing.assert_allclose(
    td_target(np.ones(1), np.ones(1), np.full(1, 10.0), 0.9),
    [10.0],
    rtol=1e-6,
  )


def test_td_target_has_no_gradient():
  arrays = [np.float32([1.0, 2.0])] * 3
  gradients = jax.jit(jax.grad(lambda x: jnp.sum(td.td_target(*x, 0.9, 5.0))))(
    arrays
  )
  assert not np.any(np.stack(gradients))


def test_squared_error_by_hand():
  # (3 - 1)^2 = 4, (-1 - 0.5)^2 = 2.25
  error = jax.jit(td.squared_error)(
    np.float32([3.0, -1.0]), np.float32([1.0, 0.5])
  )
  np.testing.assert_allclose(error, [4.0, 2.25])
  # Into the prediction 2 (3 - 1) = 4, into the target -4.
  gradients = jax.jit(jax.grad(lambda p, t: td.squared_error(p, t)[0], (0, 1)))(
    np.float32([3.0]), np.float32([1.0])
  )
  np.testing.assert_allclose(np.stack(gradients), [[4.0], [-4.0]])


def test_ensemble_squared_error_by_hand():
  # Members (1, 2) and (3, 0) against (2, 2): 1 + 1, 0 + 4.
  error = jax.jit(td.ensemble_squared_error)(
    np.float32([[1.0, 2.0], [3.0, 0.0]]), np.float32([2.0, 2.0])
  )
  np.testing.assert_allclose(error, [2.0, 4.0])


def test_ensemble_of_one_is_the_squared_error():
  q, y = np.float32([[0.3, -2.0]]), np.float32([1.0, 1.0])
  np.testing.assert_array_equal(
    jax.jit(td.ensemble_squared_error)(q, y), jax.jit(td.squared_error)(q[0], y)
  )


_FLAT, _COLUMN = np.ones((3,)), np.ones((3, 1))


@pytest.mark.parametrize(
  'call',
  [
    lambda: td.td_target(_COLUMN, _FLAT, _FLAT, 0.9),
    lambda: td.td_target(_FLAT, _COLUMN, _FLAT, 0.9),
    lambda: td.td_target(_FLAT, _FLAT, _COLUMN, 0.9),
    lambda: td.squared_error(_COLUMN, _FLAT),
    lambda: td.squared_error(_FLAT, _COLUMN),
    lambda: td.ensemble_squared_error(np.ones((2, 3, 1)), _FLAT),
    lambda: td.ensemble_squared_error(np.ones((2, 3)), _COLUMN),
    # Without the ensemble axis, or with targets per member.
    lambda: td.ensemble_squared_error(_FLAT, _FLAT),
    lambda: td.ensemble_squared_error(np.ones((2, 3)), np.ones((2, 3))),
  ],
)
def test_wrong_shapes_raise(call):
  with pytest.raises(AssertionError):
    call()


def test_clipped_squared_error_by_hand():
  """V_old 1, clip 0.5: the larger error of V and of V within 0.5 of V_old."""
  prediction = np.float32([1.2, 3.0, 3.0, 0.0])
  old, target = np.ones(4), np.float32([2.0, 3.0, 1.0, 0.25])
  loss = lambda v: td.clipped_squared_error(v, old, target, 0.5)
  # (1.2 - 2)^2; (1.5 - 3)^2 rather than 0; (3 - 1)^2; 0.25^2 both ways.
  found, gradient = jax.jit(
    lambda v: (loss(v), jax.grad(lambda v: jnp.sum(loss(v)))(v))
  )(prediction)
  np.testing.assert_allclose(found, [0.64, 2.25, 4.0, 0.0625], rtol=1e-6)
  np.testing.assert_allclose(
    np.asarray(gradient)[:3], [-1.6, 0.0, 4.0], rtol=1e-6
  )
