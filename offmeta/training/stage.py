"""What the phases' stages share: start, gather, run to the end, restore."""

import jax

from offmeta import parallel
from offmeta.training import gather as gathering
from offmeta.training import loop, schedule
from offmeta.types import LearnerState


class PhaseError(RuntimeError):
  """A phase lacks what an earlier one should have left."""


def init_states(algorithm, keys) -> LearnerState:
  """Untrained states [S]."""
  return jax.jit(jax.vmap(
      lambda k: algorithm.init(schedule.stream(k, 'init'))))(keys)


def gatherer(setup, algorithm, keys, visited, config):
  """The loop's `gather`, compiled once for all seeds."""
  keys = jax.vmap(lambda k: schedule.stream(k, 'gather'))(keys)

  def one(state, replay, task_id, key):
    return gathering.gather(
        setup.family, algorithm, state, replay, setup.train_tasks, task_id,
        key, config)

  @jax.jit
  def fold(iteration):
    return jax.vmap(lambda k: jax.random.fold_in(k, iteration))(keys)

  compiled = parallel.over_seeds(
      one, keys.shape[0], (0, 0, 0, 0), donate=(1,))
  return lambda state, replay, iteration: compiled(
      state, replay, visited[:, iteration], fold(iteration))


def run_stage(setup, stage, checkpointer, progress, updater, show=(), **kw):
  """Restores, runs and marks one stage."""
  if checkpointer.latest_step() is not None:
    progress = checkpointer.restore(progress)
  done = int(progress.iteration) * updater.total + int(progress.updates)
  writer = setup.writer(stage, kw['iterations'] * updater.total, show)
  writer.truncate_after(done)
  try:
    progress = loop.run(
        progress, updater, writer=writer, checkpointer=checkpointer,
        checkpoint_every_s=setup.checkpoint_every_s, stop=setup.stop, **kw)
  finally:
    writer.close()
    checkpointer.close()
  final = setup.checkpointer(stage, 'final')
  final.save(0, progress.state)
  final.close()
  return progress


def final_states(setup, stage, algorithm, keys) -> LearnerState:
  """The learner states [S] that a finished stage left.

  Raises:
    PhaseError: it is not finished.
  """
  if not setup.is_done(stage):
    raise PhaseError(
        f'{setup.workdir / stage}: not finished; run the phase'
        f' {stage.split("/")[0]!r} first (the same command with'
        ' --phases=collect,offline,online continues it)')
  return setup.checkpointer(stage, 'final').restore(
      init_states(algorithm, keys))
