"""Runs stages: gather, update in compiled chunks, evaluate, save, resume.

One loop serves the behaviour policy's training, the offline phase (which
gathers nothing) and the self-supervised phase.
"""

from collections.abc import Callable, Mapping, Sequence
import signal
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from offmeta import parallel, processes
from offmeta.data import sampler
from offmeta.data.buffer import Replay
from offmeta.training import metrics as metrics_lib, schedule
from offmeta.training.checkpointing import Checkpointer
from offmeta.types import Array, LearnerState, Stage


class Interrupted(Exception):
  """The process was asked to stop; everything needed to go on is saved."""


class StopRequest:
  """Turns SIGTERM into a request that the loop honours at the next chunk."""

  def __init__(self):
    self.requested = False

  def install(self):
    """Starts listening (main thread only)."""
    signal.signal(signal.SIGTERM, self._on_signal)

  def _on_signal(self, number, frame):
    del number, frame
    self.requested = True


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


def make_update(
  make_stage: Callable[[str | None], Stage],
  seeds: schedule.Seeds,
  num_updates: int,
  shared_replay: bool,
  matmul_precision: str = 'float32',
) -> Callable:
  """Compiles `num_updates` updates of a stage for all seeds.

  Sampling is part of the compiled program; nothing returns to the host in
  between.

  Args:
    make_stage: axis_name -> Stage.
    seeds: whose; their layout shares out seeds or the meta-batch.
    num_updates: length of the scan.
    shared_replay: the replay has no seed axis.
    matmul_precision: of the networks in the updates
      (`networks.base.product`); acting is not touched by it.

  Returns:
    (state [S], replay, extras of its queries [S]) -> (state [S], metrics [S],
    means over the updates).
  """
  axis_name = seeds.layout.axis_name
  stage = make_stage(axis_name)

  def one_seed(state, replay, extras, key):
    replay = replay.with_extras(extras)
    slots = parallel.local_slots(stage.batch.num_tasks, axis_name)

    def body(state, _):
      batch = sampler.sample_batch(key, state.step, slots, stage.batch, replay)
      with jax.default_matmul_precision(matmul_precision):
        return stage.update(state, batch)

    state, metrics = jax.lax.scan(body, state, None, length=num_updates)
    return state, jax.tree.map(jnp.mean, metrics)

  compiled = seeds.layout.compile(
    one_seed, (0, None if shared_replay else 0, 0, 0), donate=(0,)
  )
  keys = seeds.layout.place(seeds.streams('batches'), 0)
  return lambda state, replay, extras={}: compiled(state, replay, extras, keys)


class Updater:
  """Compiled chunks of the stages of one phase.

  Args:
    make_stages: axis_name -> stages, run one after the other.
    seeds, shared_replay, matmul_precision: see `make_update`.
    chunk: updates per compiled call.
    make_update: `make_update`, or another for a replay that is kept elsewhere.
    annotate: (stage, state [S], replay) -> extras [S] of a stage that asks
      for them, computed before its first update.
  """

  def __init__(
    self,
    make_stages: Callable[[str | None], Sequence[Stage]],
    seeds: schedule.Seeds,
    chunk: int,
    shared_replay: bool,
    matmul_precision: str = 'float32',
    make_update: Callable = make_update,
    annotate: Callable | None = None,
  ):
    self._annotate = annotate
    self._extras: tuple[int, Mapping[str, Array]] = (-1, {})
    self._make_stages = make_stages
    self._stages = tuple(make_stages(None))
    self.seeds = seeds
    self._chunk = chunk
    self._shared = shared_replay
    self._precision = matmul_precision
    self._make_update = make_update
    self._compiled: dict[tuple[int, int], Callable] = {}
    self.total = sum(stage.num_steps for stage in self._stages)

  def __call__(
    self, state: LearnerState, replay: Replay, done: int
  ) -> tuple[LearnerState, int, str, Mapping[str, Array]]:
    """Runs the next chunk after `done` updates of this iteration.

    Returns:
      (state, updates run, stage name, metrics [S]).
    """
    first = 0
    for index, stage in enumerate(self._stages):
      if done < first + stage.num_steps:
        break
      first += stage.num_steps
    count = min(self._chunk, first + stage.num_steps - done)
    if (index, count) not in self._compiled:
      self._compiled[index, count] = self._make_update(
        lambda axis: self._make_stages(axis)[index],
        self.seeds,
        count,
        self._shared,
        self._precision,
      )
    state, metrics = self._compiled[index, count](
      state, replay, self._extras_of(index, state, replay)
    )
    return state, count, stage.name, metrics

  def _extras_of(self, index, state, replay):
    """They depend on nothing that the stage changes: a run that goes on in
    its middle computes the same ones."""
    stage = self._stages[index]
    if stage.annotate is None:
      return {}
    if self._extras[0] != index:
      self._extras = index, self._annotate(stage, state, replay)
    return self._extras[1]


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
