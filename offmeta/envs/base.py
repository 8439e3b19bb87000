"""Helpers shared by the families: task trees, published lists, checks."""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from offmeta.types import Array, Task

# The seed of every task list of PEARL's code (oyster) and of its descendants.
PUBLISHED_SEED = 1337
# Sizes of our own lists 'ood', whose test tasks lie outside the training range.
OOD_TRAIN, OOD_TEST = 100, 30

TaskLists = Mapping[str, Callable[[], tuple[Task, Task]]]


def num_tasks(task: Task) -> int:
  """The leading size M that all leaves [M, ...] share.

  Raises:
    ValueError: no leaves, a leaf without an axis, or sizes that differ.
  """
  leaves = jax.tree.leaves(task)
  if not leaves or any(np.ndim(leaf) == 0 for leaf in leaves):
    raise ValueError('a stack of tasks needs leaves with a leading axis')
  sizes = {np.shape(leaf)[0] for leaf in leaves}
  if len(sizes) > 1:
    raise ValueError(f'task leaves disagree on the number of tasks: {sizes}')
  return sizes.pop()


def take_tasks(task: Task, index: int | Sequence[int] | slice | Array) -> Task:
  """Selects from leaves [M, ...]; an integer selects one task, [...]."""
  if isinstance(index, Sequence):
    index = np.asarray(index, np.int32)
  return jax.tree.map(lambda leaf: leaf[index], task)


def concatenate_tasks(*tasks: Task) -> Task:
  """Joins stacks of tasks along their leading axis."""
  return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *tasks)


def clip_action(action: Array) -> Array:
  """Clips to [-1, 1], as rlkit's NormalizedBoxEnv does."""
  return jnp.clip(action, -1.0, 1.0)


def published_random() -> np.random.RandomState:
  """A fresh generator equal to numpy's after `np.random.seed(1337)`."""
  return np.random.RandomState(PUBLISHED_SEED)


def split_tasks(
  name: str,
  values: np.ndarray,
  train: Sequence[int] | np.ndarray,
  test: Sequence[int] | np.ndarray,
) -> tuple[Task, Task]:
  """Makes a (train, test) pair {name: [M, ...]} in float32 from one array."""
  pick = lambda index: {
    name: jnp.asarray(np.asarray(values)[np.asarray(index)], jnp.float32)
  }
  return pick(train), pick(test)


def split_first(
  name: str, values: np.ndarray, num_train: int
) -> tuple[Task, Task]:
  """Splits tasks in order: the first `num_train` train, the others test."""
  index = np.arange(len(values))
  return split_tasks(name, values, index[:num_train], index[num_train:])


def split_interleaved(name: str, values: np.ndarray) -> tuple[Task, Task]:
  """CSRO's split: every fourth task tests, from the third one on."""
  index = np.arange(len(values))
  return split_tasks(name, values, index[index % 4 != 2], index[index % 4 == 2])


def uniform_list(
  name: str, high: float, num_train: int, num_test: int
) -> tuple[Task, Task]:
  """Seeded draws from U(0, high) in order: the first train, the last test."""
  draws = published_random().uniform(0.0, high, num_train + num_test)
  return split_first(name, draws, num_train)


def ood_draws(
  random: np.random.RandomState,
  train: tuple[float, float],
  test: tuple[float, float],
  num_train: int = OOD_TRAIN,
  num_test: int = OOD_TEST,
) -> np.ndarray:
  """Uniform draws from two ranges that do not overlap, [train + test]."""
  assert train[1] <= test[0]
  return np.concatenate(
    [random.uniform(*train, num_train), random.uniform(*test, num_test)]
  )


def ood_angles() -> tuple[Task, Task]:
  """Directions: train in three quarters of the circle, test in the fourth."""
  draws = ood_draws(
    published_random(), (0.0, 1.5 * np.pi), (1.5 * np.pi, 2.0 * np.pi)
  )
  return split_first('angle', draws, OOD_TRAIN)


def select_list(family: str, lists: TaskLists, name: str) -> tuple[Task, Task]:
  """Looks a published list up.

  Raises:
    ValueError: unknown name; the message has the known ones.
  """
  if name not in lists:
    raise ValueError(
      f'unknown task list {name!r} of family {family!r}; '
      f'known: {", ".join(sorted(lists))}'
    )
  return lists[name]()


def require_choice(option: str, value: str, known: Sequence[str]) -> None:
  """Raises ValueError with the known values unless `value` is among them."""
  if value not in known:
    raise ValueError(
      f'option {option!r} is {value!r}; known: {", ".join(known)}'
    )


def require_count(option: str, value: int) -> None:
  """Raises ValueError unless `value` is an integer of at least 1."""
  if isinstance(value, bool) or not isinstance(value, int) or value < 1:
    raise ValueError(
      f'option {option!r} must be an integer of at least 1, not {value!r}'
    )


def require_number(option: str, value: float) -> None:
  """Raises ValueError unless `value` is a finite number."""
  if (
    isinstance(value, bool)
    or not isinstance(value, (int, float))
    or not np.isfinite(value)
  ):
    raise ValueError(
      f'option {option!r} must be a finite number, not {value!r}'
    )


def require_bool(option: str, value: bool) -> None:
  """Raises ValueError unless `value` is True or False."""
  if not isinstance(value, bool):
    raise ValueError(f'option {option!r} must be True or False, not {value!r}')
