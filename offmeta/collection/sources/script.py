"""Logged data from a family's scripted policy (SMAC's Sawyer data)."""

import jax
import jax.numpy as jnp
import numpy as np

from offmeta import envs, rollout
from offmeta.collection import history
from offmeta.collection.history import Logs, Source
from offmeta.data.meta_dataset import MetaDataset
from offmeta.training import seeds as seeds_lib
from offmeta.training.config import ConfigError
from offmeta.training.setup import Setup
from offmeta.types import EnvFamily, Key, Policy, Task


def scripted_policy(family: EnvFamily) -> Policy:
  """The family's scripted policy; its params are one task.

  Raises:
    ConfigError: it has none.
  """
  if not hasattr(family, 'scripted_policy'):
    raise ConfigError(
      f'config.collect.source: family {family.spec.name!r} has no scripted'
      ' policy; use "pearl" or "sac"'
    )
  return family.scripted_policy()


def make(setup: Setup) -> Logs:
  """Whole episodes in every training and every held-out task; all are kept.

  Raises:
    ConfigError: the family has no scripted policy.
  """
  config = setup.config.collect
  key = history.root_key(config)
  origin = f'{config.script_episodes} episodes of the scripted policy per task'
  return Logs(
    _episodes(setup, setup.train_tasks, key),
    _episodes(setup, setup.test_tasks, seeds_lib.stream(key, 'held out')),
    origin,
    origin,
  )


def _episodes(setup: Setup, tasks: Task, key: Key) -> MetaDataset:
  """`script_episodes` in each of `tasks`, leaves [M, ...]."""
  family = setup.family
  policy = scripted_policy(family)

  def one(task, key):
    state = policy.init(task, jax.random.fold_in(key, 0))
    return rollout.episode(
      family, policy, task, state, task, jax.random.fold_in(key, 1)
    )[1:]

  @jax.jit
  def side_by_side(key):
    keys = jax.vmap(lambda slot: jax.random.fold_in(key, slot))(
      jnp.arange(envs.num_tasks(tasks))
    )
    return jax.vmap(one)(tasks, keys)

  done = [
    jax.device_get(side_by_side(jax.random.fold_in(key, number)))
    for number in range(setup.config.collect.script_episodes)
  ]
  transitions, valid = jax.tree.map(
    lambda *parts: np.concatenate(parts, axis=1), *done
  )
  return history.pack(
    transitions, valid.astype(bool), tasks, family.spec.episode_length
  )


def steps(setup: Setup) -> tuple[int, int]:
  """Of every task's log."""
  episodes = setup.config.collect.script_episodes
  return episodes * setup.family.spec.episode_length, 0


SOURCE = Source(make, steps, steps)
