"""The only file that knows about devices: pmap, collectives, device counts.

Algorithms learn about devices through `axis_name` alone; every collective is
the identity when it is None.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from offmeta.types import Array

TASK_AXIS = 'task'


def pmean(tree, axis_name: str | None):
  """Mean over devices of every leaf."""
  return tree if axis_name is None else jax.lax.pmean(tree, axis_name)


def psum(tree, axis_name: str | None):
  """Sum over devices of every leaf."""
  return tree if axis_name is None else jax.lax.psum(tree, axis_name)


def pmax(value: Array, axis_name: str | None) -> Array:
  """Maximum over devices."""
  return value if axis_name is None else jax.lax.pmax(value, axis_name)


def axis_size(axis_name: str | None) -> int:
  """Number of devices along the axis; 1 without one."""
  return 1 if axis_name is None else jax.lax.axis_size(axis_name)


def local_slots(num_tasks: int, axis_name: str | None) -> Array:
  """This device's positions [num_tasks / devices] in the meta-batch."""
  if axis_name is None:
    return jnp.arange(num_tasks)
  local = num_tasks // axis_size(axis_name)
  return jax.lax.axis_index(axis_name) * local + jnp.arange(local)


def usable_devices(num_tasks: int, available: int | None = None) -> int:
  """The largest divisor of the meta-batch that is at most the device count."""
  available = jax.local_device_count() if available is None else available
  return max(d for d in range(1, available + 1) if num_tasks % d == 0)


def shard_update(
    fn: Callable, num_devices: int, donate: tuple[int, ...] = ()
) -> Callable:
  """Compiles `fn(*args)` for one device or for several.

  Every argument and result is replicated and has no device axis: in jax >=
  0.10 a pmap with axes None takes and returns plain arrays. With several
  devices `fn` runs under the axis `TASK_AXIS` and must take its own share of
  the meta-batch by `local_slots`.

  Args:
    fn: pure function of pytrees. All its arguments are positional.
    num_devices: 1 gives plain `jit`.
    donate: positions of arguments whose memory may be reused.
  """
  if num_devices == 1:
    return jax.jit(fn, donate_argnums=donate)
  # Donation is left out: pmap's replicated inputs may be shared buffers.
  return jax.pmap(
      fn,
      axis_name=TASK_AXIS,
      in_axes=None,
      out_axes=None,
      devices=jax.local_devices()[:num_devices],
  )
