"""Logs that store every frame once.

An observation and the next one are the same array but for one step, so images
would take twice the room. In these logs an episode of L steps is L + 1 rows:
row t holds observation t and the step that was taken there, the last row the
last observation and no step (zeros, discount 1). `next_observation` is None.
Episodes begin where `extras['time']` is 0.
"""

import numpy as np

from offmeta.data.meta_dataset import DatasetError, MetaDataset
from offmeta.types import EnvSpec, Transition


def are_once(spec: EnvSpec) -> bool:
  """Whether datasets of a family are stored so: those of images."""
  return len(spec.observation_shape) > 1


def most_rows(spec: EnvSpec, steps: int) -> int:
  """Most rows that so many steps of a task take in a dataset."""
  if not are_once(spec):
    return steps
  if spec.terminates:
    return 2 * steps
  # Parts of a log may begin and end within an episode.
  return steps + steps // spec.episode_length + 2


def episodes(time: np.ndarray, size: int) -> np.ndarray:
  """First row and number of rows of each episode of one task, [E, 2]."""
  starts = np.flatnonzero(time[:size] == 0)
  if size and (not len(starts) or starts[0]):
    starts = np.insert(starts, 0, 0)  # a log may begin in the middle of one
  return np.stack([starts, np.diff(np.append(starts, size))], axis=1)


def once(data: MetaDataset) -> MetaDataset:
  """The same data with every frame stored once.

  Raises:
    DatasetError: the log does not tell where episodes begin, or an observation
      is not the one that the step before led to.
  """
  transitions, size = _once(data.transitions, data.size)
  context, context_size = data.context, data.context_size
  if context is not None:
    context, context_size = _once(context, context_size)
  return data._replace(
    transitions=transitions,
    size=size,
    context=context,
    context_size=context_size,
  )


def _once(log: Transition, size) -> tuple[Transition, np.ndarray]:
  if 'time' not in log.extras:
    raise DatasetError(
      "frames cannot be stored once: the log's extras lack 'time', the step"
      ' within the episode (0 at the first step of each)'
    )
  time, size = np.asarray(log.extras['time']), np.asarray(size)
  found = [episodes(time[m], size[m]) for m in range(len(size))]
  rows = np.array([n + len(e) for n, e in zip(size, found)], np.int32)
  shape = (len(size), int(rows.max()))
  source = np.zeros(shape, int)  # the step of a row, or that led to it
  last = np.zeros(shape, bool)
  for m, begins in enumerate(found):
    ends = np.cumsum(begins[:, 1]) + np.arange(len(begins))
    last[m, ends] = True
    held = np.arange(rows[m])
    source[m, : rows[m]] = held - np.searchsorted(ends, held) - last[m, held]
    _check_continues(log, m, begins)
  empty = np.arange(shape[1]) >= rows[:, None]

  def take(leaf, ends=0):
    leaf = np.asarray(leaf)
    leaf = leaf[np.arange(shape[0])[:, None], source]
    leaf[last] = ends
    leaf[empty] = 0
    return leaf

  observation = take(log.observation)
  tasks, _ = np.nonzero(last)
  observation[last] = np.asarray(log.next_observation)[tasks, source[last]]
  extras = {name: take(leaf) for name, leaf in log.extras.items()}
  extras['time'][last] = time[tasks, source[last]] + 1
  return Transition(
    observation=observation,
    action=take(log.action),
    reward=take(log.reward),
    discount=take(log.discount, 1),
    next_observation=None,
    extras=extras,
  ), rows


def _check_continues(log: Transition, task: int, begins: np.ndarray):
  for start, length in begins:
    steps = slice(start, start + length - 1)
    after = np.asarray(log.next_observation[task, steps])
    begun = np.asarray(log.observation[task, start + 1 : start + length])
    if not np.array_equal(after, begun):
      raise DatasetError(
        f'frames cannot be stored once: in the episode of task {task} that'
        f' begins in row {start} an observation is not the next_observation'
        " of the row before; check 'time' in the extras"
      )
