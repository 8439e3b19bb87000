"""The phase `finetune`: meta-trained learners train on, each in one task.

As in MACAW's release: one offline step on transitions of a random policy, then
rounds of one noisy episode and updates on all that the learner has collected
itself.
One learner per seed and held-out task, side by side.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from offmeta import disk, processes, rollout
from offmeta.collection import phase as collecting
from offmeta.data import buffer as buffers
from offmeta.data.buffer import Replay
from offmeta.losses import returns
from offmeta.training import (
  gather as gathering,
  gatherers,
  loop,
  metrics,
  updates,
)
from offmeta.training.config import ConfigError, Visits
from offmeta.training.setup import Setup
from offmeta.types import Algorithm, LearnerState, Task, Transition

_FOLDER = 'finetune'


def check(setup: Setup):
  """Whether the phase can be run.

  Raises:
    ConfigError: the algorithm cannot be fine-tuned, or there are several
      processes.
  """
  if not setup.learner().in_phase('finetune'):
    raise ConfigError(
      f'config.finetune.iterations: {setup.config.algorithm} has no'
      ' fine-tuning of its own; set it to 0'
    )
  if processes.count() > 1:
    raise ConfigError(
      'config.finetune.iterations: fine-tuning runs in one process only;'
      ' leave it out here (--phases) and run the phase by itself afterwards'
    )


def finetune(setup: Setup):
  """Fine-tunes in all held-out tasks and writes what came of it.

  Raises:
    PhaseError: the offline phase is not finished.
    Interrupted: a stop was requested; the same call continues.
  """
  if setup.is_done(_FOLDER):
    return
  setup = collecting.with_logs(setup)
  algorithm = setup.learner()
  position = algorithm.loops.index(algorithm.loop(_FOLDER))
  states = loop.final_states(
    setup, algorithm.loops[position - 1].name, algorithm, setup.seeds
  )
  own = one_learner_per_task(setup)
  score = _scorer(own, algorithm)
  num_tasks = setup.config.family.num_test
  meta = jax.tree.map(lambda x: jnp.repeat(x, num_tasks, axis=0), states)
  begun = _start(own, algorithm, meta)
  config = setup.config.finetune
  first = [np.asarray(score(state)) for state in (meta, begun)]
  updater = updates.Updater(
    lambda axis: setup.learner(axis).loop(_FOLDER),
    own.seeds,
    setup.config.chunk,
    shared_replay=False,
    iterations=setup.config.finetune.iterations,
    matmul_precision=setup.config.matmul_precision,
  )
  # The first iteration collects the episodes of the burn-in, too.
  rounds = lambda iteration: range(
    0 if iteration == 0 else config.burn_in + iteration,
    config.burn_in + iteration + 1,
  )
  loop.run_loop(
    own,
    _FOLDER,
    loop.start(begun, _empty_replay(own, algorithm)),
    updater,
    show=('eval/return',),
    label=setup.config.algorithm,
    gather=gatherers.own_gatherer(
      own,
      algorithm,
      Visits(
        tasks_per_iteration=1,
        prior_steps=1,
        posterior_steps=0,
        context_size=1,
        rewards='true',
      ),
      rounds,
    ),
    evaluate=lambda state, replay: {
      'eval/return': score(state),
      'eval/env_steps': np.asarray(replay.query.size[:, 0]),
    },
    evaluate_every=config.every_iterations * updater.total,
  )
  _write(setup, first)
  setup.mark_done(_FOLDER)


def one_learner_per_task(setup: Setup) -> Setup:
  """The setup of S x M learners, seed by seed, each with one task."""
  num_tasks = setup.config.family.num_test
  num_seeds = setup.seeds.layout.num_seeds
  tasks = jax.tree.map(
    lambda x: jnp.tile(x, (num_seeds,) + (1,) * (x.ndim - 1)), setup.test_tasks
  )
  keys = jax.vmap(
    lambda key: jax.vmap(lambda task: jax.random.fold_in(key, task))(
      jnp.arange(num_tasks)
    )
  )(setup.seeds.streams(_FOLDER)).reshape(-1)
  return dataclasses.replace(
    setup, train_tasks=tasks, seeds=setup.make_seeds(keys, 1)
  )


def _start(own: Setup, algorithm: Algorithm, states: LearnerState):
  """Learners [S x M] after the offline step on random data."""
  config, family = own.config.finetune, own.family
  uniform = rollout.uniform_policy(family.spec.action_size)
  horizon = family.spec.episode_length
  limit = rollout.max_episodes(family, config.context_size)

  def collected(task: Task, key) -> tuple[Transition, Any]:
    _, log, valid = jax.vmap(
      lambda i: rollout.episode(
        family, uniform, (), (), task, jax.random.fold_in(key, i)
      )
    )(jnp.arange(limit))
    log, valid = jax.tree.map(
      lambda x: x.reshape((limit * horizon,) + x.shape[2:]), (log, valid)
    )
    # Valid rows first, in order; the first `context_size` of them.
    order = jnp.argsort(valid < 1, stable=True)
    log, valid = jax.tree.map(lambda x: x[order], (log, valid))
    if algorithm.data.returns_discount is not None:
      log = log._replace(
        extras={
          **log.extras,
          **returns.annotate(log, valid, algorithm.data.returns_discount),
        }
      )
    return jax.tree.map(lambda x: x[: config.context_size], (log, valid))

  def one(state, task, key):
    return algorithm.loop(_FOLDER).begin(state, *collected(task, key))

  return own.seeds.layout.compile(one, (0, 0, 0))(
    states, own.train_tasks, own.seeds.streams('initial')
  )


def learners(setup: Setup) -> int:
  """S x M, all trained side by side."""
  return setup.seeds.layout.num_seeds * setup.config.family.num_test


def rows(setup: Setup) -> int:
  """Of a learner's replay: all rounds, and room for writing the last one."""
  config = setup.config.finetune
  episodes = config.burn_in + config.iterations + 1
  return episodes * setup.family.spec.episode_length


