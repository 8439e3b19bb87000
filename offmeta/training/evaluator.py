"""Compiled evaluations of all seeds; each function is traced once."""

import jax
import jax.numpy as jnp
import numpy as np

from offmeta import evaluation, rollout
from offmeta.data.buffer import Replay
from offmeta.training import schedule
from offmeta.training.setup import Setup
from offmeta.types import Algorithm, Array, LearnerState


class Evaluator:
  """Scores learner states on held-out and training tasks.

  Every call draws the same random numbers, so scores are comparable along a
  run and between variants.

  Args:
    setup: of the run.
    algorithm: supplies the policies; never its updates.
    keys: [S] seed keys; the run's own if None.
    shared_replay: the replay passed to calls has no seed axis.
  """

  def __init__(
      self,
      setup: Setup,
      algorithm: Algorithm,
      keys: Array | None = None,
      shared_replay: bool = False,
  ):
    config = setup.config.evaluation
    family = setup.family
    keys = setup.keys if keys is None else keys
    self._keys = jax.vmap(lambda k: schedule.stream(k, 'evaluation'))(keys)
    train_ids = jnp.arange(setup.config.family.num_train)
    some_ids = jnp.asarray(np.sort(np.random.default_rng(0).permutation(
        setup.config.family.num_train)[:config.num_train_tasks]))

    def test(params, tasks, key):
      return evaluation.meta_test(
          family, algorithm.evaluate, params, tasks, key, config.num_repeats,
          config.num_steps, config.num_prior_episodes)

    def given(params, replay, ids, key):
      tasks = jax.tree.map(lambda x: x[ids], setup.train_tasks)
      return evaluation.meta_test_given_context(
          family, algorithm.evaluate_given_context, params, tasks, ids,
          replay.contexts(), key, config.num_repeats, config.num_steps,
          config.context_size)

    def split(key):
      return [jax.random.fold_in(key, i) for i in range(4)]

    def curve(state, replay, key):
      params = algorithm.actor_params(state)
      k_test, k_train, k_given, _ = split(key)
      some = jax.tree.map(lambda x: x[some_ids], setup.train_tasks)
      scores = {
          'test/self_context': test(
              params, setup.test_tasks, k_test).returns,
          'train/self_context': test(params, some, k_train).returns,
      }
      if replay is not None:
        scores['train/offline_context'] = given(
            params, replay, some_ids, k_given)
      return {
          f'eval/{name}/final_return': jnp.mean(rollout.final_return(x))
          for name, x in scores.items()
      }

    def full(state, replay, key):
      params = algorithm.actor_params(state)
      k_test, k_train, k_given, k_shift = split(key)
      on_train = test(params, setup.train_tasks, k_train)
      on_test = test(params, setup.test_tasks, k_test)
      out = {
          'test_self_returns': on_test.returns,
          'train_self_returns': on_train.returns,
      }
      if replay is None:
        return out
      out['train_offline_returns'] = given(params, replay, train_ids, k_given)
      shift = evaluation.distribution_shift(
          algorithm, params, on_train, train_ids, replay.contexts(), k_shift,
          config.context_size)
      out.update(
          kl_offline=shift.kl_offline, kl_self=shift.kl_self,
          normalized_shift=shift.normalized_shift,
          posterior_offline_mean=shift.offline_mean,
          posterior_self_mean=shift.self_mean)
      return out

    def paths(state, key):
      few = jax.tree.map(lambda x: x[:4], setup.test_tasks)
      done = evaluation.meta_test(
          family, algorithm.evaluate, algorithm.actor_params(state), few,
          split(key)[0], 1, config.num_steps, config.num_prior_episodes)
      return done.transitions, done.valid

    axes = (0, None if shared_replay else 0, 0)
    self._curve = jax.jit(jax.vmap(curve, axes))
    self._full = jax.jit(jax.vmap(full, axes))
    self._paths = jax.jit(paths)

  def curve(self, state: LearnerState, replay: Replay | None) -> dict:
    """Metrics [S] to log during training."""
    return jax.device_get(self._curve(state, replay, self._keys))

  def full(self, state: LearnerState, replay: Replay | None) -> dict:
    """Arrays [S, ...] of the meta-test protocol and the diagnostics."""
    return jax.device_get(self._full(state, replay, self._keys))

  def paths(self, state: LearnerState) -> tuple:
    """Transitions [4, 1, W, ...] and valid of seed 0 on held-out tasks."""
    first = jax.tree.map(lambda x: x[0], state)
    return jax.device_get(self._paths(first, self._keys[0]))
