"""Logged data: what all sources of them share.

A source (`sources/`) makes the logs of the training and of the held-out tasks,
in the order in which steps took place.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np

from offmeta.data.meta_dataset import MetaDataset
from offmeta.training import seeds as seeds_lib
from offmeta.training.config import CollectConfig, ConfigError
from offmeta.types import Array, Key, Task, Transition


class Logs(NamedTuple):
  """What a source makes.

  Attributes:
    train, test: of the training and of the held-out tasks.
    train_origin, test_origin: how they came about, for the manifests.
    scores: arrays for evaluations/collect.npz.
  """

  train: MetaDataset
  test: MetaDataset
  train_origin: str
  test_origin: str
  scores: Mapping[str, Array] = {}


class Source(NamedTuple):
  """A way to make logs; see `sources`.

  Attributes:
    make: (setup) -> Logs; what was begun goes on.
    steps: (setup) -> (steps of each training task's log, steps of context data
      of its own), at most; the latter are 0 if contexts come from the log.
    held_out_steps: the same of the held-out tasks.
  """

  make: Callable[..., Logs]
  steps: Callable[..., tuple[int, int]]
  held_out_steps: Callable[..., tuple[int, int]]


def root_key(config: CollectConfig) -> Key:
  """Of all random numbers of a source; apart from those of the run."""
  return seeds_lib.stream(seeds_lib.seed_keys(config.seed, 1)[0], 'collect')


def make(
  transitions: Transition,
  size: np.ndarray,
  tasks: Task,
  horizon: int,
  context: Transition | None = None,
  context_size: np.ndarray | None = None,
) -> MetaDataset:
  """A dataset with the mean return of its whole episodes.

  Args:
    transitions: leaves [M, C, ...]; extras hold 'time'.
    size: [M] int32.
    tasks: leaves [M, ...].
    horizon: see `episode_returns`.
    context, context_size: what contexts are drawn from, if not the same.
  """
  return MetaDataset(
    transitions=transitions,
    size=size,
    context=context,
    context_size=context_size,
    tasks=jax.tree.map(np.asarray, tasks),
    episode_return=episode_returns(transitions, size, horizon),
  )


def pack(
  transitions: Transition, valid: np.ndarray, tasks: Task, horizon: int
) -> MetaDataset:
  """Steps that took place, in order: leaves [M, T, ...], valid [M, T]."""
  size = valid.sum(axis=1).astype(np.int32)
  order = np.argsort(~valid, axis=1, kind='stable')[:, : size.max()]
  rows = np.arange(len(size))[:, None]
  return make(
    jax.tree.map(lambda x: np.asarray(x)[rows, order], transitions),
    size,
    tasks,
    horizon,
  )


def check_cut(config: CollectConfig, rows: np.ndarray):
  """Fails before a training whose logs would be too short to cut.

  Args:
    config: names the part.
    rows: [M], what the log of each training task will hold at least.

  Raises:
    ConfigError: says how much there will be.
  """
  if config.log_slice == 'middle':
    check_rows(
      'log_size',
      config.log_size,
      2 * (rows // 4) + 1,
      f' around the first quarter of {rows.min()}',
    )
  elif config.log_slice != 'all':
    check_rows('log_size', config.log_size, rows)


def check_rows(name: str, wanted: int, rows: np.ndarray, where: str = ''):
  """Raises ConfigError unless every task gets the rows that are wanted."""
  if wanted > rows.min():
    raise ConfigError(
      f'config.collect.{name}: {wanted} transitions per task asked for, but'
      f' the schedule gathers only {rows.min()}{where} in training task'
      f' {rows.argmin()}; ask for less, or collect more'
    )


def describe_cut(config: CollectConfig) -> str:
  """Which part of a log was kept, for the manifest."""
  if config.log_slice == 'all':
    return 'all transitions'
  where = {
    'first': 'the first',
    'last': 'the last',
    'middle': 'around the end of the first quarter,',
  }[config.log_slice]
  return f'{where} {config.log_size} transitions'


def episode_returns(
  data: Transition, size: np.ndarray, horizon: int
) -> np.ndarray:
  """Mean return [M] of the whole episodes in a log.

  Args:
    data: leaves [M, C, ...]; extras hold 'time', the step within an episode.
    size: [M].
    horizon: steps at which the time limit ends an episode.
  """
  means = []
  for task in range(len(size)):
    n = int(size[task])
    time, reward = data.extras['time'][task, :n], data.reward[task, :n]
    starts = np.flatnonzero(time == 0)
    ends = np.append(starts[1:], n)
    whole = [
      reward[a:b].sum()
      for a, b in zip(starts, ends)
      if b - a == horizon or data.discount[task, b - 1] == 0
    ]
    means.append(np.mean(whole) if whole else reward.sum())
  return np.asarray(means, np.float32)


def num_diverged(data: MetaDataset) -> int:
  """How many rows hold a step that blew up, those of context data included.

  A step that is in both parts counts twice.
  """
  total = 0
  for part, size in (
    (data.transitions, data.size),
    (data.context, data.context_size),
  ):
    if part is not None and 'diverged' in part.extras:
      flags = np.asarray(part.extras['diverged'])
      held = np.arange(flags.shape[1]) < np.asarray(size)[:, None]
      total += np.count_nonzero(flags[held])
  return total
