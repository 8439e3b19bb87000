"""Parts of logs, by the order in which steps took place."""

from collections.abc import Callable
from typing import Any

import numpy as np

from offmeta.data.meta_dataset import DatasetError, MetaDataset
from offmeta.types import Array, Transition


def slice_transitions(
  dataset: MetaDataset, start: int | None, stop: int | None
) -> MetaDataset:
  """Part of every task's transitions, by insertion order.

  Works like `x[start:stop]` on the valid entries of each task, except that
  asking for more than there is raises: (0, 1200) is the first 1200, (-1200,
  None) the last 1200. Separate context data and `episode_return` stay those of
  the whole log.

  Args:
    dataset: what to slice.
    start: first entry; negative counts from the task's end; None is 0.
    stop: one past the last entry; negative as above; None is the task's end.

  Returns:
    A dataset whose capacity is the longest slice; numpy arrays.

  Raises:
    DatasetError: if a task has fewer transitions than asked for, the slice is
      empty, or frames are stored once.
  """
  if dataset.transitions.next_observation is None:
    raise DatasetError(
      'a dataset that stores every frame once is not sliced by rows; slice the'
      ' whole transitions that it was made from'
    )
  size = np.asarray(dataset.size)
  low = _boundary(start, size, 0)
  high = _boundary(stop, size, size)
  for task in range(size.shape[0]):
    if low[task] < 0 or high[task] > size[task] or high[task] <= low[task]:
      raise DatasetError(
        f'slice [{start}:{stop}] of task {task} is empty or reaches beyond'
        f' its {size[task]} transitions; ask for less, or collect more data'
      )
  length = high - low
  entry = np.arange(length.max())
  index = np.where(entry < length[:, None], low[:, None] + entry, 0)

  def take(leaf: Array) -> np.ndarray:
    array = np.asarray(leaf)
    part = array[np.arange(array.shape[0])[:, None], index]
    part[entry >= length[:, None]] = 0
    return part

  return dataset._replace(
    transitions=_map_transition(take, dataset.transitions),
    size=length.astype(np.int32),
  )


def cut(
  transitions: Transition, size: np.ndarray, where: str, count: int
) -> tuple[Transition, np.ndarray]:
  """So many consecutive transitions of each task's log.

  'middle' lies around the end of the log's first quarter: MACAW's release
  says middle and means that.

  Args:
    transitions: leaves [M, C, ...].
    size: [M] int32.
    where: of `config.SLICES`.
    count: how many; not for 'all'.

  Returns:
    Leaves [M, C', ...], sizes [M].

  Raises:
    DatasetError: a log has fewer.
  """
  if where == 'middle':
    size = size // 4 - count // 2 + count  # what ends with the part
  start, stop = {
    'first': (0, count),
    'middle': (-count, None),
    'last': (-count, None),
    'all': (None, None),
  }[where]
  return part(transitions, size, start, stop)


def part(
  transitions: Transition,
  size: np.ndarray,
  start: int | None,
  stop: int | None = None,
) -> tuple[Transition, np.ndarray]:
  """`slice_transitions` of bare transitions."""
  data = slice_transitions(
    MetaDataset(transitions, size, None, None, {}, size), start, stop
  )
  return data.transitions, data.size


def _boundary(
  position: int | None, size: np.ndarray, default: int | np.ndarray
) -> np.ndarray:
  """A slice boundary for each task, [M], not clipped."""
  if position is None:
    return np.broadcast_to(default, size.shape)
  return size + position if position < 0 else np.full_like(size, position)


def _map_transition(
  function: Callable[[Array], Any], transition: Transition
) -> Transition:
  extras = {name: function(x) for name, x in transition.extras.items()}
  return Transition(*(function(x) for x in transition[:-1]), extras=extras)
