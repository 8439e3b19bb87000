"""Logged data of many tasks, in memory: what they are and what is valid.

`dataset.py` writes and reads them.
"""

from collections.abc import Mapping
import re
from typing import Any, NamedTuple

import numpy as np

from offmeta.types import Array, EnvSpec, Transition

_ACTION_TOLERANCE = 1e-6
_NAME = re.compile(r'[A-Za-z0-9_]+')
DTYPES = ('float32', 'int32', 'bool')  # of extras and task parameters
OBSERVATION_DTYPES = ('float32', 'uint8')
# Extras that the package reads, which have one number per step.
_SCALARS = ('time', 'diverged')


class DatasetError(ValueError):
  """A dataset is missing, damaged, of something else, or not valid."""


class MetaDataset(NamedTuple):
  """A fixed set of logged data for M training tasks.

  Attributes:
    transitions: leaves [M, C, ...], in insertion order; extras hold 'features'
      [M, C, F], and may hold others [M, C] or [M, C, n], of these 'time' and
      'diverged' [M, C]. Without `next_observation` every frame is stored once
      (`data/frames.py`).
    size: [M] int32, how many leading entries of C are valid.
    context: what adaptation may look at, leaves [M, Cc, ...]; None means the
      same as `transitions`.
    context_size: [M] int32, None together with `context`.
    tasks: parameters of the training tasks, leaves [M, ...].
    episode_return: [M], mean return of the logged whole episodes, that is the
      behaviour return of each task, in raw reward units.
  """

  transitions: Transition
  size: Array
  context: Transition | None
  context_size: Array | None
  tasks: Mapping[str, Array]
  episode_return: Array


def validate(
  dataset: MetaDataset, spec: EnvSpec, *, where: str = 'dataset'
) -> None:
  """Checks shapes, dtypes, sizes and values of a dataset.

  Entries beyond `size` (unwritten capacity) are not looked at.

  Args:
    dataset: what to check.
    spec: of the family that the data come from.
    where: named at the start of an error message, e.g. a path.

  Raises:
    DatasetError: names the leaf, the first bad index and what is wrong there.
  """
  size = _check_array(f'{where}: size', dataset.size, (None,), ('int32',))
  num_tasks = size.shape[0]
  if num_tasks == 0:
    raise DatasetError(f'{where}: size: the dataset has no tasks')
  _check_part(f'{where}: transitions', dataset.transitions, size, spec)
  if (dataset.context is None) != (dataset.context_size is None):
    raise DatasetError(
      f'{where}: context and context_size go together; give both or neither'
    )
  if dataset.context is not None:
    context_size = _check_array(
      f'{where}: context_size', dataset.context_size, (num_tasks,), ('int32',)
    )
    _check_part(f'{where}: context', dataset.context, context_size, spec)
    if (dataset.context.next_observation is None) != (
      dataset.transitions.next_observation is None
    ):
      raise DatasetError(
        f'{where}: transitions and context must both have next_observation or'
        ' both store frames once'
      )
  for name, leaf in dataset.tasks.items():
    _check_name(f'{where}: tasks', name)
    array = _check_array(
      f'{where}: tasks.{name}', leaf, (num_tasks, ...), DTYPES
    )
    _check_values(
      f'{where}: tasks.{name}', array, ~np.isfinite(array), 'finite'
    )
  returns = _check_array(
    f'{where}: episode_return',
    dataset.episode_return,
    (num_tasks,),
    ('float32',),
  )
  _check_values(
    f'{where}: episode_return', returns, ~np.isfinite(returns), 'finite'
  )


def is_name(name: Any) -> bool:
  """Whether it can name an array: letters, digits and underscores."""
  return isinstance(name, str) and _NAME.fullmatch(name) is not None


