"""Compiled evaluations of all seeds; each function is compiled once."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from offmeta import evaluation, rollout
from offmeta.data.buffer import Replay
from offmeta.training.schedule import Seeds
from offmeta.training.setup import Setup
from offmeta.types import Algorithm, LearnerState


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
        jax.vmap(lambda k, i=i: jax.random.fold_in(k, i))(keys)
        for i in range(5)
    ]
    self._setup = setup
    self._all = jnp.arange(num_train)
    self._some = jnp.asarray(np.sort(np.random.default_rng(0).permutation(
        num_train)[:config.num_train_tasks]))
    self._num_test = setup.config.family.num_test
    self._params = jax.jit(jax.vmap(algorithm.actor_params))

    def own(params, tasks, key):
      return evaluation.meta_test(
          family, algorithm.evaluate, params, tasks, key, config.num_repeats,
          config.num_steps, config.num_prior_episodes, axis_name)

    def given(params, tasks, contexts, key):
      return evaluation.meta_test_given_context(
          family, algorithm.evaluate_given_context, params, tasks, contexts,
          key, config.num_steps, axis_name)

    def shift(*args):
      return evaluation.distribution_shift(algorithm, *args)

    def draw(replay, ids, key):
      return evaluation.offline_contexts(
          replay.contexts(), ids, key, config.num_repeats,
          config.context_size)

    compile_ = seeds.layout.compile
    self._own = compile_(own, (0, None, 0))
    self._given_contexts = compile_(given, (0, None, 0, 0))
    self._shift = compile_(shift, (0, 0, 0, 0))
    self._draw = jax.jit(jax.vmap(draw, (None, None, 0)))

  def _self_collected(self, params, train_ids) -> rollout.Adaptation:
    """Adaptation of the held-out tasks, then of the given training tasks."""
    tasks = jax.tree.map(
        lambda test, train: jnp.concatenate([test, train[train_ids]]),
        self._setup.test_tasks, self._setup.train_tasks)
    return self._own(params, tasks, self._keys[0])

  def _given(self, params, replay, train_ids):
    """Returns [S, M, R, E] of training tasks with offline contexts."""
    tasks = jax.tree.map(lambda x: x[train_ids], self._setup.train_tasks)
    contexts = self._draw(replay, train_ids, self._keys[1])
    return self._given_contexts(params, tasks, contexts, self._keys[2])

  def curve(self, state: LearnerState, replay: Replay | None) -> dict:
    """Metrics [S] to log during training.

    Args:
      state: leaves [S, ...].
      replay: offline data, leaves [M, C, ...]; None leaves their scores out.
    """
    params = self._params(state)
    adaptation = self._self_collected(params, self._some)
    returns = adaptation.returns
    scores = {
        'test/self_context': returns[:, :self._num_test],
        'train/self_context': returns[:, self._num_test:],
    }
    if replay is not None:
      scores['train/offline_context'] = self._given(
          params, replay, self._some)
    out = {
        f'eval/{name}/final_return': np.mean(
            np.asarray(rollout.final_return(value)), axis=(1, 2))
        for name, value in scores.items()
    }
    out['eval/diverged'] = _num_diverged(adaptation)
    return out

  def full(
      self, state: LearnerState, replay: Replay | None
  ) -> tuple[dict[str, Any], rollout.Adaptation]:
    """The meta-test protocol on all tasks, and the shift diagnostics.

    Args:
      state: leaves [S, ...].
      replay: offline data, leaves [M, C, ...]; None leaves their scores out.

    Returns:
      Arrays [S, ...] by the names of `offmeta.results.records`, and what
      happened on held-out tasks, leaves [S, M, R, ...].
    """
    params = self._params(state)
    adaptation = self._self_collected(params, self._all)
    test = jax.tree.map(lambda x: x[:, :self._num_test], adaptation)
    train = jax.tree.map(lambda x: x[:, self._num_test:], adaptation)
    out = {
        'test_self_returns': test.returns,
        'train_self_returns': train.returns,
        'diverged': _num_diverged(adaptation),
    }
    if replay is not None:
      out['train_offline_returns'] = self._given(params, replay, self._all)
      shift = self._shift(params, train, *[
          self._draw(replay, self._all, key) for key in self._keys[3:]])
      out.update(
          kl_offline=shift.kl_offline, kl_self=shift.kl_self,
          normalized_shift=shift.normalized_shift,
          posterior_offline_mean=shift.offline_mean,
          posterior_self_mean=shift.self_mean)
    return jax.device_get(out), test


def _num_diverged(adaptation: rollout.Adaptation) -> np.ndarray:
  """How many steps blew up, [S], of leaves [S, M, R, W, ...]."""
  flags = np.asarray(adaptation.transitions.extras['diverged'])
  return flags.sum(axis=(1, 2, 3))
