"""The only file that knows about devices: pmap, collectives, device counts.

Algorithms learn about devices through `axis_name` alone; every collective is
the identity when it is None.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from offmeta.types import Array

TASK_AXIS = 'task'
_SEED_AXIS = 'seed'


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


def over_tasks(fn: Callable, num_devices: int) -> Callable:
  """Compiles `fn(*args)` for several devices that share the meta-batch.

  Every argument and result is replicated and has no device axis: in jax >=
  0.10 a pmap with axes None takes and returns plain arrays. `fn` runs under
  the axis `TASK_AXIS` and takes its own share of the tasks by `local_slots`.

  Args:
    fn: pure function of pytrees, positional arguments.
    num_devices: how many.
  """
  # pmap wants an argument with a device axis: the number of the device.
  sharded = jax.pmap(
      lambda device, args: fn(*args),
      axis_name=TASK_AXIS,
      in_axes=(0, None),
      out_axes=None,
      devices=jax.local_devices()[:num_devices],
  )
  return lambda *args: sharded(jnp.arange(num_devices), args)


def over_seeds(
    fn: Callable,
    num_seeds: int,
    seed_axes: tuple[int | None, ...],
    donate: tuple[int, ...] = (),
) -> Callable:
  """Compiles `fn` of one seed for all seeds: vmap, and pmap over devices.

  Seeds never talk to each other, so each device takes an equal share of them.
  On a CPU with several forced host devices this is what keeps every core
  busy: small matrix products do not use a second one.

  Args:
    fn: pure function of pytrees without a seed axis, positional arguments.
    num_seeds: S.
    seed_axes: per argument 0 (leaves [S, ...]) or None (shared by all).
    donate: positions of arguments whose memory may be reused.

  Returns:
    Function of leaves [S, ...] that returns leaves [S, ...].
  """
  devices = usable_devices(num_seeds)
  batched = jax.vmap(fn, in_axes=seed_axes)
  if devices == 1:
    return jax.jit(batched, donate_argnums=donate)
  local = jax.local_devices()[:devices]
  mapped = jax.pmap(batched, in_axes=seed_axes, devices=local)

  def split(x):
    return x.reshape((devices, num_seeds // devices) + x.shape[1:])

  def merge(x):
    return x.reshape((num_seeds,) + x.shape[2:])

  def call(*args):
    return jax.tree.map(merge, mapped(*[
        arg if axis is None else jax.tree.map(split, arg)
        for arg, axis in zip(args, seed_axes)]))

  # Leaves stay spread over the devices between calls, and splitting them is
  # compiled with the rest: outside of jit it would copy the replay each time.
  mesh = Mesh(local, (_SEED_AXIS,))
  share = NamedSharding(mesh, PartitionSpec(_SEED_AXIS))
  places = [
      NamedSharding(mesh, PartitionSpec()) if axis is None else share
      for axis in seed_axes]
  compiled = jax.jit(
      call, in_shardings=places, out_shardings=share, donate_argnums=donate)
  return lambda *args: compiled(
      *[jax.device_put(arg, place) for arg, place in zip(args, places)])
