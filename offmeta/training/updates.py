"""Updates of a loop's stages: compiled in chunks, for all seeds."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from offmeta import parallel
from offmeta.data import buffer as buffers, sampler
from offmeta.data.buffer import Replay
from offmeta.training import seeds as seeds_lib, streaming
from offmeta.training.seeds import Seeds
from offmeta.types import Array, LearnerState, Stage

_BATCH = 64


def init_states(algorithm, seeds: seeds_lib.Seeds) -> LearnerState:
  """Untrained states [S]."""
  return jax.jit(jax.vmap(algorithm.init))(seeds.streams('init'))


def make_update(
  make_stage: Callable[[str | None], Stage],
  seeds: seeds_lib.Seeds,
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
    seeds: seeds_lib.Seeds,
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


def make_updater(
  setup, make_stages, seeds: seeds_lib.Seeds, chunk: int, shared_replay: bool
) -> Updater:
  """The updates of a stage, by the run's precision and place of the replay."""
  on_host = setup.runtime.replay == 'host'
  return Updater(
    make_stages,
    seeds,
    chunk,
    shared_replay=shared_replay,
    matmul_precision=setup.config.matmul_precision,
    make_update=streaming.make_update if on_host else make_update,
    annotate=lambda *args: annotate(setup, seeds, *args),
  )


def annotate(
  setup: Any, seeds: Seeds, stage: Stage, state: LearnerState, data: Replay
) -> dict[str, Array]:
  """What a stage adds to its queries, leaves [S, M, C, ...].

  Every sequence of the RL data goes through `stage.annotate` once; rows that
  are in none stay 0.

  Args:
    setup: of the run.
    seeds: whose learners.
    stage: asks for it.
    state: leaves [S, ...].
    data: the offline data, without a seed axis.
  """
  length = int(np.max(np.asarray(data.rl.sequence_length), initial=1))

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

  added = seeds.layout.compile(one, (0, None))(state, data.rl)
  return streaming.to_host(added) if setup.runtime.replay == 'host' else added
