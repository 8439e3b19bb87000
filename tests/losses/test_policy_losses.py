"""Actor losses by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from offmeta.losses import policy


def test_softmax_weights_by_hand():
  # Temperature 2: logits (0, ln 2, ln 3, ln 2), exponentials 1, 2, 3, 2 with
  # the sum 8; times the count 4: 0.5, 1, 1.5, 1.
  advantage = 2.0 * jnp.log(jnp.array([[1.0, 2.0], [3.0, 2.0]]))
  weights = policy.softmax_advantage_weights(advantage, 2.0)
  np.testing.assert_allclose(weights, [[0.5, 1.0], [1.5, 1.0]], rtol=1e-6)


def test_softmax_is_over_all_tasks():
  # One task far better than the other takes all the weight: a softmax per
  # task would give all ones here.
  advantage = jnp.array([[50.0, 50.0], [0.0, 0.0]])
  weights = policy.softmax_advantage_weights(advantage, 1.0)
  np.testing.assert_allclose(weights, [[2.0, 2.0], [0.0, 0.0]], atol=1e-6)


def test_softmax_with_infinite_temperature_is_behaviour_cloning():
  advantage = jax.random.normal(jax.random.key(0), (3, 5))
  weights = policy.softmax_advantage_weights(advantage, float('inf'))
  np.testing.assert_array_equal(weights, np.ones((3, 5)))
  weights = policy.softmax_advantage_weights(advantage, 1e6)
  np.testing.assert_allclose(weights, np.ones((3, 5)), atol=1e-5)


def test_softmax_ignores_a_shift_and_large_values():
  advantage = jnp.array([1.0, 2.0, -1.0])
  expected = np.exp([1.0, 2.0, -1.0])
  expected *= 3 / expected.sum()
  for shift in (0.0, 1000.0):
    np.testing.assert_allclose(
      policy.softmax_advantage_weights(advantage + shift, 1.0),
      expected,
      rtol=1e-4,
    )


def test_softmax_has_no_gradient():
  gradient = jax.grad(
    lambda a: jnp.sum(policy.softmax_advantage_weights(a, 1.0) ** 2)
  )(jnp.array([1.0, 2.0]))
  assert not np.any(gradient)


def test_weighted_log_likelihood_by_hand():
  # -(2 * -1), -(0.5 * 3)
  log_prob, weight = jnp.array([-1.0, 3.0]), jnp.array([2.0, 0.5])
  np.testing.assert_allclose(
    policy.weighted_log_likelihood(log_prob, weight), [2.0, -1.5]
  )
  into_log_prob, into_weight = jax.grad(
    lambda *a: jnp.sum(policy.weighted_log_likelihood(*a)), (0, 1)
  )(log_prob, weight)
  np.testing.assert_allclose(into_log_prob, [-2.0, -0.5])
  assert not np.any(into_weight)


def test_output_penalty_by_hand():
  mean = jnp.array([[1.0, -2.0], [0.0, 3.0]])
  log_std = jnp.array([[-1.0, 0.0], [2.0, 1.0]])
  # Mean squares 14 / 4 and 6 / 4.
  np.testing.assert_allclose(
    policy.output_penalty(mean, log_std, 0.1, 0.01), 0.35 + 0.015, rtol=1e-6
  )


def test_soft_policy_by_hand():
  # -1 - 2, 0.5 + 4
  arrays = jnp.array([-1.0, 0.5]), jnp.array([2.0, -4.0])
  np.testing.assert_allclose(policy.soft_policy(*arrays), [-3.0, 4.5])
  gradients = jax.grad(lambda *a: jnp.sum(policy.soft_policy(*a)), (0, 1))(
    *arrays
  )
  np.testing.assert_allclose(np.stack(gradients), [[1.0, 1.0], [-1.0, -1.0]])


def test_soft_value_target_by_hand():
  # 2 + 1, -4 - 0.5
  arrays = jnp.array([-1.0, 0.5]), jnp.array([2.0, -4.0])
  np.testing.assert_allclose(policy.soft_value_target(*arrays), [3.0, -4.5])
  gradients = jax.grad(
    lambda *a: jnp.sum(policy.soft_value_target(*a)), (0, 1)
  )(*arrays)
  assert not np.any(np.stack(gradients))


def test_temperature_weights_the_entropy():
  # 0.5 * -1 - 2, 0.5 * 0.5 + 4; 2 + 0.5, -4 - 0.25
  arrays = jnp.array([-1.0, 0.5]), jnp.array([2.0, -4.0])
  np.testing.assert_allclose(policy.soft_policy(*arrays, 0.5), [-2.5, 4.25])
  np.testing.assert_allclose(
    policy.soft_value_target(*arrays, 0.5), [2.5, -4.25]
  )
  gradient = jax.grad(lambda t: jnp.sum(policy.soft_value_target(*arrays, t)))(
    0.5
  )
  assert gradient == 0.0


def test_temperature_loss_by_hand():
  # Entropies 1 and 3 against a target of 2: -0.5 (-1 + 2), -0.5 (-3 + 2)
  log_prob = jnp.array([-1.0, -3.0])
  loss = lambda *a: policy.temperature_loss(*a, 2.0)
  np.testing.assert_allclose(loss(jnp.array(0.5), log_prob), [-0.5, 0.5])
  into_alpha, into_log_prob = jax.jacrev(loss, (0, 1))(jnp.array(0.5), log_prob)
  np.testing.assert_allclose(into_alpha, [-1.0, 1.0])
  assert not np.any(into_log_prob)
  with pytest.raises(AssertionError):
    loss(jnp.ones(2), log_prob)


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
    loss(*[jnp.ones(shape) for shape in shapes])


def test_clipped_surrogate_by_hand():
  """clip 0.2: gains stop at 1.2 and 0.8, losses do not."""
  ratio = np.array([1.5, 1.5, 0.5, 0.5, 1.1, 1.0])
  advantage = np.array([2.0, -2.0, 2.0, -2.0, 3.0, -4.0])
  expected = [-2.4, 3.0, -1.0, 1.6, -3.3, 4.0]
  old = jnp.array([0.3, -1.0, 0.0, 2.0, 0.5, 0.7])
  loss = lambda log_prob: policy.clipped_surrogate(
    log_prob, old, jnp.array(advantage), 0.2
  )
  log_prob = old + np.log(ratio)
  np.testing.assert_allclose(loss(log_prob), expected, rtol=1e-5)
  # d/d log_prob = -ratio A where the ratio counts, else 0.
  gradient = jax.grad(lambda x: jnp.sum(loss(x)))(log_prob)
  np.testing.assert_allclose(
    gradient, [0.0, 3.0, -1.0, 0.0, -3.3, 4.0], rtol=1e-5
  )
  # Nothing flows into what was there before.
  zeros = jax.grad(
    lambda old, a: jnp.sum(policy.clipped_surrogate(log_prob, old, a, 0.2)),
    (0, 1),
  )(old, jnp.array(advantage))
  assert not np.any(zeros)
