"""Temporal-difference losses by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from offmeta.losses import td


def test_td_target_by_hand():
  # 5 * 1 + 0.9 * 1 * 10 = 14; a termination: 5 * 2 + 0 = 10; -5 + 4.5 = -0.5
  target = td.td_target(
    jnp.array([1.0, 2.0, -1.0]),
    jnp.array([1.0, 0.0, 1.0]),
    jnp.array([10.0, 10.0, 5.0]),
    0.9,
    5.0,
  )
  np.testing.assert_allclose(target, [14.0, 10.0, -0.5], rtol=1e-6)
  # Without scale: 1 + 9.
  np.testing.assert_allclose(
    td.td_target(jnp.ones(1), jnp.ones(1), jnp.full(1, 10.0), 0.9),
    [10.0],
    rtol=1e-6,
  )


def test_td_target_has_no_gradient():
  arrays = [jnp.array([1.0, 2.0])] * 3
  gradients = jax.grad(lambda x: jnp.sum(td.td_target(*x, 0.9, 5.0)))(arrays)
  assert not np.any(np.stack(gradients))


def test_squared_error_by_hand():
  # (3 - 1)^2 = 4, (-1 - 0.5)^2 = 2.25
  error = td.squared_error(jnp.array([3.0, -1.0]), jnp.array([1.0, 0.5]))
  np.testing.assert_allclose(error, [4.0, 2.25])
  # Into the prediction 2 (3 - 1) = 4, into the target -4.
  gradients = jax.grad(lambda p, t: td.squared_error(p, t)[0], (0, 1))(
    jnp.array([3.0]), jnp.array([1.0])
  )
  np.testing.assert_allclose(np.stack(gradients), [[4.0], [-4.0]])


def test_ensemble_squared_error_by_hand():
  # Members (1, 2) and (3, 0) against (2, 2): 1 + 1, 0 + 4.
  error = td.ensemble_squared_error(
    jnp.array([[1.0, 2.0], [3.0, 0.0]]), jnp.array([2.0, 2.0])
  )
  np.testing.assert_allclose(error, [2.0, 4.0])


def test_ensemble_of_one_is_the_squared_error():
  q, y = jnp.array([[0.3, -2.0]]), jnp.array([1.0, 1.0])
  np.testing.assert_array_equal(
    td.ensemble_squared_error(q, y), td.squared_error(q[0], y)
  )


_FLAT, _COLUMN = jnp.ones((3,)), jnp.ones((3, 1))


@pytest.mark.parametrize(
  'call',
  [
    lambda: td.td_target(_COLUMN, _FLAT, _FLAT, 0.9),
    lambda: td.td_target(_FLAT, _COLUMN, _FLAT, 0.9),
    lambda: td.td_target(_FLAT, _FLAT, _COLUMN, 0.9),
    lambda: td.squared_error(_COLUMN, _FLAT),
    lambda: td.squared_error(_FLAT, _COLUMN),
    lambda: td.ensemble_squared_error(jnp.ones((2, 3, 1)), _FLAT),
    lambda: td.ensemble_squared_error(jnp.ones((2, 3)), _COLUMN),
    # Without the ensemble axis, or with targets per member.
    lambda: td.ensemble_squared_error(_FLAT, _FLAT),
    lambda: td.ensemble_squared_error(jnp.ones((2, 3)), jnp.ones((2, 3))),
  ],
)
def test_wrong_shapes_raise(call):
  with pytest.raises(AssertionError):
    call()


def test_clipped_squared_error_by_hand():
  """V_old 1, clip 0.5: the larger error of V and of V within 0.5 of V_old."""
  prediction = jnp.array([1.2, 3.0, 3.0, 0.0])
  old, target = jnp.ones(4), jnp.array([2.0, 3.0, 1.0, 0.25])
  loss = lambda v: td.clipped_squared_error(v, old, target, 0.5)
  # (1.2 - 2)^2; (1.5 - 3)^2 rather than 0; (3 - 1)^2; 0.25^2 both ways.
  np.testing.assert_allclose(
    loss(prediction), [0.64, 2.25, 4.0, 0.0625], rtol=1e-6
  )
  gradient = jax.grad(lambda v: jnp.sum(loss(v)))(prediction)
  np.testing.assert_allclose(gradient[:3], [-1.6, 0.0, 4.0], rtol=1e-6)
