"""Losses that shape the latent of a task without any Bellman error.

FOCAL's distances between tasks, CSRO's bound on what the latent says about
the behaviour, and the reconstruction and classification of UNICORN.
"""

import chex
import jax
import jax.numpy as jnp

from offmeta import parallel
from offmeta.types import Array

_SMOOTH = 1e-3  # keeps sqrt differentiable at 0, and counts away from 0
_OFFSET = 0.1  # bounds the repulsion of two equal latents


def distance_metric(
  z: Array, task_id: Array, axis_name: str | None = None
) -> tuple[Array, Array]:
  """How far latents of one task are apart, and how near those of two tasks.

  FOCAL (arXiv 2010.01112), with n = 2. With D the mean
  over dimensions of (z_i - z_j)^2, a pair of draws of one task costs
  sqrt(D + 1e-3), any other pair 1 / (D + 0.1). All unordered pairs count, over
  all devices; each of the two sums is divided by its number of pairs + 1e-3,
  so it is 0 where there are none.

  Args:
    z: [M, Z], one latent per drawn task.
    task_id: [M], equal where the same task was drawn twice.
    axis_name: device axis over which tasks are sharded.

  Returns:
    The means over pairs of one task [] and over other pairs [].

  Raises:
    AssertionError: wrong shapes.
  """
  chex.assert_rank([z, task_id], [2, 1])
  chex.assert_equal_shape_prefix([z, task_id], 1)
  z, task_id = parallel.all_gather((z, task_id), axis_name)
  distance = jnp.mean(jnp.square(z[:, None] - z[None]), axis=-1)
  pair = jnp.triu(jnp.ones_like(distance), k=1)
  same = pair * (task_id[:, None] == task_id[None])
  other = pair - same

  def mean(cost, mask):
    return jnp.sum(cost * mask) / (jnp.sum(mask) + _SMOOTH)

  return (
    mean(jnp.sqrt(distance + _SMOOTH), same),
    mean(1.0 / (distance + _OFFSET), other),
  )


def gaussian_nll(x: Array, mean: Array, variance: Array) -> Array:
  """-log N(x; mean, variance), elementwise [...], without 0.5 log(2 pi).

  Gradients flow into all three.

  Raises:
    AssertionError: shapes differ.
  """
  chex.assert_equal_shape([x, mean, variance])
  return 0.5 * (jnp.square(x - mean) / variance + jnp.log(variance))


def club_bound(z: Array, mean: Array, variance: Array, mask: Array) -> Array:
  """Upper bound on what z tells about x, given p(z | x) = N(mean, variance).

  CLUB (arXiv 2006.12013) as CSRO uses it, per task:
  -mean_i (z_i - m_i)^2 / v_i + mean_ij (z_j - m_i)^2 / v_i over its
  transitions i, j and over dimensions. The second mean takes
  (z_mean - m_i)^2 + variance of z instead of the N^2 pairs: it is the same.

  Args:
    z: [..., N, Z], a latent per transition.
    mean, variance: [..., N, Z], predicted from x_i; no gradient.
    mask: [..., N], 1 where a transition counts.

  Returns:
    [...]; 0 where nothing counts.

  Raises:
    AssertionError: shapes differ.
  """
  chex.assert_equal_shape([z, mean, variance])
  chex.assert_equal_shape_prefix([z, mask], mask.ndim)
  chex.assert_rank(z, mask.ndim + 1)
  mean, variance = jax.lax.stop_gradient((mean, variance))
  count = jnp.maximum(jnp.sum(mask, axis=-1, keepdims=True), 1.0)
  weight = (mask / count)[..., None]

  def average(x):
    return jnp.sum(weight * x, axis=-2, keepdims=True)

  center = average(z)
  spread = average(jnp.square(z - center))
  matched = jnp.square(z - mean)
  shuffled = jnp.square(center - mean) + spread
  return jnp.mean(average((shuffled - matched) / variance), axis=(-2, -1))


def cross_entropy(logits: Array, label: Array) -> Array:
  """-log softmax(logits)[label] [...].

  Args:
    logits: [..., K].
    label: [...], integers in [0, K).

  Raises:
    AssertionError: shapes do not fit.
  """
  chex.assert_equal_shape_prefix([logits, label], label.ndim)
  chex.assert_rank(logits, label.ndim + 1)
  log_prob = jax.nn.log_softmax(logits)
  return -jnp.take_along_axis(log_prob, label[..., None], axis=-1)[..., 0]
