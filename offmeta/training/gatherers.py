"""What a loop calls to gather data, compiled, and the replays they go into."""

import jax
import jax.numpy as jnp

from offmeta import envs, parallel, rollout
from offmeta.data.buffer import Replay
from offmeta.data.on_policy import Fresh
from offmeta.training import gather as gathering, seeds as seeds_lib, streaming
from offmeta.types import Rollouts


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


def rollout_functions(setup, algorithm, spec: Rollouts, axis_name=None):
  """What a loop with `Rollouts` starts from and gathers, for one seed.

  Environment e is in training task e modulo the number of tasks, so that more
  environments change none of those that were there.

  Returns:
    start: (state, key) -> Fresh before any step.
    gather: (state, Fresh, key) -> (Fresh, metrics).
  """
  num_tasks = envs.num_tasks(setup.train_tasks)
  task_id = jnp.arange(spec.num_envs, dtype=jnp.int32) % num_tasks
  tasks = envs.take_tasks(setup.train_tasks, task_id)

  def acting(state):
    return setup.family, algorithm.explore, algorithm.actor_params(state)

  def go_on(state, actors, key):
    return rollout.continue_rollout(
      *acting(state), actors, tasks, spec.num_steps, key, axis_name
    )

  def start(state, key):
    actors = rollout.start_actors(*acting(state), tasks, key, axis_name)
    _, shapes = jax.eval_shape(go_on, state, actors, key)
    data = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return Fresh(actors, data, task_id, jnp.zeros((), jnp.int32))

  def gather(state, fresh, key):
    actors, data = go_on(state, fresh.actors, key)
    steps = fresh.env_steps + spec.num_envs * spec.num_steps
    return Fresh(actors, data, task_id, steps), {
      'gather/diverged': jnp.sum(data.extras['diverged'])
    }

  return start, gather


def rollout_gatherer(setup, algorithm, seeds: seeds_lib.Seeds, spec: Rollouts):
  """The same for all seeds, compiled.

  Returns:
    start: (state [S]) -> Fresh [S].
    gather: the loop's, (state [S], Fresh [S], iteration) -> (Fresh, metrics);
      those that were given are used up.
  """
  layout, keys = seeds.layout, seeds.streams('gather')
  start, gather = rollout_functions(setup, algorithm, spec, layout.axis_name)
  start = layout.compile(start, (0, 0))
  gather = layout.compile(gather, (0, 0, 0), donate=(1,))
  fold = jax.jit(
    lambda iteration: jax.vmap(lambda k: jax.random.fold_in(k, iteration))(keys)
  )
  return (
    lambda state: start(state, seeds.streams('actors')),
    lambda state, fresh, iteration: gather(state, fresh, fold(iteration)),
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
