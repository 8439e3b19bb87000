"""Updates of a loop's stages: compiled in chunks, for all seeds."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from offmeta import parallel, rollout
from offmeta.data import buffer as buffers, sampler
from offmeta.data.buffer import Replay
from offmeta.training import streaming
from offmeta.training.seeds import Seeds
from offmeta.types import Array, LearnerState, Loop, Rollout, Stage

# Sequences that one call of `Stage.annotate` is batched over, per task.
_BATCH = 16


def init_states(algorithm, seeds: Seeds) -> LearnerState:
  """Untrained states [S]."""
  return jax.jit(jax.vmap(algorithm.init))(seeds.streams('init'))


def make_update(
  make_stage: Callable[[str | None], Stage],
  seeds: Seeds,
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
    return _updates(
      stage,
      num_updates,
      state,
      replay.with_extras(extras),
      key,
      axis_name,
      matmul_precision,
    )

  compiled = seeds.layout.compile(
    one_seed, (0, None if shared_replay else 0, 0, 0), donate=(0,)
  )
  keys = seeds.layout.place(seeds.streams('batches'), 0)
  return lambda state, replay, extras={}: compiled(state, replay, extras, keys)


def make_iterations(
  make_loop: Callable[[str | None], Loop],
  seeds: Seeds,
  num_iterations: int,
  shared_replay: bool,
  matmul_precision: str = 'float32',
) -> Callable:
  """Compiles whole iterations of a loop that gathers nothing in between.

  A stage of one update among stages of many is in the outer scan, so it is
  computed once per iteration and no more.

  Args:
    make_loop: axis_name -> Loop.
    num_iterations: length of the scan.
    seeds, shared_replay, matmul_precision: see `make_update`.

  Returns:
    (state [S], replay) -> (state [S], metrics [S], {'stage/name': mean over
    the updates}).
  """
  axis_name = seeds.layout.axis_name
  loop = make_loop(axis_name)

  def one_seed(state, replay, key):
    def iteration(before, _):
      state, metrics = before, {}
      for stage in loop.stages:
        state, values = _updates(
          stage,
          stage.num_steps,
          state,
          replay,
          key,
          axis_name,
          matmul_precision,
        )
        metrics |= {f'{stage.name}/{k}': v for k, v in values.items()}
      if loop.finished is None:
        return state, (metrics, True)
      idle = loop.finished(before)
      return rollout.select(idle, before, state), (metrics, ~idle)

    state, (metrics, counts) = jax.lax.scan(
      iteration, state, None, length=num_iterations
    )
    if loop.finished is None:
      return state, jax.tree.map(jnp.mean, metrics)
    return state, jax.tree.map(lambda x: jnp.mean(x, where=counts), metrics)

  compiled = seeds.layout.compile(
    one_seed, (0, None if shared_replay else 0, 0), donate=(0,)
  )
  keys = seeds.layout.place(seeds.streams('batches'), 0)
  return lambda state, replay: compiled(state, replay, keys)


def _updates(stage, number, state, replay, key, axis_name, matmul_precision):
  """So many updates of one seed: state, means of the metrics."""
  slots = parallel.local_slots(stage.batch.num_tasks, axis_name)

  def body(state, _):
    if isinstance(stage.batch.query, Rollout):
      batch = replay.batch(slots)
    else:
      batch = sampler.sample_batch(key, state.step, slots, stage.batch, replay)
    with jax.default_matmul_precision(matmul_precision):
      return stage.update(state, batch)

  state, metrics = jax.lax.scan(body, state, None, length=number)
  return state, jax.tree.map(jnp.mean, metrics)


class Updater:
  """The compiled updates of one loop.

  Args:
    make_loop: axis_name -> Loop.
    seeds, shared_replay, matmul_precision: see `make_update`.
    chunk: updates per compiled call, at most. Where whole iterations fit in
      and nothing is gathered in between, a call is several iterations.
    iterations: of the loop.
    together: whether nothing is gathered between iterations.
    make_update: `make_update`, or another for a replay that is kept elsewhere.
    annotate: (stage, state [S], replay) -> extras [S] of a stage that asks
      for them, computed before its first update.

  Attributes:
    total: updates of one iteration.
    iterations: of the loop.
    seeds: whose.

  Raises:
    ValueError: a stage of a loop of several iterations asks for annotations.
  """

  def __init__(
    self,
    make_loop: Callable[[str | None], Loop],
    seeds: Seeds,
    chunk: int,
    shared_replay: bool,
    iterations: int,
    matmul_precision: str = 'float32',
    together: bool = False,
    make_update: Callable = make_update,
    annotate: Callable | None = None,
  ):
    loop = make_loop(None)
    if iterations > 1 and any(stage.annotate for stage in loop.stages):
      raise ValueError(
        f'loop {loop.name!r}: annotations are made once, so a loop with them'
        f' has one iteration, not {iterations}'
      )
    self.seeds = seeds
    self.iterations = iterations
    self.total = sum(stage.num_steps for stage in loop.stages)
    self._annotate = annotate
    self._extras: tuple[int, Mapping[str, Array]] = (-1, {})
    self._make_loop = make_loop
    self._loop = loop
    self._chunk = chunk
    self._shared = shared_replay
    self._precision = matmul_precision
    self._make_update = make_update
    self._per_call = chunk // self.total if together and iterations > 1 else 0
    self._compiled: dict[tuple[int, int], Callable] = {}
    self._finished = loop.finished and jax.jit(jax.vmap(loop.finished))
    self._hold = jax.jit(jax.vmap(rollout.select))

  def finished(self, state: LearnerState) -> Array | None:
    """Which seeds [S] keep their state from here on; None if none ever do."""
    return self._finished and self._finished(state)

  def __call__(
    self,
    state: LearnerState,
    replay: Replay,
    iteration: int,
    updates: int,
    held: Array | None,
  ) -> tuple[LearnerState, int, int, Mapping[str, Array]]:
    """Runs the next chunk.

    Args:
      state: leaves [S, ...]; used up.
      replay: what batches are drawn from.
      iteration: completed ones.
      updates: done in the present one.
      held: [S], `finished` of the state in which the present iteration began.

    Returns:
      (state, completed iterations, updates done in the present one, metrics
      [S] by 'stage/name').
    """
    if self._per_call and not updates:
      number = min(self._per_call, self.iterations - iteration)
      state, metrics = self._program(
        (-1, number),
        lambda: make_iterations(
          self._make_loop, self.seeds, number, self._shared, self._precision
        ),
      )(state, replay)
      return state, iteration + number, 0, metrics
    index, stage, end = self._stage_at(updates)
    count = min(self._chunk, end - updates)
    program = self._program(
      (index, count),
      lambda: self._make_update(
        lambda axis: self._make_loop(axis).stages[index],
        self.seeds,
        count,
        self._shared,
        self._precision,
      ),
    )
    extras = self._extras_of(index, state, replay)
    before = None if held is None else jax.tree.map(jnp.copy, state)
    state, metrics = program(state, replay, extras)
    if held is not None:
      state = self._hold(held, before, state)
    updates += count
    metrics = {f'{stage.name}/{k}': v for k, v in metrics.items()}
    if updates == self.total:
      return state, iteration + 1, 0, metrics
    return state, iteration, updates, metrics

  def _program(self, name, make):
    if name not in self._compiled:
      self._compiled[name] = make()
    return self._compiled[name]

  def _stage_at(self, updates: int) -> tuple[int, Stage, int]:
    """The stage after so many updates of an iteration, and where it ends."""
    end = 0
    for index, stage in enumerate(self._loop.stages):
      end += stage.num_steps
      if updates < end:
        return index, stage, end
    raise ValueError(f'{updates} updates, but an iteration has {self.total}')

  def _extras_of(self, index, state, replay):
    """They depend on nothing that the stage changes: a run that goes on in
    its middle computes the same ones."""
    stage = self._loop.stages[index]
    if stage.annotate is None:
      return {}
    if self._extras[0] != index:
      self._extras = index, self._annotate(stage, state, replay)
    return self._extras[1]


def make_updater(
  setup,
  make_loop: Callable[[str | None], Loop],
  seeds: Seeds,
  iterations: int,
  shared_replay: bool,
  gathers: bool,
) -> Updater:
  """The updates of a loop, by the run's precision and place of the replay.

  Args:
    setup: of the run.
    make_loop: axis_name -> Loop.
    seeds: whose.
    iterations: of the loop.
    shared_replay: the replay has no seed axis.
    gathers: whether data are gathered before every iteration.
  """
  rollouts = make_loop(None).gather is not None  # these stay on the devices
  on_host = setup.runtime.replay == 'host' and not rollouts
  return Updater(
    make_loop,
    seeds,
    setup.config.chunk,
    shared_replay,
    iterations,
    matmul_precision=setup.config.matmul_precision,
    together=not gathers and not on_host,
    make_update=streaming.make_update if on_host else make_update,
    annotate=lambda *args: annotate(setup, seeds, *args),
  )


def annotate(
  setup: Any, seeds: Seeds, stage: Stage, state: LearnerState, data: Replay
) -> dict[str, Array]:
  """What a stage adds to its queries, leaves [S, M, C, ...].

  Every sequence of the query data goes through `stage.annotate` once; rows that
  are in none stay 0.

  Args:
    setup: of the run.
    seeds: whose learners.
    stage: asks for it.
    state: leaves [S, ...].
    data: the offline data, without a seed axis.
  """
  length = int(np.max(np.asarray(data.query.sequence_length), initial=1))

  def one(state, buffer):
    capacity = buffer.data.reward.shape[1]

    def sequence(task_id, number):
      rows, mask = sampler.sequence_rows(buffer, task_id, number, length)
      added = stage.annotate(state, buffers.take(buffer, task_id, rows), mask)
      # Rows past the end of the sequence go nowhere.
      return jnp.where(mask > 0, rows, capacity), added

    def task(task_id):
      rows, added = jax.lax.map(
        lambda number: sequence(task_id, number),
        jnp.arange(buffer.sequence_start.shape[1]),
        batch_size=_BATCH,
      )
      rows = rows.reshape(-1)
      return jax.tree.map(
        lambda x: (
          jnp.zeros((capacity,) + x.shape[2:], x.dtype)
          .at[rows]
          .set(x.reshape((-1,) + x.shape[2:]), mode='drop')
        ),
        added,
      )

    return jax.vmap(task)(jnp.arange(buffer.size.shape[0]))

  added = seeds.layout.compile(one, (0, None))(state, data.query)
  return streaming.to_host(added) if setup.runtime.replay == 'host' else added
