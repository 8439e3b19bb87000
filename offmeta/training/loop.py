"""Runs loops: gather, update in compiled chunks, evaluate, save, resume.

The same code serves every `types.Loop`: of the behaviour policy, of the fixed
data (which gathers nothing), and of what learners gather themselves.
"""

from collections.abc import Callable
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from offmeta import processes
from offmeta.checkpoints.checkpointer import Checkpointer
from offmeta.data.buffer import Replay
from offmeta.data.on_policy import Fresh
from offmeta.training import metrics as metrics_lib
from offmeta.training.seeds import Seeds
from offmeta.training.setup import PhaseError
from offmeta.training.stopping import Interrupted, StopRequest
from offmeta.training.updates import Updater, init_states
from offmeta.types import Array, LearnerState


class Progress(NamedTuple):
  """Where a loop stands; all of it is checkpointed.

  Attributes:
    state: leaves [S, ...], S of this process.
    replay: leaves [S, ...]; None when the data never change. Of a loop with
      rollouts these and the environments.
    iteration: [] int32, completed iterations.
    updates: [] int32, updates done in the current iteration. Its data have
      been gathered if this is above 0.
    held: [S], which seeds had finished when the current iteration began; None
      if the loop does not end early.
  """

  state: LearnerState
  replay: Replay | Fresh | None
  iteration: Array
  updates: Array
  held: Array | None = None


def start(
  state: LearnerState, replay: Replay | Fresh | None, held: Array | None = None
) -> Progress:
  """Nothing done yet."""
  zero = jnp.zeros((), jnp.int32)
  return Progress(state, replay, zero, zero, held)


def run(
  progress: Progress,
  updater: Updater,
  *,
  label: str,
  replay: Replay | None = None,
  gather: Callable | None = None,
  evaluate: Callable | None = None,
  evaluate_every: int | None = None,
  writer: metrics_lib.MetricWriter,
  checkpointer: Checkpointer,
  checkpoint_every_s: float = 60.0,
  stop: StopRequest | None = None,
) -> Progress:
  """Runs a loop from where `progress` stands to its end.

  Args:
    progress: where to begin.
    updater: the updates, and how many iterations.
    label: prefix of metric names.
    replay: the data when they never change (`progress.replay` is None).
    gather: (state, replay, iteration) -> (replay, metrics [S]), before each
      iteration.
    evaluate: (state, replay) -> metrics [S].
    evaluate_every: updates between evaluations; the last one is at the end.
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
  state, data, held = progress.state, progress.replay, progress.held
  iteration, updates = int(progress.iteration), int(progress.updates)
  saved_at, cost = time.monotonic(), 0.0

  def at():
    return iteration * updater.total + updates

  def all_finished():
    return held is not None and bool(np.all(layout.all_seeds(held)))

  def save():
    current = Progress(
      state, data, jnp.int32(iteration), jnp.int32(updates), held
    )
    checkpointer.save(at(), current)
    return current

  ended = iteration >= updater.iterations or (not updates and all_finished())
  while not ended:
    gathered = {}
    if gather is not None and updates == 0:
      data, gathered = gather(state, data, iteration)
    current = data if replay is None else replay
    before, begun = at(), held
    state, iteration, updates, values = updater(
      state, current, iteration, updates, held
    )
    if not updates:
      held = updater.finished(state)
      ended = iteration >= updater.iterations or all_finished()
    values = layout.all_seeds({f'{label}/{k}': v for k, v in values.items()})
    # Updates of seeds that had finished are computed and thrown away.
    idle = False if begun is None else layout.all_seeds(begun)
    replaced = lambda by: {k: np.where(idle, by, v) for k, v in values.items()}
    metrics_lib.assert_finite(replaced(0.0), label, step=at())
    values = replaced(np.nan) | layout.all_seeds(gathered)
    due = ended or (
      evaluate_every and at() // evaluate_every > before // evaluate_every
    )
    if evaluate is not None and due:
      values.update(layout.all_seeds(evaluate(state, current)))
    new = (
      0 if data is None else int(np.mean(layout.all_seeds(data.new_steps())))
    )
    writer.write(at(), values, iteration=iteration, env_steps=new)
    # At most a twentieth of the time goes into checkpoints.
    waited = time.monotonic() - saved_at > max(checkpoint_every_s, 20 * cost)
    stopping, save_now = processes.any_process(
      [stop is not None and stop.requested, waited]
    )
    if stopping or save_now:
      begin = time.monotonic()
      save()
      saved_at = time.monotonic()
      cost = saved_at - begin
    if stopping and not ended:
      raise Interrupted
  return save()


def run_loop(setup, folder, progress, updater, show=(), **kw):
  """Restores, runs and saves one loop.

  Args:
    setup: of the run.
    folder: under the workdir.
    progress: where a run that was not interrupted begins; its replay is used
      up.
    updater: the updates, and whose they are.
    show: metrics for the console.
    **kw: further arguments of `run`.
  """
  progress = progress._replace(held=updater.finished(progress.state))
  checkpointer = setup.checkpointer(folder, updater.seeds)
  if checkpointer.latest_step() is not None:
    template = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
      progress,
    )
    # Two replays might not fit.
    jax.tree.map(lambda x: x.delete(), progress.replay)
    progress = checkpointer.restore(template)
  done = int(progress.iteration) * updater.total + int(progress.updates)
  writer = setup.writer(folder, updater.iterations * updater.total, show)
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
  final = setup.checkpointer(folder, updater.seeds, 'final')
  final.save(0, progress.state.replace(memory=()))
  final.close()
  return progress


def final_states(setup, folder, algorithm, seeds: Seeds) -> LearnerState:
  """The learner states [S] that a finished loop left.

  Raises:
    PhaseError: it is not finished.
  """
  if not setup.is_done(folder):
    raise PhaseError(
      f'{setup.workdir / folder}: not finished; run the phase'
      f' {folder.split("/")[0]!r} first (the same command with'
      ' --phases=collect,offline,online continues it)'
    )
  return setup.checkpointer(folder, seeds, 'final').restore(
    init_states(algorithm, seeds).replace(memory=())
  )
