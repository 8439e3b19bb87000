"""The data of one online iteration: act, label, store. Runs inside jit.

`gather` is one compiled loop over a replay on the device. Its parts `prepare`,
`draw`, `act`, `keep` and `finish` also serve a replay that is kept elsewhere
(`training/streaming.py`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from offmeta import limits, parallel, rollout
from offmeta.data import buffer as buffers, sampler
from offmeta.data.buffer import Replay
from offmeta.losses import returns
from offmeta.training.config import Visits
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
    return rollout.episode(family, uniform, (), (), task, jax.random.key(0))[1]

  return jax.tree.map(
    lambda x: jnp.zeros(x.shape[1:], x.dtype), jax.eval_shape(log, tasks)
  )


class Visit(NamedTuple):
  """K tasks that are visited side by side.

  Attributes:
    task_id: [K] rows of the replay.
    tasks: leaves [K, ...].
    keys: [K].
    first: [M], rows in the tasks' context buffers before the visit.
  """

  task_id: Array
  tasks: Task
  keys: Key
  first: Array


class Contexts(NamedTuple):
  """What the episodes of one round may look at, leaves [K, ...].

  Attributes:
    context, mask: for the policy.
    label_context, label_mask: offline transitions, for the labels; None with
      true rewards.
  """

  context: Transition
  mask: Array
  label_context: Transition | None
  label_mask: Array | None


class Counts(NamedTuple):
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


def prepare(
  replay: Replay, tasks: Task, task_id: Array, key: Key, config: Visits
) -> tuple[Replay, Visit, Counts]:
  """The start of a visit to the tasks `task_id` [K] of all `tasks`."""
  if config.clear_context and replay.context is not None:
    context = jax.lax.fori_loop(
      0,
      task_id.shape[0],
      lambda i, b: buffers.clear(b, task_id[i]),
      replay.context,
    )
    replay = replay._replace(context=context)
  keys = jax.vmap(lambda k: jax.random.fold_in(key, k))(
    jnp.arange(task_id.shape[0])
  )
  visit = Visit(
    task_id,
    jax.tree.map(lambda x: x[task_id], tasks),
    keys,
    replay.contexts().size,
  )
  none, zero = jnp.zeros_like(task_id), jnp.zeros((), jnp.int32)
  return replay, visit, Counts(none, none, zero, zero, zero)


def unfinished(counts: Counts, config: Visits) -> Array:
  """Whether a visit has not used its quotas."""
  return jnp.any(counts.prior < config.prior_steps) | jnp.any(
    counts.posterior < config.posterior_steps
  )


def _round_keys(visit: Visit, counts: Counts) -> Key:
  """Keys [K, 5] of the next round: context, belief, episode, label context,
  label."""
  return jax.vmap(
    lambda key: jax.random.split(jax.random.fold_in(key, counts.number), 5)
  )(visit.keys)


def draw(
  replay: Replay, visit: Visit, counts: Counts, config: Visits
) -> Contexts:
  """Contexts for the next round: `config.context_size` transitions of each
  task's current context buffer, and fresh offline ones for the labels."""
  keys = _round_keys(visit, counts)

  def contexts(stream, size, offline):
    return jax.vmap(
      lambda key, task_id: sampler.draw_context(
        key, replay.contexts(), task_id, size, offline
      )
    )(keys[:, stream], visit.task_id)

  label = (None, None)
  if limits.chosen(config, 'rewards', 'decoder'):
    label = contexts(3, config.label_context_size, True)
  return Contexts(*contexts(0, config.context_size, False), *label)


def act(
  family: EnvFamily,
  algorithm: Algorithm,
  state: LearnerState,
  visit: Visit,
  counts: Counts,
  contexts: Contexts,
  config: Visits,
  axis_name: str | None,
) -> tuple[Transition, Array, Array]:
  """A round: one whole episode in each of K tasks, labelled.

  First `prior_steps` under the prior, then `posterior_steps` of which the
  first episode is under the prior and each later one under the posterior of
  the task's context.

  Returns:
    Transitions [K, T, ...], steps [K], blow-ups [K].
  """
  params = algorithm.actor_params(state)
  policy = algorithm.explore
  adapt = ~jnp.any(counts.prior < config.prior_steps) & (counts.episode > 0)
  label = limits.chosen(config, 'rewards', 'decoder')

  def one(task, keys, contexts):
    belief = policy.init(params, keys[1])
    belief = policy.adapt(
      params, belief, contexts.context, contexts.mask * adapt, keys[1]
    )
    _, data, valid = rollout.episode(
      family, policy, params, belief, task, keys[2], reward_free=label
    )
    diverged = jnp.sum(data.extras['diverged']).astype(jnp.int32)
    if algorithm.data.returns_discount is not None:
      data = data._replace(
        extras={
          **data.extras,
          **returns.annotate(data, valid, algorithm.data.returns_discount),
        }
      )
    if label:
      data = data._replace(
        reward=algorithm.relabel(
          state,
          contexts.label_context,
          contexts.label_mask,
          data._replace(extras={}),
          keys[4],
        )
      )
    return data, jnp.sum(valid).astype(jnp.int32), diverged

  return parallel.shared_vmap(one, axis_name, (0, 0, 0))(
    visit.tasks, _round_keys(visit, counts), contexts
  )


