"""A replay off the devices: filled and sampled there, batches streamed.

The functions are those of a replay on the device, compiled for jax's CPU
backend, so rows and random numbers are the same. A replay of numpy arrays,
which may be memory maps of files, is not loaded for batches: rows are drawn by
the same functions, and looked up by numpy. Annotations (`Stage.annotate`) do
read all of it, on the devices.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from offmeta import parallel
from offmeta.data import sampler
from offmeta.training import gather as gathering, memory
from offmeta.training.config import ConfigError
from offmeta.training.seeds import Seeds
from offmeta.types import Stage

# Blocks of a chunk: at least so many where its length allows, and each at
# most so large.
_MIN_BLOCKS = 4
_BLOCK_BYTES = 64 * 2**20


def host() -> jax.Device:
  """The CPU of this process.

  Raises:
    ConfigError: jax was told not to use it.
  """
  try:
    return jax.local_devices(backend='cpu')[0]
  except RuntimeError as error:
    raise ConfigError(
      "--replay=host: the replay is kept by jax's CPU backend, which"
      ' JAX_PLATFORMS excludes; unset it, or name both, e.g. cuda,cpu'
    ) from error


def to_host(tree: Any) -> Any:
  """The tree in the host's memory, as jax arrays that stay there."""
  return jax.device_put(tree, host())


def make_update(
  make_stage: Callable[[str | None], Stage],
  seeds: Seeds,
  num_updates: int,
  shared_replay: bool,
  matmul_precision: str = 'float32',
  block_bytes: int = _BLOCK_BYTES,
) -> Callable:
  """`updates.make_update` for a replay of `to_host`, or of memory maps.

  The chunk's batches are made in blocks: while one is computed, the next is
  looked up and sent, and no more.

  Args:
    make_stage, seeds, num_updates, shared_replay, matmul_precision: see there.
    block_bytes: most that the batches of one block take, all seeds together;
      a block holds at least one update.
  """
  axis_name = seeds.layout.axis_name
  stage = make_stage(axis_name)
  num_tasks = stage.batch.num_tasks
  slots = jnp.arange(num_tasks)

  def sample(key, steps, replay, extras):  # leaves [length, M, ...]
    replay = replay.with_extras(extras)
    return jax.vmap(
      lambda step: sampler.sample_batch(key, step, slots, stage.batch, replay)
    )(steps)

  def draw(key, steps, tables):
    return jax.vmap(
      lambda step: sampler.draw(key, step, slots, stage.batch, tables)
    )(steps)

  def look_up(extras, drawn):
    rows = drawn.query  # [L, M, B], or [L, M, count, T] of windows
    tasks = drawn.task_id.reshape(
      drawn.task_id.shape + (1,) * (rows.ndim - drawn.task_id.ndim)
    )
    return jax.tree.map(lambda x: x[tasks, rows], extras)

  def one_seed(state, batches):
    local = parallel.local_slots(num_tasks, axis_name)

    def body(state, batch):
      batch = jax.tree.map(lambda x: x[local], batch)
      with jax.default_matmul_precision(matmul_precision):
        return stage.update(state, batch)

    state, metrics = jax.lax.scan(body, state, batches)
    return state, jax.tree.map(jnp.mean, metrics)

  axis = None if shared_replay else 0
  sample = jax.jit(jax.vmap(sample, (0, 0, axis, 0)))
  draw = jax.jit(jax.vmap(draw, (0, 0, axis)))
  look_up = jax.jit(jax.vmap(look_up))
  compiled = seeds.layout.compile(one_seed, (0, 0), donate=(0,))
  keys = to_host(seeds.streams('batches'))

  def from_maps(steps, replay, extras):
    """By numpy: only the rows that are drawn are read."""
    drawn = draw(keys, steps, replay.tables())
    batch = sampler.collect(replay, jax.device_get(drawn), stage.batch)
    if extras:
      added = {**batch.query.extras, **look_up(extras, drawn)}
      batch = batch._replace(query=batch.query._replace(extras=added))
    return batch

  def number_of_blocks(replay, extras):
    steps = np.zeros((len(keys), 1), np.int32)
    one = jax.eval_shape(sample, keys, steps, replay, extras)
    fewest = parallel.largest_divisor(num_updates, _MIN_BLOCKS)
    most = max(1, block_bytes // memory.nbytes(one))
    return next(
      n
      for n in range(fewest, num_updates + 1)
      if num_updates % n == 0 and (num_updates // n <= most)
    )

  blocks = []  # their number, once the replay has been seen

  def call(state, replay, extras={}):
    if not blocks:
      blocks.append(number_of_blocks(replay, extras))
    length = num_updates // blocks[0]
    step, metrics = np.array(state.step), []
    mapped = shared_replay and isinstance(replay.query.data.reward, np.ndarray)
    for block in range(blocks[0]):
      steps = step[:, None] + (block * length + np.arange(length, dtype='i4'))
      if mapped:
        batches = from_maps(steps, replay, extras)
      else:
        batches = sample(keys, steps, replay, extras)
      jax.block_until_ready(metrics[-1:])  # of the block before
      state, values = compiled(state, batches)
      metrics.append(values)
    return state, jax.tree.map(lambda *x: sum(x) / blocks[0], *metrics)

  return call


def make_gather(setup: Any, algorithm: Any, seeds: Seeds, config: Any):
  """`gatherers.make_gather` for a replay of `to_host`."""
  layout, tasks = seeds.layout, setup.train_tasks
  prepare = jax.jit(
    jax.vmap(
      lambda replay, task_id, key: gathering.prepare(
        replay, tasks, task_id, key, config
      )
    ),
    donate_argnums=0,
  )
  draw = jax.jit(jax.vmap(lambda *args: gathering.draw(*args, config)))
  keep = jax.jit(
    jax.vmap(lambda *args: gathering.keep(*args, config)), donate_argnums=0
  )
  finish = jax.jit(jax.vmap(gathering.finish), donate_argnums=0)
  unfinished = jax.jit(
    lambda counts: jnp.any(
      jax.vmap(lambda one: gathering.unfinished(one, config))(counts)
    )
  )
  act = layout.compile(
    lambda state, visit, counts, contexts: gathering.act(
      setup.family,
      algorithm,
      state,
      visit,
      counts,
      contexts,
      config,
      layout.axis_name,
    ),
    (0, 0, 0, 0),
  )

  def gather(state, replay, task_id, keys):
    replay, visit, counts = prepare(
      replay, *to_host((jnp.asarray(task_id), keys))
    )
    while unfinished(counts):
      contexts = draw(replay, visit, counts)
      replay, counts = keep(
        replay, visit, counts, *to_host(act(state, visit, counts, contexts))
      )
    return finish(replay, visit, counts)

  return gather
