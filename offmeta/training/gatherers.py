"""What a loop calls to gather data, compiled, and the replays they go into."""

import jax
import jax.numpy as jnp

from offmeta import parallel
from offmeta.data.buffer import Replay
from offmeta.training import gather as gathering, seeds as seeds_lib, streaming


def make_gather(setup, algorithm, seeds: seeds_lib.Seeds, config):
  """`gathering.gather`, compiled once for all seeds.

  Args:
    setup: of the run.
    algorithm: acts.
    seeds: whose learners.
    config: how much of what.

  Returns:
    (state [S], replay [S], task_id [S, K], keys [S]) -> (replay, metrics);
    the replay that was given is used up.
  """
  if setup.runtime.replay == 'host':
    return streaming.make_gather(setup, algorithm, seeds, config)
  layout = seeds.layout

  def one(state, replay, task_id, key):
    return gathering.gather(
      setup.family,
      algorithm,
      state,
      replay,
      setup.train_tasks,
      task_id,
      key,
      config,
      layout.axis_name,
      parallel.SEEDS,
    )

  return layout.compile(one, (0, 0, 0, 0), donate=(1,))


def gatherer(setup, algorithm, seeds: seeds_lib.Seeds, visited, config):
  """The loop's `gather`: the tasks `visited` [S, iterations, K]."""
  keys = seeds.streams('gather')
  fold = jax.jit(
    lambda iteration: jax.vmap(lambda k: jax.random.fold_in(k, iteration))(keys)
  )
  gather = make_gather(setup, algorithm, seeds, config)
  return lambda state, replay, iteration: gather(
    state, replay, visited[:, iteration], fold(iteration)
  )


def own_gatherer(setup, algorithm, config, rounds):
  """The loop's `gather` where every learner has a task of its own.

  Args:
    setup: `train_tasks` leaves [S, ...], one per learner.
    algorithm: acts.
    config: what one round collects, of true rewards.
    rounds: iteration -> numbers of its rounds; names of random streams.

  Returns:
    (state [S], replay [S], leaves [S, 1, C, ...], iteration) -> (replay,
    metrics); the replay that was given is used up.
  """
  keys = setup.seeds.streams('gather')

  def one(state, replay, task, key):
    tasks = jax.tree.map(lambda x: x[None], task)
    return gathering.gather(
      setup.family,
      algorithm,
      state,
      replay,
      tasks,
      jnp.zeros((1,), jnp.int32),
      key,
      config,
    )

  compiled = setup.seeds.layout.compile(one, (0, 0, 0, 0), donate=(1,))
  fold = jax.jit(
    lambda number: jax.vmap(lambda k: jax.random.fold_in(k, number))(keys)
  )

  def gather(state, replay, iteration):
    diverged = 0.0
    for number in rounds(iteration):
      replay, metrics = compiled(state, replay, setup.train_tasks, fold(number))
      diverged += metrics['gather/diverged']
    return replay, {'gather/diverged': diverged}

  return gather


def new_replay(setup, seeds: seeds_lib.Seeds, make, *args) -> Replay:
  """A replay per seed, leaves [S, ...], where the run keeps them.

  Args:
    setup: of the run.
    seeds: whose.
    make: (*args) -> the replay of one seed; runs inside jit.
    *args: shared by all seeds.
  """
  one = lambda key, *args: make(*args)
  axes = (0,) + (None,) * len(args)
  if setup.runtime.replay == 'host':
    return jax.jit(jax.vmap(one, axes))(*streaming.to_host((seeds.keys, *args)))
  return seeds.layout.compile(one, axes)(seeds.keys, *args)
