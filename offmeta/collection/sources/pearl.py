"""Logged data from PEARL: its replay, cut (SMAC's data).

The trained behaviour policy then visits every held-out task once, for logs of
these: as many steps under the prior and the posterior as one visit of its
training gathers, with true rewards. That log is kept whole.
"""

import dataclasses

import jax
import numpy as np

from offmeta.collection import history
from offmeta.collection.history import Logs, Source
from offmeta.data import buffer as buffers, capacity, slices
from offmeta.data.buffer import Replay
from offmeta.data.meta_dataset import MetaDataset
from offmeta.training import (
  evaluator as evaluators,
  gather as gathering,
  gatherers,
  loop,
  seeds as seeds_lib,
  updates,
  visits as visits_lib,
)
from offmeta.training.setup import Setup


def behaviour_seeds(setup: Setup) -> seeds_lib.Seeds:
  """The behaviour policy's seed; apart from those of the run."""
  config = setup.config.collect
  return setup.make_seeds(
    history.root_key(config)[None], config.behaviour.online.num_tasks
  )


def make(setup: Setup) -> Logs:
  """Trains PEARL in the stage 'collect', or goes on.

  Raises:
    ConfigError: its replay would be too short to cut.
    Interrupted: a stop was requested; the same call continues.
  """
  config = setup.config.collect
  algorithm = setup.algorithm('pearl', config.behaviour)
  seeds = behaviour_seeds(setup)
  visited = _visits(setup, seeds)
  _check_cuts(setup, visited)
  fresh = setup.checkpointer('collect', seeds).latest_step() is None
  progress = start(setup, algorithm, seeds, fresh)
  updater = updates.make_updater(
    setup,
    lambda axis: setup.algorithm('pearl', config.behaviour, axis).loop(
      'online'
    ),
    seeds,
    config.iterations,
    shared_replay=False,
    gathers=True,
  )
  evaluator = evaluators.Evaluator(setup, algorithm, seeds)
  every = max(1, config.iterations // 10)
  progress = loop.run_loop(
    setup,
    'collect',
    progress,
    updater,
    show=('eval/test/self_context/final_return',),
    label='pearl',
    gather=gatherers.gatherer(
      setup, algorithm, seeds, seeds.mine(visited), config.gather
    ),
    evaluate=lambda state, replay: evaluator.curve(state, None),
    evaluate_every=every * updater.total,
  )
  gather = config.gather
  visit = visit_held_out(setup, algorithm, seeds, progress.state)
  scores, _ = evaluator.full(progress.state, None)
  return Logs(
    cut(setup, _host(progress.replay)),
    cut_visit(setup, _host(visit)),
    "from the replay of the behaviour policy's training, per task"
    f' {history.describe_cut(config)}',
    'the trained behaviour policy, per task in whole episodes'
    f' {gather.prior_steps} steps under the prior, then'
    f' {gather.posterior_steps}, of them the first episode under the prior'
    ' and each later one under the posterior of the context so far',
    {
      'behaviour_test_returns': scores['test_self_returns'],
      'behaviour_diverged': scores['diverged'],
    },
  )


def _host(replay: Replay) -> Replay:
  """The replay of the one seed, as numpy."""
  return jax.tree.map(lambda x: np.asarray(x[0]), replay)


def _check_cuts(setup, visited):
  """Fails before the training if its replay will be too short to cut."""
  config, gather = setup.config.collect, setup.config.collect.gather
  spec = setup.family.spec
  initial, prior, posterior = (  # with terminations at least the quota
    quota if spec.terminates else capacity.longest(spec, quota)
    for quota in (
      config.initial_steps,
      gather.prior_steps,
      gather.posterior_steps,
    )
  )
  tasks = np.arange(setup.config.family.num_train)
  visits = np.sum(np.asarray(visited)[0, :, :, None] == tasks, axis=1)
  history.check_cut(config, initial + visits.sum(0) * (prior + posterior))
  per_visit = prior + (posterior if gather.posterior_to_context else 0)
  context = initial + visits.sum(0) * per_visit
  if gather.clear_context:  # the last iteration's visits stay
    context = np.full(tasks.shape, initial)
    for counts in visits:
      context = np.where(counts > 0, counts * per_visit, context)
  history.check_rows('context_size', config.context_size, context)


def _visits(setup, seeds):
  config = setup.config.collect
  return visits_lib.visits(
    seeds.all_keys,
    config.iterations,
    config.gather,
    setup.config.family.num_train,
  )


def sizes(setup: Setup, seeds: seeds_lib.Seeds) -> capacity.Sizes:
  """Capacities of the behaviour policy's replay."""
  config, spec = setup.config.collect, setup.family.spec
  start = capacity.longest(spec, config.initial_steps)
  return capacity.sizes(
    spec,
    config.gather,
    _visits(setup, seeds),
    setup.config.family.num_train,
    start,
    start,
    False,
  )


def visit_sizes(setup: Setup) -> capacity.Sizes:
  """Capacities of the replay of one visit to every held-out task."""
  num_test = setup.config.family.num_test
  return capacity.sizes(
    setup.family.spec,
    setup.config.collect.gather,
    np.arange(num_test)[None, None],
    num_test,
    0,
    0,
    False,
  )


def steps(setup: Setup) -> tuple[int, int]:
  """Of a training task's log and context data, at most."""
  config = setup.config.collect
  size = config.log_size
  if config.log_slice == 'all':
    size = sizes(setup, behaviour_seeds(setup)).query
    size -= setup.family.spec.episode_length  # the margin
  return size, config.context_size


def held_out_steps(setup: Setup) -> tuple[int, int]:
  """Of a visit to a held-out task, at most."""
  size, margin = visit_sizes(setup), setup.family.spec.episode_length
  return size.query - margin, min(
    setup.config.collect.context_size, size.context - margin
  )


def _empty(setup, seeds, tasks, num_tasks, size: capacity.Sizes) -> Replay:
  example = gathering.example_transition(setup.family, tasks)
  return gatherers.new_replay(
    setup,
    seeds,
    lambda: Replay(
      buffers.empty(example, num_tasks, size.query),
      buffers.empty(example, num_tasks, size.context),
    ),
  )


def start(
  setup: Setup, algorithm, seeds: seeds_lib.Seeds, fresh: bool
) -> loop.Progress:
  """An untrained behaviour policy and, if fresh, its initial data."""
  config = setup.config.collect
  num_train = setup.config.family.num_train
  states = updates.init_states(algorithm, seeds)
  replay = _empty(
    setup, seeds, setup.train_tasks, num_train, sizes(setup, seeds)
  )
  if not fresh:
    return loop.start(states, replay)
  initial = dataclasses.replace(  # in every task, under the prior
    config.gather, prior_steps=config.initial_steps, posterior_steps=0
  )
  replay, _ = gatherers.make_gather(setup, algorithm, seeds, initial)(
    states, replay, _everywhere(num_train), seeds.streams('initial')
  )
  return loop.start(states, replay)


def _everywhere(num_tasks: int) -> np.ndarray:
  """A visit [1, M] of the one seed to every task."""
  return np.arange(num_tasks)[None]


def visit_held_out(
  setup: Setup, algorithm, seeds: seeds_lib.Seeds, state
) -> Replay:
  """What the policy gathers in one visit to every held-out task, [1, ...]."""
  num_test = setup.config.family.num_test
  there = dataclasses.replace(setup, train_tasks=setup.test_tasks)
  replay = _empty(setup, seeds, setup.test_tasks, num_test, visit_sizes(setup))
  replay, _ = gatherers.make_gather(
    there, algorithm, seeds, setup.config.collect.gather
  )(state, replay, _everywhere(num_test), seeds.streams('held out'))
  return replay


def cut(setup: Setup, replay: Replay) -> MetaDataset:
  """The training tasks' data: slices of the two buffers, leaves [M, ...]."""
  config = setup.config.collect
  context = (None, None)
  if config.context_size:
    context = slices.part(
      replay.context.data, replay.context.size, -config.context_size
    )
  return history.make(
    *slices.cut(
      replay.query.data, replay.query.size, config.log_slice, config.log_size
    ),
    setup.train_tasks,
    setup.family.spec.episode_length,
    *context,
  )


def cut_visit(setup: Setup, replay: Replay) -> MetaDataset:
  """The held-out tasks' data: all of a visit, leaves [M, ...].

  Where the training data have context data of their own, so have these: the
  last `context_size` rows, or as many as the shortest task's visit gave.
  """
  size, context = setup.config.collect.context_size, (None, None)
  if size:
    context = slices.part(
      replay.context.data,
      replay.context.size,
      -min(size, int(replay.context.size.min())),
    )
  return history.make(
    *slices.part(replay.query.data, replay.query.size, None),
    setup.test_tasks,
    setup.family.spec.episode_length,
    *context,
  )


SOURCE = Source(make, steps, held_out_steps)
