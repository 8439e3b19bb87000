"""Learners that are trained side by side, and their random streams."""

from typing import NamedTuple
import zlib

import jax
import numpy as np

from offmeta.parallel import Layout
from offmeta.types import Array, Key


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
