"""The leaves of a tree as they are on disk, and back.

On disk are the arrays of all processes together. A `layout` says which part
this process has; it is None in programs of one process.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from offmeta import processes
from offmeta.checkpoints.files import CheckpointError
from offmeta.parallel import Layout

_MISSING = '(no such leaf)'


def flatten(tree: Any) -> dict[str, Any]:
  """The leaves by their path, e.g. 'params.critic.0.kernel'.

  Raises:
    CheckpointError: if one is no array or number, or two share a path.
  """
  leaves: dict[str, Any] = {}
  for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    name = jax.tree_util.keystr(path, simple=True, separator='.')
    if name in leaves:
      raise CheckpointError(f'two leaves are called {name!r}; rename one')
    if not isinstance(
      leaf,
      jax.Array
      | np.ndarray
      | np.generic
      | jax.ShapeDtypeStruct
      | bool
      | int
      | float,
    ):
      raise CheckpointError(
        f'leaf {name!r} is a {type(leaf).__name__}; only arrays and numbers'
        ' can be in a checkpoint'
      )
    leaves[name] = leaf
  return leaves


def size(leaf: Any) -> int:
  """How many elements this process has."""
  return int(np.prod(np.shape(leaf), dtype=np.int64))


def describe(leaf: Any, layout: Layout | None) -> dict[str, Any]:
  """Shape, of all processes together, and dtype; fits into JSON."""
  if not hasattr(leaf, 'dtype'):
    leaf = np.asarray(leaf)
  whole = leaf if layout is None else layout.global_struct(leaf)
  return {'shape': list(whole.shape), 'dtype': str(leaf.dtype)}


def mismatch(
  leaves: dict[str, Any], stored: dict[str, Any], layout: Layout | None
) -> str | None:
  """How these leaves are not the `stored` descriptions; None if they are."""
  expected = {name: describe(leaf, layout) for name, leaf in leaves.items()}
  for name in [*expected, *stored]:
    ours, theirs = expected.get(name), stored.get(name)
    if ours != theirs:
      return (
        f'leaf {name!r} is {_show(theirs)} in the checkpoint and'
        f' {_show(ours)} in this program; the code or the configuration has'
        ' changed since it was written'
      )
  return None


def total_bytes(leaves: dict[str, Any], layout: Layout | None) -> int:
  """Of all arrays, of all processes."""
  total = 0
  for leaf in leaves.values():
    data = _data(leaf)
    whole = data if layout is None else layout.global_struct(data)
    total += size(whole) * data.dtype.itemsize
  return total


def to_disk(leaf: Any, layout: Layout | None) -> jax.Array | np.ndarray:
  """What Orbax can write: keys become their data, numbers arrays."""
  if _is_key(leaf):
    leaf = jax.random.key_data(leaf)
  if isinstance(leaf, jax.Array):
    return leaf if layout is None else layout.to_global(leaf)
  leaf = np.asarray(leaf)
  if layout is not None and layout.split and leaf.ndim:
    return processes.concatenate(leaf)
  return leaf


def abstract(
  leaf: Any, layout: Layout | None
) -> jax.ShapeDtypeStruct | np.ndarray:
  """What to ask Orbax for; a numpy array where placement is ours."""
  data = _data(leaf)
  sharding = _sharding(leaf)
  if layout is not None:
    data = layout.global_struct(data)
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
      return data
  elif sharding is not None:
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=sharding)
  return np.broadcast_to(np.zeros((), data.dtype), data.shape)


def from_disk(value: Any, leaf: Any, layout: Layout | None) -> Any:
  """Gives a restored array the type and the sharding of the template leaf.

  Args:
    value: the array; None for one of size zero.
    leaf: of the template.
    layout: who has which part.
  """
  if value is None:
    data = _data(leaf)
    value = np.zeros(data.shape, data.dtype)
  elif layout is not None:
    value = _local_part(value, leaf, layout)
  if isinstance(leaf, bool | int | float) and not isinstance(leaf, np.generic):
    return type(leaf)(value)
  if isinstance(leaf, np.generic):
    return value[()]
  if isinstance(leaf, np.ndarray):
    return value
  if not isinstance(value, jax.Array):
    value = jnp.array(value)
  if _is_key(leaf):
    value = jax.random.wrap_key_data(value, impl=_key_impl(leaf))
  sharding = _sharding(leaf)
  return value if sharding is None else jax.device_put(value, sharding)


def _local_part(value: Any, leaf: Any, layout: Layout) -> Any:
  """Of an array of all processes, what this one has."""
  if isinstance(value, jax.Array):
    value = layout.to_local(value)
    # Only a numpy array becomes an uncommitted one.
    return np.asarray(value) if _sharding(leaf) is None else value
  if not layout.split or not value.ndim:
    return value
  count = leaf.shape[0]
  return value[count * jax.process_index() :][:count].copy()


def _is_key(leaf: Any) -> bool:
  return hasattr(leaf, 'dtype') and jnp.issubdtype(
    leaf.dtype, jax.dtypes.prng_key
  )


def _key_impl(leaf: Any) -> Any:
  if isinstance(leaf, jax.Array):
    return jax.random.key_impl(leaf)
  return leaf.dtype._impl.name  # pylint: disable=protected-access


def _data(leaf: Any) -> Any:
  """Something with the shape, dtype and sharding of what is on disk."""
  if _is_key(leaf):
    data = jax.eval_shape(jax.random.key_data, leaf)
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=leaf.sharding)
  return leaf if hasattr(leaf, 'dtype') else np.asarray(leaf)


def _sharding(leaf: Any) -> jax.sharding.Sharding | None:
  """The sharding that the template insists on, if it does."""
  if isinstance(leaf, jax.Array):
    return leaf.sharding if leaf.committed else None
  return getattr(leaf, 'sharding', None)


def _show(description: dict[str, Any] | None) -> str:
  if description is None:
    return _MISSING
  return f'{description["dtype"]}{description["shape"]}'
