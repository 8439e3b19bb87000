"""The data of one online iteration: act, label, store. Runs inside jit."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from offmeta import rollout
from offmeta.data import buffer as buffers
from offmeta.data import sampler
from offmeta.data.buffer import Replay
from offmeta.training.config import GatherConfig
from offmeta.types import (
    Algorithm,
    Array,
    EnvFamily,
    Key,
    LearnerState,
    Metrics,
    Task,
    Transition,
)


def example_transition(family: EnvFamily, tasks: Task) -> Transition:
  """Zeros like one logged step, leaves [...]; tasks have leaves [M, ...]."""
  uniform = rollout.uniform_policy(family.spec.action_size)

  def log(tasks):
    task = jax.tree.map(lambda x: x[0], tasks)
    return rollout.episode(
        family, uniform, (), (), task, jax.random.key(0))[1]

  return jax.tree.map(
      lambda x: jnp.zeros(x.shape[1:], x.dtype), jax.eval_shape(log, tasks))


class _Visit(NamedTuple):
  """K tasks that are visited side by side.

  Attributes:
    task_id: [K] rows of the replay.
    tasks: leaves [K, ...].
    keys: [K].
  """

  task_id: Array
  tasks: Task
  keys: Key


def _store(replay, visit, data, counts, to_encoder):
  """Appends K episodes one after the other (a task may be drawn twice)."""

  def one(replay, item):
    task_id, transitions, count = item
    rl = buffers.append(replay.rl, task_id, transitions, count)
    encoder = replay.encoder
    if encoder is not None:
      encoder = buffers.append(
          encoder, task_id, transitions, jnp.where(to_encoder, count, 0))
    return Replay(rl, encoder), None

  return jax.lax.scan(one, replay, (visit.task_id, data, counts))[0]


class _Counts(NamedTuple):
  """Progress of K visits.

  Attributes:
    prior, posterior: [K] steps used of either quota.
    episode: [] episodes of the current part, 0 at the start of the posterior.
    number: [] episodes so far.
    diverged: [] how often the simulation blew up, in all visits.
  """

  prior: Array
  posterior: Array
  episode: Array
  number: Array
  diverged: Array


def _episodes(
    family: EnvFamily,
    algorithm: Algorithm,
    state: LearnerState,
    replay: Replay,
    visit: _Visit,
    prior_steps: int,
    posterior_steps: int,
    config: GatherConfig,
) -> tuple[Replay, _Counts]:
  """Whole episodes in K tasks side by side until both quotas are used.

  First `prior_steps` under the prior, then `posterior_steps` of which the
  first episode is under the prior and each later one under the posterior of
  `config.context_size` transitions of the task's current encoder buffer. One
  loop serves both parts, so an episode is compiled once.

  Returns:
    The replay and what was counted.
  """
  params = algorithm.actor_params(state)
  policy = algorithm.explore
  label = config.rewards == 'decoder'

  def one(task_id, task, key, replay, number, adapt):
    key = jax.random.fold_in(key, number)
    k_context, k_adapt, k_episode, k_offline, k_label = jax.random.split(
        key, 5)
    context, mask = sampler.draw_context(
        k_context, replay.contexts(), task_id, config.context_size, False)
    belief = policy.init(params, k_adapt)
    belief = policy.adapt(params, belief, context, mask * adapt, k_adapt)
    _, data, valid = rollout.episode(
        family, policy, params, belief, task, k_episode, reward_free=label)
    diverged = jnp.sum(data.extras['diverged']).astype(jnp.int32)
    if label:  # by a fresh offline context of the same task
      label_context, label_mask = sampler.draw_context(
          k_offline, replay.contexts(), task_id, config.label_context_size,
          True)
      rewards = algorithm.relabel(
          state, label_context, label_mask, data._replace(extras={}), k_label)
      data = data._replace(reward=rewards)
    kept = {name: data.extras[name] for name in replay.rl.data.extras}
    data = data._replace(extras=kept)
    return data, jnp.sum(valid).astype(jnp.int32), diverged

  def round_(carry):
    counts, replay = carry
    exploring = jnp.any(counts.prior < prior_steps)
    adapt = ~exploring & (counts.episode > 0)
    data, steps, diverged = jax.vmap(one, (0, 0, 0, None, None, None))(
        visit.task_id, visit.tasks, visit.keys, replay, counts.number, adapt)
    prior = jnp.where(exploring & (counts.prior < prior_steps), steps, 0)
    posterior = jnp.where(
        ~exploring & (counts.posterior < posterior_steps), steps, 0)
    replay = _store(
        replay, visit, data, prior + posterior,
        exploring | config.posterior_to_encoder)
    counts = _Counts(
        counts.prior + prior, counts.posterior + posterior,
        jnp.where(exploring, 0, counts.episode + 1), counts.number + 1,
        counts.diverged + jnp.sum(diverged))
    return counts, replay

  def unfinished(carry):
    counts = carry[0]
    return jnp.any(counts.prior < prior_steps) | jnp.any(
        counts.posterior < posterior_steps)

  none, zero = jnp.zeros_like(visit.task_id), jnp.zeros((), jnp.int32)
  counts, replay = jax.lax.while_loop(
      unfinished, round_, (_Counts(none, none, zero, zero, zero), replay))
  return replay, counts


def _make_visit(tasks, task_id, key):
  keys = jax.vmap(lambda k: jax.random.fold_in(key, k))(
      jnp.arange(task_id.shape[0]))
  return _Visit(task_id, jax.tree.map(lambda x: x[task_id], tasks), keys)


def initial_data(
    family: EnvFamily,
    algorithm: Algorithm,
    state: LearnerState,
    replay: Replay,
    tasks: Task,
    key: Key,
    num_steps: int,
    config: GatherConfig,
) -> Replay:
  """`num_steps` prior steps in every training task, into both buffers."""
  ids = jnp.arange(replay.rl.size.shape[0])
  visit = _make_visit(tasks, ids, key)
  return _episodes(
      family, algorithm, state, replay, visit, num_steps, 0, config)[0]


def gather(
    family: EnvFamily,
    algorithm: Algorithm,
    state: LearnerState,
    replay: Replay,
    tasks: Task,
    task_id: Array,
    key: Key,
    config: GatherConfig,
) -> tuple[Replay, Metrics]:
  """One iteration's data (specs smac 2.8 to 2.10, PEARL A1.4).

  The K tasks are visited side by side; a task that is drawn twice does not
  see its twin's data until the next round of episodes (the released code
  visits them one after the other).

  Args:
    family: the environment.
    algorithm: explores, and labels when `config.rewards == 'decoder'`.
    state: its learner state.
    replay: buffers of all training tasks.
    tasks: all training tasks, leaves [M, ...].
    task_id: [K] tasks to visit.
    key: random key.
    config: how much of what.

  Returns:
    The replay with the new data, and how often the simulation blew up.
  """
  if config.clear_encoder_buffer and replay.encoder is not None:
    encoder = jax.lax.fori_loop(
        0, task_id.shape[0],
        lambda i, b: buffers.clear(b, task_id[i]), replay.encoder)
    replay = replay._replace(encoder=encoder)
  visit = _make_visit(tasks, task_id, key)
  first = replay.contexts().size
  replay, counts = _episodes(
      family, algorithm, state, replay, visit, config.prior_steps,
      config.posterior_steps, config)
  replay = _record(replay, task_id, first, counts.prior)
  return replay, {'gather/diverged': counts.diverged.astype(jnp.float32)}


def _record(replay, task_id, first, used):
  """Notes each visit's prior steps as one exploration sequence.

  Visits are appended round by round, so the episodes of a task that was drawn
  twice interleave. Its rows are split at the first visit's length: each part
  still is that many prior steps of the task, of both visits mixed.
  """
  contexts = replay.contexts()
  if not contexts.sequence_start.shape[-1]:
    return replay

  def one(k, contexts):
    start = first[task_id[k]]
    earlier = jnp.sum(jnp.where(
        jnp.arange(task_id.shape[0]) < k, (task_id == task_id[k]) * used, 0))
    return buffers.record_sequence(
        contexts, task_id[k], start + earlier, used[k])

  contexts = jax.lax.fori_loop(0, task_id.shape[0], one, contexts)
  if replay.encoder is None:
    return replay._replace(rl=contexts)
  return replay._replace(encoder=contexts)
