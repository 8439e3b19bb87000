"""A replay in the host's memory: filled and sampled there, batches streamed.

The functions are those of a replay on the device, compiled for jax's CPU
backend, so rows and random numbers are the same.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from offmeta import parallel
from offmeta.data import sampler
from offmeta.training import gather as gathering
from offmeta.training.config import ConfigError
from offmeta.training.seeds import Seeds
from offmeta.types import Stage

# Blocks of a chunk: while one is computed, the next is sampled and sent.
_MAX_BLOCKS = 4


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
) -> Callable:
  """`updates.make_update` for a replay of `to_host`."""
  axis_name = seeds.layout.axis_name
  stage = make_stage(axis_name)
  num_tasks = stage.batch.num_tasks
  blocks = parallel.largest_divisor(num_updates, _MAX_BLOCKS)
  length = num_updates // blocks

  def sample(key, step, replay, extras):  # leaves [length, M, ...]
    replay = replay.with_extras(extras)
    return jax.vmap(
      lambda number: sampler.sample_batch(
        key, step + number, jnp.arange(num_tasks), stage.batch, replay
      )
    )(jnp.arange(length))

  def one_seed(state, batches):
    slots = parallel.local_slots(num_tasks, axis_name)

    def body(state, batch):
      batch = jax.tree.map(lambda x: x[slots], batch)
      with jax.default_matmul_precision(matmul_precision):
        return stage.update(state, batch)

    state, metrics = jax.lax.scan(body, state, batches)
    return state, jax.tree.map(jnp.mean, metrics)

  sample = jax.jit(jax.vmap(sample, (0, 0, None if shared_replay else 0, 0)))
  compiled = seeds.layout.compile(one_seed, (0, 0), donate=(0,))
  keys = to_host(seeds.streams('batches'))

  def call(state, replay, extras={}):
    step, metrics = np.array(state.step), []
    for block in range(blocks):
      state, values = compiled(
        state, sample(keys, step + block * length, replay, extras)
      )
      metrics.append(values)
    return state, jax.tree.map(lambda *x: sum(x) / blocks, *metrics)

  return call


def make_gather(setup: Any, algorithm: Any, seeds: Seeds, config: Any):
  """`stage.make_gather` for a replay of `to_host`."""
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
