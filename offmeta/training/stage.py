"""What the phases' stages share: start, gather, run to the end, restore."""

import jax
import jax.numpy as jnp

from offmeta import parallel
from offmeta.data.buffer import Replay
from offmeta.training import (
  gather as gathering,
  loop,
  preparation,
  schedule,
  streaming,
)
from offmeta.types import LearnerState


class PhaseError(RuntimeError):
  """A phase lacks what an earlier one should have left."""


def init_states(algorithm, seeds: schedule.Seeds) -> LearnerState:
  """Untrained states [S]."""
  return jax.jit(jax.vmap(algorithm.init))(seeds.streams('init'))


def make_updater(
  setup, make_stages, seeds: schedule.Seeds, chunk: int, shared_replay: bool
) -> loop.Updater:
  """The updates of a stage, by the run's precision and place of the replay."""
  on_host = setup.runtime.replay == 'host'
  return loop.Updater(
    make_stages,
    seeds,
    chunk,
    shared_replay=shared_replay,
    matmul_precision=setup.config.matmul_precision,
    make_update=streaming.make_update if on_host else loop.make_update,
    annotate=lambda *args: preparation.annotate(setup, seeds, *args),
  )


def make_gather(setup, algorithm, seeds: schedule.Seeds, config):
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


def gatherer(setup, algorithm, seeds: schedule.Seeds, visited, config):
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


def new_replay(setup, seeds: schedule.Seeds, make, *args) -> Replay:
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


def run_stage(setup, stage, progress, updater, show=(), **kw):
  """Restores, runs and saves one stage.

  Args:
    setup: of the run.
    stage: folder under the workdir.
    progress: where a run that was not interrupted begins; its replay is used
      up.
    updater: the updates, and whose they are.
    show: metrics for the console.
    **kw: further arguments of `loop.run`.
  """
  checkpointer = setup.checkpointer(stage, updater.seeds)
  if checkpointer.latest_step() is not None:
    template = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
      progress,
    )
    # Two replays might not fit.
    jax.tree.map(lambda x: x.delete(), progress.replay)
    progress = checkpointer.restore(template)
  done = int(progress.iteration) * updater.total + int(progress.updates)
  writer = setup.writer(stage, kw['iterations'] * updater.total, show)
  writer.truncate_after(done)
  try:
    progress = loop.run(
      progress,
      updater,
      writer=writer,
      checkpointer=checkpointer,
      checkpoint_every_s=setup.runtime.checkpoint_every_s,
      stop=setup.stop,
      **kw,
    )
  finally:
    writer.close()
    checkpointer.close()
  final = setup.checkpointer(stage, updater.seeds, 'final')
  final.save(0, progress.state)
  final.close()
  return progress


def final_states(
  setup, stage, algorithm, seeds: schedule.Seeds
) -> LearnerState:
  """The learner states [S] that a finished stage left.

  Raises:
    PhaseError: it is not finished.
  """
  if not setup.is_done(stage):
    raise PhaseError(
      f'{setup.workdir / stage}: not finished; run the phase'
      f' {stage.split("/")[0]!r} first (the same command with'
      ' --phases=collect,offline,online continues it)'
    )
  return setup.checkpointer(stage, seeds, 'final').restore(
    init_states(algorithm, seeds)
  )
