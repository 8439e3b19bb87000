"""From a dataset to the replay that an algorithm trains on (`DataSpec`)."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from offmeta.data import buffer as buffers, frames, slices
from offmeta.data.buffer import Buffer, Replay
from offmeta.data.meta_dataset import DatasetError, MetaDataset
from offmeta.losses import returns
from offmeta.types import (
  Array,
  DataSpec,
  EnvFamily,
  EnvSpec,
  Key,
  Task,
  Transition,
)


def replay(
  data: MetaDataset, spec: DataSpec, family: EnvFamily, tasks: Task, key: Key
) -> Replay:
  """The replay that an algorithm asks for.

  What the preparation leaves as it is stays numpy's, so a memory map stays on
  disk. One buffer serves both roles unless the dataset has context data, or
  rewards are mixed. An algorithm that needs returns or sequences takes both
  roles from the query data: context data need not be whole episodes.

  Args:
    data: offline data of the tasks.
    spec: how to prepare them.
    family: for rewards of other tasks.
    tasks: parameters of the data's tasks, leaves [M, ...].
    key: of what is random in it.

  Raises:
    DatasetError: the log does not tell where episodes begin, or is shorter
      than the part that contexts are to come from.
  """
  log = _floats(data.transitions)
  if log.next_observation is None:
    return _frames_once(data, spec)
  ordered = spec.returns_discount is not None or spec.sequence_episodes > 0
  if not ordered:
    context = None
    if spec.context_part != 'all':
      context = _context_part(log, data.size, spec)
    elif data.context is not None and not spec.shared:
      context = _strided(_floats(data.context), data.context_size, spec.stride)
    return Replay(_strided(log, data.size, spec.stride), context)
  if 'time' not in log.extras:
    raise DatasetError(
      "the dataset's extras lack 'time', the step within the episode, without"
      ' which this algorithm cannot tell episodes apart; add it (0 at the'
      ' first step of each)'
    )
  kept = {}
  if spec.returns_discount is not None:
    kept = _returns(log, data.size, spec)
  if not spec.sequence_episodes:
    context = None
    if spec.context_part != 'all':
      context = _context_part(log, data.size, spec)
    return Replay(_strided(log, data.size, spec.stride, kept), context)
  if spec.stride != 1:
    raise ValueError('DataSpec: sequences of a strided log are not sequences')
  if spec.context_part != 'all':
    raise ValueError('DataSpec: sequences are not cut by context_part')
  kept['time'] = log.extras['time']
  episodes = [
    frames.episodes(log.extras['time'][m], int(data.size[m]))
    for m in range(len(data.size))
  ]
  query = _with_sequences(
    _buffer(log, data.size, kept), episodes, spec.sequence_episodes
  )
  if not spec.mix_rewards:
    return Replay(query, None)
  return Replay(
    query, _mixed(log, episodes, spec.sequence_episodes, family, tasks, key)
  )


class Planned(NamedTuple):
  """What `replay` will make of a dataset, known before there is one.

  Attributes:
    replay: of ShapeDtypeStructs.
    loaded: the part of it that is in memory where the dataset stays a memory
      map: everything but rows that are neither picked nor changed.
  """

  replay: Replay
  loaded: Replay


def planned(
  example: Transition,
  spec: DataSpec,
  family: EnvSpec,
  num_tasks: int,
  rows: tuple[int, int],
) -> Planned:
  """The shapes of what `replay` makes.

  Args:
    example: one logged transition, leaves [...], 'time' among its extras.
    spec: how the data are prepared.
    family: whose data they are.
    num_tasks: M.
    rows: per task, of the query and of the context data; 0 without.
  """
  once = frames.are_once(family)
  length = spec.sequence_episodes * family.episode_length
  ordered = spec.returns_discount is not None or length > 0

  def sequences(count):
    if once:
      return count // (family.episode_length + 1)
    return -(-count // length) if length else 0

  def row(example):
    extras = {}
    if spec.returns_discount is not None:
      log = jax.tree.map(lambda x: x[None], example)
      noted = returns.annotate(log, jnp.ones(1), spec.returns_discount)
      extras = jax.tree.map(lambda x: x[0], noted)
    if length:
      extras['time'] = example.extras['time']
    after = None if once else example.next_observation
    return example._replace(extras=extras, next_observation=after)

  def buffer(count, picked, max_sequences=0):
    """Shapes, and those of the part that is loaded."""
    whole = jax.eval_shape(
      lambda x: buffers.empty(row(x), num_tasks, count, max_sequences), example
    )
    if picked:
      return whole, whole
    extras = {k: v for k, v in whole.data.extras.items() if k != 'time'}
    nothing = jax.tree.map(lambda x: None, whole.data)
    return whole, whole._replace(data=nothing._replace(extras=extras))

  query, context = rows
  strided = spec.stride > 1
  made = buffer(-(-query // spec.stride), strided, sequences(query))
  contexts = None, None
  if spec.mix_rewards:
    contexts = buffer(sequences(query) * length, True, sequences(query))
  elif spec.context_part != 'all':
    contexts = buffer(spec.context_rows, True)
  elif context and not ordered and not spec.shared:
    contexts = buffer(
      -(-context // spec.stride), strided, sequences(context) if once else 0
    )
  return Planned(*map(Replay, made, contexts))


def _frames_once(data: MetaDataset, spec: DataSpec) -> Replay:
  """Every episode is a sequence; its last row is none of its steps."""
  kept = spec._replace(sequence_episodes=0, shared=False)
  if kept != DataSpec() or spec.sequence_episodes > 1:
    raise DatasetError(
      'the dataset stores every frame once, and this algorithm asks for'
      f' prepared transitions ({spec}); only sequence_episodes 0 or 1 can be'
      ' had of it: use a dataset of whole transitions'
    )

  def buffer(log, size):
    log = _floats(log)
    found = [
      frames.episodes(log.extras['time'][m], int(size[m])) - np.array([0, 1])
      for m in range(len(size))
    ]
    extras = {'time': log.extras['time']} if spec.sequence_episodes else {}
    return _with_sequences(_buffer(log, size, extras), found, 1)

  separate = data.context is not None and not (
    spec.shared or spec.sequence_episodes
  )
  return Replay(
    buffer(data.transitions, data.size),
    buffer(data.context, data.context_size) if separate else None,
  )


def _floats(log: Transition) -> Transition:
  """All but observations as float32; what is that already stays where it is,
  on disk too."""
  as_is = lambda x: None if x is None else np.asarray(x)
  others = log._replace(observation=None, next_observation=None)
  others = jax.tree.map(lambda x: np.asarray(x, np.float32), others)
  return others._replace(
    observation=as_is(log.observation),
    next_observation=as_is(log.next_observation),
  )


def _buffer(log, size, extras: Mapping[str, Array] = {}) -> Buffer:
  return buffers.make(
    log._replace(extras=dict(extras)), size, log.reward.shape[1]
  )


def _kept_rows(size, stride: int) -> tuple[np.ndarray, np.ndarray]:
  """Which rows of each task stay [M, C'], and how many of them count [M]."""
  size = np.asarray(size)
  count = -(-size // stride)
  rows = (size - 1)[:, None] - stride * (
    count[:, None] - 1 - np.arange(count.max())
  )
  return np.clip(rows, 0, None), count


def _returns(log, size, spec: DataSpec) -> dict[str, np.ndarray]:
  """`returns.annotate` of the rows that stay; one task at a time, since whole
  lives of many learners are large."""
  annotate = jax.jit(
    lambda log, valid: returns.annotate(log, valid, spec.returns_discount)
  )
  kept, _ = _kept_rows(size, spec.stride)
  position = np.arange(log.reward.shape[1])
  found = []
  for m, rows in enumerate(kept):
    one = jax.tree.map(lambda x, m=m: x[m], log)
    values = jax.device_get(annotate(one, position < size[m]))
    if spec.stride != 1:
      values = jax.tree.map(lambda x, rows=rows: x[rows], values)
    found.append(values)
  return jax.tree.map(lambda *x: np.stack(x), *found)


def _strided(log, size, stride, extras: Mapping[str, Array] = {}) -> Buffer:
  """Every `stride`th row of each task, the last one among them.

  Args:
    log: leaves [M, C, ...].
    size: [M].
    stride: 1 keeps all.
    extras: of the rows that stay.
  """
  if stride == 1:
    return _buffer(log, size, extras)
  rows, count = _kept_rows(size, stride)
  take = lambda x: np.take_along_axis(
    np.asarray(x), rows.reshape(rows.shape + (1,) * (x.ndim - 2)), axis=1
  )
  return _buffer(jax.tree.map(take, log._replace(extras={})), count, extras)


def _context_part(log: Transition, size, spec: DataSpec) -> Buffer:
  """The rows that `context_part` names; returns are those of the whole log."""
  extras = {}
  if spec.returns_discount is not None:
    extras = _returns(log, size, spec._replace(stride=1))
  needed = spec.context_rows * (2 if spec.context_part == 'middle' else 1)
  if needed > np.min(size):
    raise DatasetError(
      f'context_rows={spec.context_rows}: contexts from the'
      f' {spec.context_part} of each log need logs of {needed} transitions,'
      f' but one of task {int(np.argmin(size))} has {int(np.min(size))}; ask'
      ' for fewer context_rows, or collect more'
    )
  rows, count = slices.cut(
    log._replace(extras=extras),
    np.asarray(size),
    spec.context_part,
    spec.context_rows,
  )
  return _buffer(rows, count, rows.extras)


def _with_sequences(
  buffer: Buffer, episodes: list[np.ndarray], each: int
) -> Buffer:
  """Notes `each` consecutive episodes as one sequence, and what is left."""
  found = [
    [
      (part[0, 0], part[:, 1].sum())
      for part in np.split(task, np.arange(each, len(task), each))
      if len(part)
    ]
    for task in episodes
  ]
  table = np.zeros((len(found), max(map(len, found)), 2), np.int32)
  for m, task in enumerate(found):
    if task:
      table[m, : len(task)] = task
  return buffer._replace(
    sequence_start=jnp.asarray(table[..., 0]),
    sequence_length=jnp.asarray(table[..., 1]),
    num_sequences=jnp.asarray([len(task) for task in found], jnp.int32),
  )


def _exchange(sequences: list[list[list]], each: int, rng: np.random.Generator):
  """BOReL's exchange of episodes between tasks, in place, task after task.

  Of each task as many sequences are drawn, with replacement, as it has: about
  63% of them, the others stay. In a drawn one, the first `each // 2` episodes
  give way to those at the same positions of sequences of other tasks, as they
  are by then.

  Args:
    sequences: of each task, lists of episodes (whatever they are).
    each: episodes in a full sequence.
    rng: of the draws.
  """
  for m, own in enumerate(sequences):
    others = np.delete(np.arange(len(sequences)), m)
    drawn = rng.integers(len(own), size=len(own)) if own else ()
    for position in range(each // 2):
      for i in drawn:
        found = [
          one for one in sequences[rng.choice(others)] if len(one) > position
        ]
        if found and len(own[i]) > position:
          own[i][position] = found[rng.integers(len(found))][position]


def _mixed(
  log: Transition,
  episodes: list[np.ndarray],
  each: int,
  family: EnvFamily,
  tasks: Task,
  key: Key,
) -> Buffer:
  """BOReL's relabelled sequences, see `_exchange`.

  Rewards of what comes from another task are recomputed for this one, with the
  family's known reward function.
  """
  rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
  num_tasks = len(episodes)
  if num_tasks < 2:
    raise DatasetError(
      'rewards are mixed between tasks, but the dataset has only one; set'
      ' relabel_rewards to False'
    )
  # An episode is where its rows are: (task, row), [2, steps].
  sequences = [
    [
      [
        np.stack([np.full(n, m), begin + np.arange(n)])
        for begin, n in own[start : start + each]
      ]
      for start in range(0, len(own), each)
    ]
    for m, own in enumerate(episodes)
  ]
  _exchange(sequences, each, rng)
  found = [[np.concatenate(one, axis=1) for one in own] for own in sequences]
  lengths = [np.array([one.shape[1] for one in own], int) for own in found]
  size = np.array([part.sum() for part in lengths])
  index = np.zeros((2, num_tasks, size.max()), int)
  for m, own in enumerate(found):
    if own:
      index[:, m, : size[m]] = np.concatenate(own, axis=1)
  mixed = jax.tree.map(lambda x: x[index[0], index[1]], log)
  relabel = jax.jit(jax.vmap(family.reward, (0, 0, 0)))
  reward = relabel(mixed.extras['features'], mixed.action, tasks)
  replaced = index[0] != np.arange(num_tasks)[:, None]
  mixed = mixed._replace(
    reward=np.where(replaced, reward, mixed.reward).astype(np.float32)
  )
  buffer = _buffer(mixed, size, {'time': mixed.extras['time']})
  return _with_sequences(
    buffer,
    [np.stack([np.cumsum(part) - part, part], axis=1) for part in lengths],
    1,
  )
