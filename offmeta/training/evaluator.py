"""Compiled evaluations of all seeds; each function is compiled once."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from offmeta import evaluation, parallel, rollout
from offmeta.data.buffer import Replay
from offmeta.training import schedule
from offmeta.training.setup import Setup
from offmeta.types import Algorithm, Array, LearnerState


class Evaluator:
  """Scores learner states on held-out and training tasks.

  Every call draws the same random numbers, so scores are comparable along a
  run and between variants. Held-out and training tasks go through one
  compiled program side by side.

  Args:
    setup: of the run.
    algorithm: supplies the policies; never its updates.
    keys: [S] seed keys.
  """

  def __init__(self, setup: Setup, algorithm: Algorithm, keys: Array):
    config = setup.config.evaluation
    family = setup.family
    num_train = setup.config.family.num_train
    num_seeds = keys.shape[0]
    keys = jax.vmap(lambda k: schedule.stream(k, 'evaluation'))(keys)
    self._keys = [
        jax.vmap(lambda k, i=i: jax.random.fold_in(k, i))(keys)
        for i in range(3)
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
          config.num_steps, config.num_prior_episodes)

    def given(params, replay, ids, key):
      tasks = jax.tree.map(lambda x: x[ids], setup.train_tasks)
      return evaluation.meta_test_given_context(
          family, algorithm.evaluate_given_context, params, tasks, ids,
          replay.contexts(), key, config.num_repeats, config.num_steps,
          config.context_size)

    def shift(params, adaptation, ids, replay, key):
      return evaluation.distribution_shift(
          algorithm, params, adaptation, ids, replay.contexts(), key,
          config.context_size)

    self._own = parallel.over_seeds(own, num_seeds, (0, None, 0))
    self._given = parallel.over_seeds(given, num_seeds, (0, None, None, 0))
    self._shift = parallel.over_seeds(shift, num_seeds, (0, 0, None, None, 0))

  def _self_collected(self, params, train_ids) -> rollout.Adaptation:
    """Adaptation of the held-out tasks, then of the given training tasks."""
    tasks = jax.tree.map(
        lambda test, train: jnp.concatenate([test, train[train_ids]]),
        self._setup.test_tasks, self._setup.train_tasks)
    return self._own(params, tasks, self._keys[0])

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
          params, replay, self._some, self._keys[1])
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
      out['train_offline_returns'] = self._given(
          params, replay, self._all, self._keys[1])
      shift = self._shift(params, train, self._all, replay, self._keys[2])
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