def keep(
  replay: Replay,
  visit: Visit,
  counts: Counts,
  data: Transition,
  steps: Array,
  diverged: Array,
  config: Visits,
) -> tuple[Replay, Counts]:
  """Stores and books what `act` returned; nothing if the visit is over."""
  active = unfinished(counts, config)
  exploring = jnp.any(counts.prior < config.prior_steps)
  prior = jnp.where(exploring & (counts.prior < config.prior_steps), steps, 0)
  posterior = jnp.where(
    ~exploring & (counts.posterior < config.posterior_steps), steps, 0
  )
  replay = _append(
    replay,
    visit.task_id,
    data,
    prior + posterior,
    exploring | config.posterior_to_context,
  )
  after = Counts(
    counts.prior + prior,
    counts.posterior + posterior,
    jnp.where(exploring, 0, counts.episode + 1),
    counts.number + 1,
    counts.diverged + jnp.sum(diverged),
  )
  return replay, jax.tree.map(
    lambda new, old: jnp.where(active, new, old), after, counts
  )


def _append(replay, task_id, data, counts, to_context):
  """Appends K episodes one after the other (a task may be drawn twice)."""
  kept = {name: data.extras[name] for name in replay.query.data.extras}
  data = data._replace(extras=kept)

  def one(replay, item):
    task_id, transitions, count = item
    query = buffers.append(replay.query, task_id, transitions, count)
    context = replay.context
    if context is not None:
      context = buffers.append(
        context, task_id, transitions, jnp.where(to_context, count, 0)
      )
    return Replay(query, context), None

  return jax.lax.scan(one, replay, (task_id, data, counts))[0]


def finish(
  replay: Replay, visit: Visit, counts: Counts
) -> tuple[Replay, Metrics]:
  """Notes each visit's prior steps as one exploration sequence.

  Visits are appended round by round, so the episodes of a task that was drawn
  twice interleave. Its rows are split at the first visit's length: each part
  still is that many prior steps of the task, of both visits mixed.
  """
  metrics = {'gather/diverged': counts.diverged.astype(jnp.float32)}
  contexts, task_id = replay.contexts(), visit.task_id
  if not contexts.sequence_start.shape[-1]:
    return replay, metrics

  def one(k, contexts):
    earlier = jnp.sum(
      jnp.where(
        jnp.arange(task_id.shape[0]) < k,
        (task_id == task_id[k]) * counts.prior,
        0,
      )
    )
    return buffers.record_sequence(
      contexts, task_id[k], visit.first[task_id[k]] + earlier, counts.prior[k]
    )

  contexts = jax.lax.fori_loop(0, task_id.shape[0], one, contexts)
  if replay.context is None:
    return replay._replace(query=contexts), metrics
  return replay._replace(context=contexts), metrics


def gather(
  family: EnvFamily,
  algorithm: Algorithm,
  state: LearnerState,
  replay: Replay,
  tasks: Task,
  task_id: Array,
  key: Key,
  config: Visits,
  axis_name: str | None = None,
  seeds_axis: str | None = None,
) -> tuple[Replay, Metrics]:
  """One iteration's data (as SMAC's and PEARL's releases collect).

  The K tasks are visited side by side; a task that is drawn twice does not
  see its twin's data until the next round of episodes (the released code
  visits them one after the other). One loop serves prior and posterior
  episodes, so an episode is compiled once.

  Args:
    family: the environment.
    algorithm: explores, and labels when `config.rewards == 'decoder'`.
    state: its learner state.
    replay: buffers of all training tasks.
    tasks: all training tasks, leaves [M, ...].
    task_id: [K] tasks to visit.
    key: random key.
    config: how much of what.
    axis_name: device axis over which the visits are shared out.
    seeds_axis: axis under which seeds are vmapped, see `parallel.any_along`.

  Returns:
    The replay with the new data, and how often the simulation blew up.
  """
  replay, visit, counts = prepare(replay, tasks, task_id, key, config)

  def round_(carry):
    replay, counts = carry
    contexts = draw(replay, visit, counts, config)
    return keep(
      replay,
      visit,
      counts,
      *act(
        family, algorithm, state, visit, counts, contexts, config, axis_name
      ),
      config,
    )

  replay, counts = jax.lax.while_loop(
    lambda carry: parallel.any_along(unfinished(carry[1], config), seeds_axis),
    round_,
    (replay, counts),
  )
  return finish(replay, visit, counts)
