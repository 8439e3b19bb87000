"""Runs stages: gather, update in compiled chunks, evaluate, save, resume.

One loop serves the behaviour policy's training, the offline phase (which
gathers nothing) and the self-supervised phase.
"""

from collections.abc import Callable
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from offmeta import processes
from offmeta.checkpoints.checkpointer import Checkpointer
from offmeta.data.buffer import Replay
from offmeta.training import metrics as metrics_lib
from offmeta.training.seeds import Seeds
from offmeta.training.setup import PhaseError
from offmeta.training.stopping import Interrupted, StopRequest
from offmeta.training.updates import Updater, init_states
from offmeta.types import Array, LearnerState


class Progress(NamedTuple):
  """Where a phase stands; all of it is checkpointed.

  Attributes:
    state: leaves [S, ...], S of this process.
    replay: leaves [S, ...]; None when the data never change.
    iteration: [] int32, completed iterations.
    updates: [] int32, updates done in the current iteration. Its data have
      been gathered if this is above 0.
  """

  state: LearnerState
  replay: Replay | None
  iteration: Array
  updates: Array


def start(state: LearnerState, replay: Replay | None) -> Progress:
  """Nothing done yet."""
  zero = jnp.zeros((), jnp.int32)
  return Progress(state, replay, zero, zero)


def run(
  progress: Progress,
  updater: Updater,
  *,
  label: str,
  iterations: int,
  replay: Replay | None = None,
  gather: Callable | None = None,
  evaluate: Callable | None = None,
  evaluate_due: Callable[[int, int], bool] = lambda iteration, updates: False,
  writer: metrics_lib.MetricWriter,
  checkpointer: Checkpointer,
  checkpoint_every_s: float = 60.0,
  stop: StopRequest | None = None,
) -> Progress:
  """Runs a phase from where `progress` stands to its end.

  Args:
    progress: where to begin.
    updater: the updates of one iteration.
    label: prefix of metric names.
    iterations: how many in all.
    replay: the data when they never change (`progress.replay` is None).
    gather: (state, replay, iteration) -> (replay, metrics [S]), before each
      iteration.
    evaluate: (state, replay) -> metrics [S].
    evaluate_due: (iteration, updates) done so far -> whether to evaluate.
    writer: receives metrics.
    checkpointer: receives `progress`.
    checkpoint_every_s: wall time between checkpoints.
    stop: asks to stop.

  Returns:
    The final progress, which has been saved.

  Raises:
    Interrupted: a stop was requested; the progress has been saved.
    DivergenceError: a metric is not finite; nothing was saved after it.
  """
  layout = updater.seeds.layout
  state, data = progress.state, progress.replay
  iteration, updates = int(progress.iteration), int(progress.updates)
  saved_at, cost = time.monotonic(), 0.0

  def save():
    current = Progress(state, data, jnp.int32(iteration), jnp.int32(updates))
    checkpointer.save(iteration * updater.total + updates, current)
    return current

  while iteration < iterations:
    gathered = {}
    if gather is not None and updates == 0:
      data, gathered = gather(state, data, iteration)
    current = data if replay is None else replay
    state, count, name, values = updater(state, current, updates)
    updates += count
    values = {f'{label}/{name}/{k}': v for k, v in values.items()}
    values.update(gathered)
    done, at = iteration, updates
    if updates == updater.total:
      iteration, updates = iteration + 1, 0
    step = done * updater.total + at
    values = layout.all_seeds(values)
    metrics_lib.assert_finite(values, label, step=step)
    if evaluate is not None and evaluate_due(done, at):
      values.update(layout.all_seeds(evaluate(state, current)))
    new = 0 if data is None else int(np.mean(layout.all_seeds(_new(data))))
    writer.write(step, values, iteration=iteration, env_steps=new)
    # At most a twentieth of the time goes into checkpoints.
    waited = time.monotonic() - saved_at > max(checkpoint_every_s, 20 * cost)
    stopping, due = processes.any_process(
      [stop is not None and stop.requested, waited]
    )
    if stopping or due:
      begin = time.monotonic()
      save()
      saved_at = time.monotonic()
      cost = saved_at - begin
    if stopping and iteration < iterations:
      raise Interrupted
  return save()


def _new(replay: Any) -> Array:
  """Environment steps [S] since the start."""
  return jnp.sum(replay.rl.size - replay.rl.offline_size, axis=-1)


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
    progress = run(
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


def final_states(setup, stage, algorithm, seeds: Seeds) -> LearnerState:
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
