"""Random episodes of a family, with a record of what happens in them."""

import collections
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from offmeta.types import Array, EnvFamily, EnvState, Key, Task


class Record(NamedTuple):
  """What happened in an episode, up to and including its termination.

  Attributes:
    alive: [] bool, no termination so far.
    steps: [] int32.
    diverged: [] int32, steps in which the simulation blew up.
    non_finite: [] int32, steps with a NaN or an infinity in what a
      learner sees.
    max_qd: [] largest absolute velocity; 0 without a simulator.
  """

  alive: Array
  steps: Array
  diverged: Array
  non_finite: Array
  max_qd: Array


class Programs:
  """Reset and random actions of a family, compiled once per batch size N.

  Attributes:
    family: the family.
    reset: (keys [N], tasks [N]) -> states [N].
    roll: (states [N], tasks [N], keys [N], num_steps) -> (states, Record).
    traces, reset_traces: how often `roll` and `reset` were traced, by N.
  """

  def __init__(self, family: EnvFamily):
    self.family = family
    self.traces = collections.Counter()
    self.reset_traces = collections.Counter()
    self.reset = jax.jit(self._reset)
    self.roll = jax.jit(self._roll)

  def start(self, seed: int, number: int) -> tuple[Task, Key, Key]:
    """Fresh tasks [N], keys [N] of resets and keys [N] of actions."""
    k_task, k_reset, k_roll = jax.random.split(jax.random.key(seed), 3)
    return (
      self.family.sample_tasks(k_task, number),
      jax.random.split(k_reset, number),
      jax.random.split(k_roll, number),
    )

  def action(self, key: Key, t: Array | int) -> Array:
    """What `roll` does in step t, [A] in [-1, 1]."""
    return jax.random.uniform(
      jax.random.fold_in(key, t), (self.family.spec.action_size,), minval=-1.0
    )

  def _reset(self, keys, tasks):
    self.reset_traces[keys.shape[0]] += 1
    return jax.vmap(self.family.reset)(keys, tasks)

  def _roll(self, states, tasks, keys, num_steps):
    self.traces[keys.shape[0]] += 1
    one = lambda state, task, key: self._episode(state, task, key, num_steps)
    return jax.vmap(one)(states, tasks, keys)

  def _episode(
    self, start: EnvState, task: Task, key: Key, num_steps: Array
  ) -> tuple[EnvState, Record]:
    """As `rollout.episode`: frozen after a termination; without terminations
    a simulation that blew up starts again."""

    def body(t, carry):
      state, record = carry
      after = self.family.step(state, self.action(key, t), task)
      record = _update(record, after)
      state = _select(record.alive, after, state)
      if not self.family.spec.terminates:
        state = _select(after.diverged > 0.5, start, state)
      return state, record._replace(alive=record.alive & (after.terminal < 0.5))

    zero = jnp.zeros((), jnp.int32)
    record = Record(jnp.ones((), bool), zero, zero, zero, jnp.zeros(()))
    return jax.lax.fori_loop(0, num_steps, body, (start, record))


def _select(condition: Array, yes: Any, no: Any) -> Any:
  return jax.tree.map(lambda y, n: jnp.where(condition, y, n), yes, no)


def _update(record: Record, after: EnvState) -> Record:
  finite = [
    jnp.all(jnp.isfinite(x))
    for x in (after.observation, after.reward, after.features)
  ]
  qd = getattr(after.physics, 'qd', jnp.zeros(1))
  updated = Record(
    alive=record.alive,
    steps=record.steps + 1,
    diverged=record.diverged + (after.diverged > 0.5),
    non_finite=record.non_finite + ~jnp.all(jnp.stack(finite)),
    max_qd=jnp.maximum(record.max_qd, jnp.max(jnp.abs(qd))),
  )
  return _select(record.alive, updated, record)
