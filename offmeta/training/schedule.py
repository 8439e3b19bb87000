"""Which tasks are visited when, and how much memory that takes.

The schedule of an experiment is a function of its seeds, so it is computed
before the run and buffers are made exactly large enough.
"""

from typing import NamedTuple
import zlib

import jax
import numpy as np

from offmeta.parallel import Layout
from offmeta.training.config import ExperimentConfig, GatherConfig
from offmeta.types import Array, EnvSpec, Key


def stream(key: Key, name: str) -> Key:
  """The random stream of that name."""
  return jax.random.fold_in(key, zlib.crc32(name.encode()) & 0x7FFFFFFF)


def seed_keys(seed: int, num_seeds: int, first: int = 0) -> Key:
  """Keys [S] of seeds first, first + 1, ...; none depends on the others."""
  root = jax.random.key(seed)
  return jax.vmap(lambda s: jax.random.fold_in(root, s))(
    np.arange(first, first + num_seeds)
  )


class Seeds(NamedTuple):
  """Learners that are trained side by side, and what serves them.

  Attributes:
    all_keys: one per seed, those of other processes included.
    layout: over devices and processes; of as many seeds.
  """

  all_keys: Key
  layout: Layout

  @property
  def keys(self) -> Key:
    """Keys [S] of the seeds that this process serves."""
    return self.mine(self.all_keys)

  def mine(self, values: Array) -> Array:
    """The part for this process's seeds of values of all seeds."""
    own = self.layout.seeds
    return values[own.start : own.stop]

  def streams(self, name: str) -> Key:
    """The random streams [S] of that name."""
    return jax.vmap(lambda k: stream(k, name))(self.keys)


def visits(
  keys: Key, iterations: int, gather: GatherConfig, num_train: int
) -> Array:
  """Task numbers [S, iterations, K], uniform with replacement."""
  shape = (iterations, gather.tasks_per_iteration)
  return jax.vmap(
    lambda k: jax.random.randint(stream(k, 'visits'), shape, 0, num_train)
  )(keys)


def longest(spec: EnvSpec, quota: int) -> int:
  """Most steps that whole episodes take to reach a quota."""
  horizon = spec.episode_length
  if quota <= 0:
    return 0
  if spec.terminates:
    return quota + horizon - 1
  return -(-quota // horizon) * horizon


class Sizes(NamedTuple):
  """Capacities in transitions per task.

  Attributes:
    rl, encoder: of the two buffers (equal when one serves both).
    sequences: longest list of exploration sequences of one task.
  """

  rl: int
  encoder: int
  sequences: int


def sizes(
  spec: EnvSpec,
  gather: GatherConfig,
  visited: np.ndarray,
  num_train: int,
  start_rl: int,
  start_encoder: int,
  shared: bool,
) -> Sizes:
  """Capacities that hold the start data and every scheduled visit.

  Args:
    spec: of the family.
    gather: what one visit collects.
    visited: [S, iterations, K] task numbers.
    num_train: M.
    start_rl, start_encoder: rows at the start.
    shared: one buffer serves both roles.
  """
  visited = np.asarray(visited)
  flat = visited.reshape(visited.shape[0], -1)
  counts = np.stack([np.bincount(row, minlength=num_train) for row in flat])
  most = int(counts.max()) if counts.size else 0
  prior = longest(spec, gather.prior_steps)
  posterior = longest(spec, gather.posterior_steps)
  margin = spec.episode_length  # append writes whole episodes
  rl = start_rl + most * (prior + posterior) + margin
  per_visit = prior + (posterior if gather.posterior_to_encoder else 0)
  if gather.clear_encoder_buffer:  # at most one iteration's visits stay
    per_iteration = (
      np.stack(
        [
          np.bincount(row, minlength=num_train)
          for row in visited.reshape(-1, visited.shape[-1])
        ]
      )
      if visited.size
      else np.zeros((1, 1))
    )
    repeated = int(per_iteration.max())
    encoder = max(start_encoder, repeated * per_visit) + margin
  else:
    encoder = start_encoder + most * per_visit + margin
  return Sizes(rl, rl if shared else encoder, max(most, 1))


def online_visits(config: ExperimentConfig, seeds: Seeds) -> Array:
  """Task numbers [S, iterations, K] of the online phase, of all seeds."""
  return visits(
    seeds.all_keys,
    config.online.iterations,
    config.online.gather,
    config.family.num_train,
  )


def online_sizes(
  spec: EnvSpec,
  config: ExperimentConfig,
  seeds: Seeds,
  start_rl: int,
  start_encoder: int,
) -> Sizes:
  """Capacities of the online phase, the same in all processes.

  Args:
    spec: of the family.
    config: of the variant.
    seeds: of the run.
    start_rl, start_encoder: rows of the dataset; without encoder data of its
      own 0, and the RL data serve.
  """
  return sizes(
    spec,
    config.online.gather,
    online_visits(config, seeds),
    config.family.num_train,
    start_rl,
    start_encoder or start_rl,
    config.online.share_encoder_buffer,
  )
