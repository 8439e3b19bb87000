"""Compiled evaluations of all seeds; each function is compiled once."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from offmeta import evaluation, rollout, types
from offmeta.data import sampler
from offmeta.data.buffer import Replay
from offmeta.training.seeds import Seeds
from offmeta.training.setup import Setup
from offmeta.types import (
  Algorithm,
  Array,
  Evidence,
  LearnerState,
  Rows,
  Sequences,
  Slice,
)


class OfflineData(NamedTuple):
  """What offline contexts are taken from.

  Attributes:
    train: leaves [M, C, ...], of the training tasks.
    test: of the held-out tasks; None if nothing was logged in them.
  """

  train: Replay
  test: Replay | None


class Evaluator:
  """Scores learner states on held-out and training tasks.

  Every call draws the same random numbers, so scores are comparable along a
  run and between variants. Held-out and training tasks go through one
  compiled program side by side.

  Args:
    setup: of the run.
    algorithm: supplies the policies; never its updates.
    seeds: whose learners; results are of those of this process.
  """

  def __init__(self, setup: Setup, algorithm: Algorithm, seeds: Seeds):
    config = setup.config.evaluation
    family = setup.family
    num_train = setup.config.family.num_train
    axis_name = seeds.layout.axis_name
    keys = seeds.streams('evaluation')
    self._keys = [
      jax.vmap(lambda k, i=i: jax.random.fold_in(k, i))(keys) for i in range(9)
    ]
    self._setup = setup
    self._all = jnp.arange(num_train)
    self._some = jnp.asarray(
      np.sort(
        np.random.default_rng(0).permutation(num_train)[
          : config.num_train_tasks
        ]
      )
    )
    self._num_test = setup.config.family.num_test
    self._params = jax.jit(jax.vmap(algorithm.actor_params))

    acting = rollout.uniform_at_first(
      algorithm.evaluate, family.spec.action_size
    )

    def own(params, uniform_steps, tasks, key):
      return evaluation.meta_test(
        family,
        acting,
        rollout.Acting(params, uniform_steps),
        tasks,
        key,
        config.num_repeats,
        config.num_steps,
        config.num_prior_episodes,
        axis_name,
      )

    def given(params, held, tasks, contexts, key):
      return evaluation.meta_test_given_context(
        family,
        algorithm.evaluate_given_context,
        params,
        tasks,
        contexts,
        key,
        config.num_steps,
        axis_name,
        held,
      )

    def shift(*args):
      return evaluation.distribution_shift(algorithm, *args)

    # The episode that follows a context is the last of a sequence.
    episodes = algorithm.data.sequence_episodes if algorithm.data else 0
    known = max(episodes - 1, 0)

    # As recorded; what contexts are trained on may be mixed.
    contexts_of = (lambda replay: replay.query) if known else Replay.contexts
    offline = Rows(config.context_size, 'offline')
    logged = Slice(config.context_size)
    if known:
      offline = Sequences(1, known * family.spec.episode_length)
    if episodes:
      logged = Sequences(1, config.context_size)

    def context_rows(buffer, ids, key):
      return evaluation.offline_rows(
        buffer, ids, key, config.num_repeats, offline
      )

    def log_rows(buffer, ids, key):
      return jax.vmap(lambda k, task: sampler.rows_of(k, buffer, task, logged))(
        jax.random.split(key, len(ids)), ids
      )

    def diagnosis(state, evidence):
      return types.checked_diagnosis(algorithm.diagnose(state, evidence))

    compile_ = seeds.layout.compile
    self._own = compile_(own, (0, None, None, 0))
    self._given_contexts = algorithm.evaluate_given_context and compile_(
      given, (0, None, None, 0, 0)
    )
    self._shift = algorithm.posterior and compile_(shift, (0, 0, 0, 0))
    self._draw = _drawer(contexts_of, context_rows, known)
    self._draw_rows = _drawer(lambda replay: replay.query, log_rows, 0)
    self._diagnosis = algorithm.diagnose and compile_(diagnosis, (0, 0))

  def _self_collected(
    self, params, train_ids, uniform: bool = False
  ) -> rollout.Adaptation:
    """Adaptation of the held-out tasks, then of the given training tasks.

    Args:
      params: leaves [S, ...].
      train_ids: which of the training tasks.
      uniform: act at random until half of the steps are known.
    """
    tasks = jax.tree.map(
      lambda test, train: jnp.concatenate([test, train[train_ids]]),
      self._setup.test_tasks,
      self._setup.train_tasks,
    )
    steps = -(-self._setup.config.evaluation.num_steps // 2)
    return self._own(
      params, jnp.int32(steps if uniform else 0), tasks, self._keys[0]
    )

  def _given(
    self,
    params,
    data: OfflineData | None,
    train_ids,
    unadapted: bool = False,
  ) -> dict:
    """Returns [S, M, R, E] with contexts from the logs of the tasks.

    Args:
      params: leaves [S, ...].
      data: the logs; None gives nothing.
      train_ids: which of the training tasks.
      unadapted: give no context instead, and let nothing be learnt.
    """
    if data is None or self._given_contexts is None:
      return {}
    tasks = jax.tree.map(lambda x: x[train_ids], self._setup.train_tasks)
    contexts = self._draw(data.train, train_ids, self._keys[1])
    join = lambda axis: lambda *x: jnp.concatenate(x, axis)
    tested = data.test is not None or unadapted
    if tested:
      tasks = jax.tree.map(join(0), tasks, self._setup.test_tasks)
      # Whatever stands in contexts of which nothing counts.
      replay = data.train if data.test is None else data.test
      rows = jnp.arange(self._num_test) % replay.query.size.shape[0]
      contexts = jax.tree.map(
        join(1), contexts, self._draw(replay, rows, self._keys[5])
      )
    if unadapted:
      contexts = contexts._replace(mask=jnp.zeros_like(contexts.mask))
    returns = self._given_contexts(
      params, jnp.asarray(unadapted), tasks, contexts, self._keys[2]
    )
    out = {'train': returns[:, : len(train_ids)]}
    if tested:
      out['test'] = returns[:, len(train_ids) :]
    return out

  def curve(self, state: LearnerState, data: OfflineData | None) -> dict:
    """Metrics [S] to log during training.

    Args:
      state: leaves [S, ...].
      data: None leaves scores with offline contexts out.
    """
    params = self._params(state)
    adaptation = self._self_collected(params, self._some)
    returns = adaptation.returns
    scores = {
      'test/self_context': returns[:, : self._num_test],
      'train/self_context': returns[:, self._num_test :],
    }
    for part, value in self._given(params, data, self._some).items():
      scores[f'{part}/offline_context'] = value
    out = {
      f'eval/{name}/final_return': np.mean(
        np.asarray(rollout.final_return(value)), axis=(1, 2)
      )
      for name, value in scores.items()
    }
    out['eval/diverged'] = _num_diverged(adaptation)
    return out

  def full(
    self, state: LearnerState, data: OfflineData | None
  ) -> tuple[dict[str, Any], rollout.Adaptation]:
    """The meta-test protocol on all tasks, and the shift diagnostics.

    Args:
      state: leaves [S, ...].
      data: None leaves out what needs offline contexts.

    Returns:
      Arrays [S, ...] by the names of `offmeta.results.records`, and what
      happened on held-out tasks, leaves [S, M, R, ...].
    """
    params = self._params(state)
    adaptation = self._self_collected(params, self._all)
    test = jax.tree.map(lambda x: x[:, : self._num_test], adaptation)
    train = jax.tree.map(lambda x: x[:, self._num_test :], adaptation)
    uniform = self._self_collected(params, self._all, True).returns
    out = {
      'test_self_returns': test.returns,
      'train_self_returns': train.returns,
      'test_uniform_returns': uniform[:, : self._num_test],
      'diverged': _num_diverged(adaptation),
    }
    for part, value in self._given(params, data, self._all).items():
      out[f'{part}_offline_returns'] = value
    if self._shift is None:
      # With a posterior, the first of the episodes that collect has the prior.
      # Else it may explore with noise (MACAW) or adapt within (BOReL).
      for part, value in self._given(params, data, self._all, True).items():
        out[f'{part}_prior_returns'] = value
    if data is not None and self._shift is not None:
      shift = self._shift(
        params,
        train,
        *[self._draw(data.train, self._all, key) for key in self._keys[3:5]],
      )
      out.update(
        kl_offline=shift.kl_offline,
        kl_self=shift.kl_self,
        normalized_shift=shift.normalized_shift,
        posterior_offline_mean=shift.offline_mean,
        posterior_self_mean=shift.self_mean,
      )
    if data is not None and self._diagnosis is not None:
      for name, value in self._diagnose(state, data.train, train).items():
        out[f'diagnose/{name}'] = value
    return jax.device_get(out), test

  def _diagnose(
    self, state: LearnerState, logs: Replay, own: rollout.Adaptation
  ) -> dict[str, Array]:
    """What the algorithm says of itself, leaves [S, ...], on some tasks.

    Args:
      state: leaves [S, ...].
      logs: of all training tasks.
      own: what was collected in them, leaves [S, M, R, ...]; the first of the
        repetitions is shown to the algorithm.
    """
    contexts = self._draw(logs, self._some, self._keys[6])
    rows, mask = self._draw_rows(logs, self._some, self._keys[7])
    first = lambda tree: jax.tree.map(lambda x: x[:, :, 0], tree)
    seen = jax.tree.map(
      lambda x: x[:, self._some], first((own.transitions, own.valid))
    )
    return self._diagnosis(
      state,
      Evidence(*first(contexts), *seen, rows, mask, self._keys[8]),
    )


def _drawer(buffer_of, draw_rows, num_episodes: int):
  """Looks up rows that are drawn for every seed.

  Args:
    buffer_of: replay -> the buffer that they are rows of.
    draw_rows: (buffer, task ids [M], key) -> rows and mask, [M, ..., N].
    num_episodes: see `evaluation.look_up`.

  Returns:
    (replay, task ids [M], keys [S]) -> contexts, leaves [S, M, ..., N, ...].
    Of memory maps only these are read.
  """

  def drawn(buffer, ids, key):
    return evaluation.look_up(
      buffer, ids, *draw_rows(buffer, ids, key), num_episodes
    )

  on_device = jax.jit(jax.vmap(drawn, (None, None, 0)))
  rows_of_seeds = jax.jit(jax.vmap(draw_rows, (None, None, 0)))

  def draw(replay, ids, keys) -> evaluation.OfflineContexts:
    buffer = buffer_of(replay)
    if not isinstance(buffer.data.reward, np.ndarray):
      return on_device(buffer, ids, keys)
    rows = jax.device_get(rows_of_seeds(buffer.tables(), ids, keys))
    each = [
      evaluation.look_up(buffer, np.asarray(ids), *one, num_episodes)
      for one in zip(*rows)
    ]
    return jax.tree.map(lambda *x: np.stack(x), *each)

  return draw


def _num_diverged(adaptation: rollout.Adaptation) -> np.ndarray:
  """How many steps blew up, [S], of leaves [S, M, R, W, ...]."""
  flags = np.asarray(adaptation.transitions.extras['diverged'])
  return flags.sum(axis=(1, 2, 3))
