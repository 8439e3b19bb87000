"""The meta-test protocol and the distribution-shift diagnostics.

As in SMAC's release. Batched over tasks [M] and repetitions [R]; one key per
(task slot, repetition), so that a subset of tasks scores as in the whole.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from offmeta import parallel, rollout
from offmeta.data import buffer as buffers, sampler
from offmeta.data.buffer import Buffer
from offmeta.losses import latent
from offmeta.types import (
  Algorithm,
  Array,
  EnvFamily,
  Key,
  Params,
  Policy,
  Rows,
  Sequences,
  Task,
  Transition,
)


def _task_keys(key: Key, num_tasks: int, num_repeats: int) -> Key:
  """Keys [M, R]."""
  per_task = jax.vmap(lambda m: jax.random.fold_in(key, m))(
    jnp.arange(num_tasks)
  )
  return jax.vmap(
    lambda k: jax.vmap(lambda r: jax.random.fold_in(k, r))(
      jnp.arange(num_repeats)
    )
  )(per_task)


def _count(tasks: Task) -> int:
  return jax.tree.leaves(tasks)[0].shape[0]


def meta_test(
  family: EnvFamily,
  policy: Policy,
  params: Params,
  tasks: Task,
  key: Key,
  num_repeats: int,
  num_steps: int,
  num_prior_episodes: int,
  axis_name: str | None = None,
) -> rollout.Adaptation:
  """Adaptation to each task from self-collected context.

  Args:
    family: the environment.
    policy: usually `algorithm.evaluate`.
    params: of the policy.
    tasks: leaves [M, ...].
    key: random key.
    num_repeats: R.
    num_steps: step budget of one repetition.
    num_prior_episodes: episodes before the first adaptation.
    axis_name: device axis over which the tasks are shared out.

  Returns:
    Adaptation with leaves [M, R, ...].
  """

  def one(task, k):
    return rollout.adaptation_sequence(
      family, policy, params, task, k, num_steps, num_prior_episodes
    )

  keys = _task_keys(key, _count(tasks), num_repeats)
  return parallel.shared_vmap(jax.vmap(one, (None, 0)), axis_name, (0, 0))(
    tasks, keys
  )


class OfflineContexts(NamedTuple):
  """Contexts drawn from offline data.

  Attributes:
    context: leaves [M, R, N, ...].
    mask: [M, R, N].
  """

  context: Transition
  mask: Array


def offline_rows(
  buffer: Buffer,
  task_ids: Array,
  key: Key,
  num_repeats: int,
  asked: Rows | Sequences,
) -> tuple[Array, Array]:
  """Which rows contexts consist of, one draw per repetition.

  Args:
    buffer: `Buffer.tables` will do.
    task_ids: [M], rows in it.
    key: random key.
    num_repeats: R.
    asked: what to draw.

  Returns:
    Rows and mask, [M, R, N].
  """
  keys = _task_keys(key, task_ids.shape[0], num_repeats)
  one = lambda key, task_id: sampler.rows_of(key, buffer, task_id, asked)
  return jax.vmap(jax.vmap(one, (0, None)))(keys, task_ids)


def offline_contexts(
  buffer: Buffer, task_ids: Array, key: Key, num_repeats: int, size: int
) -> OfflineContexts:
  """Uniform draws from the frozen offline data, one context per repetition.

  Args:
    buffer: context buffer.
    task_ids: [M], rows in it.
    key: random key.
    num_repeats: R.
    size: N.
  """
  asked = Rows(size, 'offline')
  drawn = offline_rows(buffer, task_ids, key, num_repeats, asked)
  return look_up(buffer, task_ids, *drawn)


def offline_sequences(
  buffer: Buffer,
  task_ids: Array,
  key: Key,
  num_repeats: int,
  num_episodes: int,
  size: int,
) -> OfflineContexts:
  """The first episodes of recorded sequences, one context per repetition.

  Args:
    buffer: with a table of sequences.
    task_ids: [M], rows in it.
    key: random key.
    num_repeats: R.
    num_episodes: how many, or as many as there are.
    size: N, steps to pad to.
  """
  asked = Sequences(1, size)
  drawn = offline_rows(buffer, task_ids, key, num_repeats, asked)
  return look_up(buffer, task_ids, *drawn, num_episodes)


def look_up(
  buffer: Buffer,
  task_ids: Array,
  rows: Array,
  mask: Array,
  num_episodes: int = 0,
) -> OfflineContexts:
  """The contexts of `offline_rows`.

  Args:
    buffer: they were drawn for; with 'time' among the extras if any episodes
      are to be left out.
    task_ids: [M].
    rows, mask: [M, R, N], or other axes in the place of R.
    num_episodes: so many first ones count; 0: all.
  """
  tasks = task_ids.reshape((-1,) + (1,) * (rows.ndim - 1))
  steps = buffers.take(buffer, tasks, rows)
  if num_episodes:
    begins = (steps.extras['time'] == 0) & (jnp.arange(rows.shape[-1]) > 0)
    mask = mask * (jnp.cumsum(begins, axis=-1) < num_episodes)
  return OfflineContexts(steps, mask)


def meta_test_given_context(
  family: EnvFamily,
  policy: Policy,
  params: Params,
  tasks: Task,
  contexts: OfflineContexts,
  key: Key,
  num_steps: int,
  axis_name: str | None = None,
  held: bool | Array = False,
) -> Array:
  """Returns [M, R, E] with offline contexts.

  As in SMAC's release: one context per repetition, which every episode starts
  with; one latent per episode.

  Args:
    family: the environment.
    policy: `algorithm.evaluate_given_context`.
    params: of the policy.
    tasks: leaves [M, ...].
    contexts: of these tasks.
    key: random key.
    num_steps: step budget of one repetition.
    axis_name: device axis over which the tasks are shared out.
    held: [], whether the policy ignores what it sees while it acts.
  """

  def observe(params, state, transition, key):
    after = policy.observe(params, state, transition, key)
    return jax.tree.map(
      lambda old, new: jnp.where(held, old, new), state, after
    )

  def one(task, given, k):
    return rollout.adaptation_sequence(
      family,
      policy._replace(observe=observe),
      params,
      task,
      k,
      num_steps,
      0,
      context_fn=lambda transitions, valid, key: given,
    ).returns

  keys = _task_keys(key, *contexts.mask.shape[:2])
  return parallel.shared_vmap(
    jax.vmap(one, (None, 0, 0)), axis_name, (0, 0, 0)
  )(tasks, contexts, keys)


class Shift(NamedTuple):
  """Posteriors of offline and of self-collected contexts.

  Attributes:
    offline_mean, offline_std: [M, R, Z] of offline contexts.
    self_mean, self_std: [M, R, Z] of the full self-collected contexts, the
      last episode included.
    kl_offline, kl_self: [M], KL to the prior, mean over R.
    normalized_shift: [], (within_off_on - within_off_off) /
      (between_off_off - within_off_off), where 'off_on' is KL(self || offline)
      of the same task, 'off_off' KL between two offline draws, within a task
      or over all pairs of tasks (NaN with a single task); 0 when
      self-collected contexts read like offline ones of the same task, 1 when
      they are as far away as another task's.
  """

  offline_mean: Array
  offline_std: Array
  self_mean: Array
  self_std: Array
  kl_offline: Array
  kl_self: Array
  normalized_shift: Array


def distribution_shift(
  algorithm: Algorithm,
  params: Params,
  adaptation: rollout.Adaptation,
  offline: OfflineContexts,
  offline_again: OfflineContexts,
) -> Shift:
  """How differently the encoder reads offline and self-collected contexts.

  Args:
    algorithm: has a posterior.
    params: acting parameters.
    adaptation: leaves [M, R, ...] on training tasks.
    offline, offline_again: two draws for the same tasks.
  """
  num_tasks = adaptation.context_size.shape[0]

  def read(contexts, masks):
    return jax.vmap(
      jax.vmap(lambda *context: algorithm.posterior(params, *context))
    )(contexts, masks)

  off, off_again = read(*offline), read(*offline_again)
  self_ = read(adaptation.transitions, adaptation.valid)

  def kl(p, q):
    return latent.kl_between(p[0], p[1] ** 2, q[0], q[1] ** 2)

  def prior_kl(p):
    return jnp.mean(latent.kl_to_standard_normal(p[0], p[1] ** 2), axis=1)

  within = jnp.mean(kl(off, off_again))
  on = jnp.mean(kl(self_, off_again))

  def to_all(one):  # one task's posteriors [R, Z] against every task's
    wide = jax.tree.map(
      lambda x, y: jnp.broadcast_to(x, y.shape), one, off_again
    )
    return jnp.mean(kl(wide, off_again), axis=1)

  pairs = jax.vmap(to_all)(off)  # [M, M]
  between = (jnp.sum(pairs) - jnp.trace(pairs)) / max(
    num_tasks * (num_tasks - 1), 1
  )
  shift = (on - within) / (between - within)
  if num_tasks == 1:
    shift = jnp.full_like(shift, jnp.nan)
  return Shift(
    offline_mean=off[0],
    offline_std=off[1],
    self_mean=self_[0],
    self_std=self_[1],
    kl_offline=prior_kl(off),
    kl_self=prior_kl(self_),
    normalized_shift=shift,
  )