def _check_part(
  where: str, part: Transition, size: np.ndarray, spec: EnvSpec
) -> None:
  """Checks the transitions of one buffer, leaves [M, C, ...]."""
  rewards = _check_array(
    f'{where}.reward', part.reward, (size.shape[0], None), ('float32',)
  )
  num_tasks, capacity = rewards.shape
  for task in range(num_tasks):
    if not 1 <= size[task] <= capacity:
      raise DatasetError(
        f'{where}: task {task} has size {size[task]}, it must be at least 1'
        f' and at most the capacity {capacity}'
      )
  valid = np.arange(capacity) < size[:, None]
  lead = (num_tasks, capacity)
  shapes: dict[str, tuple[Any, ...]] = {
    'observation': (*lead, *spec.observation_shape),
    'action': (*lead, spec.action_size),
    'reward': lead,
    'discount': lead,
    'next_observation': (*lead, *spec.observation_shape),
  }
  arrays = {}
  if part.next_observation is None:
    del shapes['next_observation']
  for name, shape in shapes.items():
    leaf = getattr(part, name)
    dtype = 'float32'
    if name.endswith('observation'):
      dtype = spec.observation_dtype
    arrays[name] = _check_array(f'{where}.{name}', leaf, shape, (dtype,))
  if 'features' not in part.extras:
    raise DatasetError(
      f"{where}.extras: no 'features'; without the reward features the data"
      ' cannot be relabelled, so collect them too'
    )
  for name, leaf in part.extras.items():
    _check_name(f'{where}.extras', name)
    vector = np.ndim(leaf) == 3 and name not in _SCALARS
    shape, dtypes = (*lead, None) if vector else lead, DTYPES
    if name == 'features':
      shape, dtypes = (*lead, spec.feature_size), ('float32',)
    arrays[f'extras.{name}'] = _check_array(
      f'{where}.extras.{name}', leaf, shape, dtypes
    )
  if part.next_observation is None:
    _check_frames_once(where, arrays, size)
  for name, array in arrays.items():
    if array.dtype.kind != 'f':
      continue
    bad = ~np.isfinite(array) & _expand(valid, array)
    _check_values(f'{where}.{name}', array, bad, 'finite')
  action, discount = arrays['action'], arrays['discount']
  bad = (np.abs(action) > 1 + _ACTION_TOLERANCE) & _expand(valid, action)
  _check_values(f'{where}.action', action, bad, 'within [-1, 1]')
  allowed, text = (discount == 0) | (discount == 1), '0 or 1'
  if not spec.terminates:
    allowed, text = discount == 1, '1, this family never terminates'
  _check_values(f'{where}.discount', discount, ~allowed & valid, text)


def _check_frames_once(
  where: str, arrays: Mapping[str, np.ndarray], size: np.ndarray
) -> None:
  """The last row of each episode holds its last frame and no step."""
  if 'extras.time' not in arrays:
    raise DatasetError(
      f"{where}.extras: no 'time'; frames are stored once, and without it"
      ' (0 in the first row of each) episodes cannot be told apart'
    )
  for task, rows in enumerate(size):
    begins = np.flatnonzero(arrays['extras.time'][task, :rows] == 0)
    last = np.append(begins[begins > 0], rows) - 1
    single = np.diff(last, prepend=-1) < 2
    taken = arrays['reward'][task, last] != 0
    taken |= np.any(arrays['action'][task, last] != 0, axis=-1)
    if np.any(single | taken):
      row = int(last[np.argmax(single | taken)])
      raise DatasetError(
        f'{where}: frames are stored once, so the last row of an episode holds'
        f' its last frame and no step, but row {row} of task {task} has an'
        ' action or reward, or is an episode alone; store the data again'
        ' (offmeta.data.frames.once)'
      )


def _expand(valid: np.ndarray, array: np.ndarray) -> np.ndarray:
  """[M, C] -> [M, C, 1, ...] to go with the array."""
  return valid.reshape(valid.shape + (1,) * (array.ndim - valid.ndim))


def _check_name(where: str, name: str) -> None:
  if not is_name(name):
    raise DatasetError(
      f'{where}: {name!r} is not a name of letters, digits and underscores;'
      ' rename it'
    )


def _check_array(
  where: str, leaf: Any, shape: tuple[Any, ...], dtypes: tuple[str, ...]
) -> np.ndarray:
  """The leaf as numpy, if shape (None: any, ...: the rest) and dtype fit."""
  array = np.asarray(leaf)
  exact = shape[:-1] if shape[-1] is ... else shape
  head = array.shape[: len(exact)] if shape[-1] is ... else array.shape
  fits = len(head) == len(exact) and all(
    want in (None, have) for want, have in zip(exact, head)
  )
  if not fits:
    letters = ', '.join(
      '...' if x is ... else '*' if x is None else str(x) for x in shape
    )
    raise DatasetError(
      f'{where}: has shape {list(array.shape)}, expected [{letters}]'
    )
  if str(array.dtype) not in dtypes:
    raise DatasetError(
      f'{where}: has dtype {array.dtype}, expected {" or ".join(dtypes)};'
      ' convert it before saving'
    )
  return array


def _check_values(
  where: str, array: np.ndarray, bad: np.ndarray, rule: str
) -> None:
  if bad.any():
    index = tuple(int(i) for i in np.argwhere(bad)[0])
    raise DatasetError(
      f'{where}: {int(bad.sum())} of {array.size} values are not {rule}; the'
      f' first is {array[index]} at index {list(index)} (task first). Remove'
      ' the transitions or collect the data again'
    )
