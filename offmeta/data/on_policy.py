"""What a loop with `types.Rollouts` gathers; it stands where others have a
replay."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from offmeta.types import Array, MetaBatch, Transition


class Fresh(NamedTuple):
  """The latest rollouts, and the environments that they go on in.

  Attributes:
    actors: `rollout.Actors`, leaves [E, ...].
    data: leaves [E, T, ...].
    task_id: [E] int32, training task of each environment.
    env_steps: [] int32, all since the start.
  """

  actors: Any
  data: Transition
  task_id: Array
  env_steps: Array

  def with_extras(self, extras: Mapping[str, Array]) -> 'Fresh':
    """Itself: there is no stage that could have annotated them.

    Raises:
      ValueError: there are extras.
    """
    if extras:
      raise ValueError('annotations are for logged data, not for rollouts')
    return self

  def new_steps(self) -> Array:
    """Environment steps since the start."""
    return self.env_steps

  def batch(self, slots: Array) -> MetaBatch:
    """All steps of the environments `slots` [K], in order; no context."""
    query = jax.tree.map(lambda x: x[slots], self.data)
    return MetaBatch(self.task_id[slots], slots, None, None, query)