def example_row(setup: Setup, algorithm: Algorithm) -> Transition:
  """Zeros like a row of a learner's replay."""
  example = gathering.example_transition(setup.family, setup.train_tasks)
  if algorithm.data.returns_discount is not None:
    log = jax.tree.map(lambda x: x[None], example)
    added = returns.annotate(log, jnp.ones(1), 1.0)
    example = example._replace(
      extras={**example.extras, **jax.tree.map(lambda x: x[0], added)}
    )
  return example


def _empty_replay(own: Setup, algorithm: Algorithm) -> Replay:
  """Leaves [S x M, 1, C, ...]."""
  example, size = example_row(own, algorithm), rows(own)
  return gatherers.new_replay(
    own, own.seeds, lambda: Replay(buffers.empty(example, 1, size), None)
  )


def _scorer(own: Setup, algorithm: Algorithm):
  """states [S x M] -> mean return [S x M] of deterministic episodes."""
  family = own.family
  policy = algorithm.evaluate_given_context or algorithm.evaluate

  def one(params, task, key):

    def episode(i):
      k_init, k_episode = jax.random.split(jax.random.fold_in(key, i))
      belief = policy.init(params, k_init)
      return jnp.sum(
        rollout.episode(family, policy, params, belief, task, k_episode)[
          1
        ].reward
      )

    return jnp.mean(
      jax.vmap(episode)(jnp.arange(own.config.finetune.num_episodes))
    )

  compiled = own.seeds.layout.compile(one, (0, 0, 0))
  keys = own.seeds.streams('evaluation')
  params = jax.jit(jax.vmap(algorithm.actor_params))
  return lambda states: compiled(params(states), own.train_tasks, keys)


def _write(setup: Setup, first: list[np.ndarray]):
  """evaluations/finetune.npz: returns [S, M, K] and steps [S, M, K]."""
  logged = metrics.read_series(setup.workdir / _FOLDER / 'metrics.jsonl')
  values = np.concatenate([np.stack(first), logged['eval/return'].values]).T
  taken = np.concatenate(
    [np.zeros((2, values.shape[0])), logged['eval/env_steps'].values]
  ).T
  taken[:, 1] = setup.config.finetune.context_size
  shape = (setup.seeds.layout.num_seeds, -1, values.shape[1])
  disk.write_arrays(
    setup.workdir / 'evaluations' / 'finetune.npz',
    {
      'finetune_returns': values.reshape(shape),
      'finetune_env_steps': taken.reshape(shape),
    },
  )
