"""Actor losses by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from offmeta.losses import policy

# One program each; outside jit, jax compiles one per operation and shape.
_softmax_weights = jax.jit(policy.softmax_advantage_weights, static_argnums=1)


def _with_gradients(loss, *arrays):
  """What a loss gives, and its gradients, summed over its entries."""
  inputs = tuple(range(len(arrays)))
  return jax.device_get(
    jax.jit(
      lambda *a: (
        loss(*a),
        jax.grad(lambda *a: jnp.sum(loss(*a)), inputs)(*a),
      )
    )(*arrays)
  )


def test_softmax_weights_by_hand():
  # Temperature 2: logits (0, ln 2, ln 3, ln 2), exponentials 1, 2, 3, 2 with
  # the sum 8; times the count 4: 0.5, 1, 1.5, 1.
  advantage = 2.0 * np.log(np.float32([[1.0, 2.0], [3.0, 2.0]]))
  weights = _softmax_weights(advantage, 2.0)
  np.testing.assert_allclose(weights, [[0.5, 1.0], [1.5, 1.0]], rtol=1e-6)


def test_softmax_is_over_all_tasks():
  # One task far better than the other takes all the weight: a softmax per
  # task would give all ones here.
  advantage = np.float32([[50.0, 50.0], [0.0, 0.0]])
  weights = _softmax_weights(advantage, 1.0)
  np.testing.assert_allclose(weights, [[2.0, 2.0], [0.0, 0.0]], atol=1e-6)


def test_softmax_with_infinite_temperature_is_behaviour_cloning():
  advantage = np.float32(np.random.default_rng(0).normal(size=(3, 5)))
  weights = _softmax_weights(advantage, float('inf'))
  np.testing.assert_array_equal(weights, np.ones((3, 5)))
  weights = _softmax_weights(advantage, 1e6)
  np.testing.assert_allclose(weights, np.ones((3, 5)), atol=1e-5)


def test_softmax_ignores_a_shift_and_large_values():
  advantage = np.float32([1.0, 2.0, -1.0])
  expected = np.exp([1.0, 2.0, -1.0])
  expected *= 3 / expected.sum()
  for shift in (0.0, 1000.0):
    np.testing.assert_allclose(
      _softmax_weights(advantage + np.float32(shift), 1.0),
      expected,
      rtol=1e-4,
    )


def test_softmax_has_no_gradient():
  _, gradients = _with_gradients(
    lambda a: policy.softmax_advantage_weights(a, 1.0) ** 2,
    np.float32([1.0, 2.0]),
  )
  assert not np.any(gradients[0])


def test_weighted_log_likelihood_by_hand():
  # -(2 * -1), -(0.5 * 3)
  loss, (into_log_prob, into_weight) = _with_gradients(
    policy.weighted_log_likelihood, *np.float32([[-1.0, 3.0], [2.0, 0.5]])
  )
  np.testing.assert_allclose(loss, [2.0, -1.5])
  np.testing.assert_allclose(into_log_prob, [-2.0, -0.5])
  assert not np.any(into_weight)


def test_output_penalty_by_hand():
  mean = np.float32([[1.0, -2.0], [0.0, 3.0]])
  log_std = np.float32([[-1.0, 0.0], [2.0, 1.0]])
  # Mean squares 14 / 4 and 6 / 4.
  np.testing.assert_allclose(
    jax.jit(policy.output_penalty)(mean, log_std, 0.1, 0.01),
    0.35 + 0.015,
    rtol=1e-6,
  )


_ARRAYS = np.float32([[-1.0, 0.5], [2.0, -4.0]])


def test_soft_policy_by_hand():
  # -1 - 2, 0.5 + 4
  loss, gradients = _with_gradients(policy.soft_policy, *_ARRAYS)
  np.testing.assert_allclose(loss, [-3.0, 4.5])
  np.testing.assert_allclose(np.stack(gradients), [[1.0, 1.0], [-1.0, -1.0]])


def test_soft_value_target_by_hand():
  # 2 + 1, -4 - 0.5
  target, gradients = _with_gradients(policy.soft_value_target, *_ARRAYS)
  np.testing.assert_allclose(target, [3.0, -4.5])
  assert not np.any(np.stack(gradients))


def test_temperature_weights_the_entropy():
  # 0.5 * -1 - 2, 0.5 * 0.5 + 4; 2 + 0.5, -4 - 0.25
  loss = jax.jit(policy.soft_policy)(*_ARRAYS, 0.5)
  np.testing.assert_allclose(loss, [-2.5, 4.25])
  target, gradients = _with_gradients(
    lambda t: policy.soft_value_target(*_ARRAYS, t), 0.5
  )
  np.testing.assert_allclose(target, [2.5, -4.25])
  assert gradients[0] == 0.0


def test_temperature_loss_by_hand():
  # Entropies 1 and 3 against a target of 2: -0.5 (-1 + 2), -0.5 (-3 + 2)
  log_prob = np.float32([-1.0, -3.0])
  loss = lambda *a: policy.temperature_loss(*a, 2.0)
  found, (into_alpha, into_log_prob) = jax.jit(
    lambda *a: (loss(*a), jax.jacrev(loss, (0, 1))(*a))
  )(np.float32(0.5), log_prob)
  np.testing.assert_allclose(found, [-0.5, 0.5])
  np.testing.assert_allclose(into_alpha, [-1.0, 1.0])
  assert not np.any(into_log_prob)
  with pytest.raises(AssertionError):
    loss(np.ones(2, np.float32), log_prob)


@pytest.mark.parametrize(
  'loss',
  [
    policy.weighted_log_likelihood,
    policy.soft_policy,
    policy.soft_value_target,
  ],
)
@pytest.mark.parametrize('shapes', [((3, 1), (3,)), ((3,), (3, 1))])
def test_wrong_shapes_raise(loss, shapes):
  with pytest.raises(AssertionError):
    loss(*[np.ones(shape, np.float32) for shape in shapes])


def test_clipped_surrogate_by_hand():
  """clip 0.2: gains stop at 1.2 and 0.8, losses do not."""
  ratio = np.array([1.5, 1.5, 0.5, 0.5, 1.1, 1.0])
  advantage = np.array([2.0, -2.0, 2.0, -2.0, 3.0, -4.0])
  expected = [-2.4, 3.0, -1.0, 1.6, -3.3, 4.0]
  old = np.float32([0.3, -1.0, 0.0, 2.0, 0.5, 0.7])
  loss = lambda *a: policy.clipped_surrogate(*a, 0.2)
  log_prob = old + np.float32(np.log(ratio))
  found, gradients = _with_gradients(loss, log_prob, old, np.float32(advantage))
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  # d/d log_prob = -ratio A where the ratio counts, else 0.
  np.testing.assert_allclose(
    gradients[0], [0.0, 3.0, -1.0, 0.0, -3.3, 4.0], rtol=1e-5
  )
  # Nothing flows into what was there before.
  assert not np.any(np.stack(gradients[1:]))
