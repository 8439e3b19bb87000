"""Logged data from one SAC learner per task (MACAW's data).

Held-out tasks have learners of their own, so their logs are of the same kind
as those of the training tasks. All are trained side by side in one program.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from offmeta import envs, parallel
from offmeta.collection import history, single_task
from offmeta.collection.history import Logs, Source
from offmeta.data import slices
from offmeta.training import seeds as seeds_lib
from offmeta.training.config import ConfigError
from offmeta.training.setup import Setup


def learners(setup: Setup) -> Setup:
  """The run with a learner for each task, the held-out ones after the others.

  A learner's random numbers depend on the position of its task in its own
  list alone. Tasks take the place of seeds, so devices and processes share
  them; `train_tasks` are those of this process.
  """
  root = history.root_key(setup.config.collect)

  def keys(name, tasks):
    key = seeds_lib.stream(root, name)
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(
      jnp.arange(envs.num_tasks(tasks))
    )

  keys = jnp.concatenate(
    [keys('specialists', setup.train_tasks), keys('held out', setup.test_tasks)]
  )
  seeds = seeds_lib.Seeds(
    keys,
    parallel.make_layout(keys.shape[0], max_devices=setup.runtime.max_devices),
  )
  tasks = jax.tree.map(
    lambda *x: seeds.mine(jnp.concatenate(x)),
    setup.train_tasks,
    setup.test_tasks,
  )
  return dataclasses.replace(
    setup, train_tasks=tasks, test_tasks=tasks, seeds=seeds
  )


def make(setup: Setup) -> Logs:
  """Trains the learners in the stage 'collect', or goes on.

  Raises:
    ConfigError: lives would be too short to cut, or context data are asked
      for.
    Interrupted: a stop was requested; the same call continues.
  """
  config = setup.config.collect
  if config.context_size:
    raise ConfigError(
      f'config.collect.context_size: {config.context_size} asked for, but'
      ' source "sac" has no context data of its own; set it to 0'
    )
  num_train = setup.config.family.num_train
  fewest, _ = single_task.life(setup.family.spec, config.specialists)
  history.check_cut(config, np.full(num_train, fewest))
  everyone = learners(setup)
  layout = everyone.seeds.layout
  evaluator = single_task.Evaluator(everyone, config.specialists)
  progress = single_task.train(
    everyone,
    config.specialists,
    evaluator,
    'collect',
    setup.config.matmul_precision,
  )
  returns, diverged = layout.all_seeds(
    evaluator.score(progress.state, number=1)
  )
  data, size = layout.all_seeds(
    (progress.replay.query.data, progress.replay.query.size)
  )

  def part(which, tasks):
    mine = jax.tree.map(lambda x: x[which, 0], data)
    return history.make(
      *slices.cut(mine, size[which, 0], config.log_slice, config.log_size),
      tasks,
      setup.family.spec.episode_length,
    )

  train, test = slice(None, num_train), slice(num_train, None)
  origin = (
    'from the life of one SAC learner per task, from random actions to its'
    f' last policy, {history.describe_cut(config)}'
  )
  return Logs(
    part(train, setup.train_tasks),
    part(test, setup.test_tasks),
    origin,
    origin,
    {
      'specialist_train_returns': returns[train],
      'specialist_test_returns': returns[test],
      'specialist_diverged': np.sum(diverged),
    },
  )


def steps(setup: Setup) -> tuple[int, int]:
  """Of every task's log, at most."""
  config = setup.config.collect
  if config.log_slice != 'all':
    return config.log_size, 0
  return single_task.life(setup.family.spec, config.specialists)[1], 0


SOURCE = Source(make, steps, steps)
