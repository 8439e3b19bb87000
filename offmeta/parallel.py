"""The only file that knows about devices.

A `Layout` says which devices serve which seeds and tasks, and compiles
functions of one seed for them with `jax.pmap`. Algorithms learn about devices
through `axis_name` alone; every collective is the identity when it is None.

Every process runs the same program and holds arrays of its own devices: the
seeds that it serves, or, where a meta-batch is shared out, copies of all.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
from jax.sharding import (
  Mesh,
  NamedSharding,
  PartitionSpec,
  SingleDeviceSharding,
)
import numpy as np

from offmeta import processes
from offmeta.types import Array

TASK_AXIS = 'task'  # of devices that share the tasks
SEEDS = 'seeds'  # of the seeds that one device has side by side (vmap)
_PROCESS_AXIS, _LOCAL_AXIS = 'process', 'local'


# Inside a compiled program.


def pmean(tree, axis_name: str | None):
  """Mean over devices of every leaf."""
  return tree if axis_name is None else jax.lax.pmean(tree, axis_name)


def psum(tree, axis_name: str | None):
  """Sum over devices of every leaf."""
  return tree if axis_name is None else jax.lax.psum(tree, axis_name)


def pmax(value: Array, axis_name: str | None) -> Array:
  """Maximum over devices."""
  return value if axis_name is None else jax.lax.pmax(value, axis_name)


def all_gather(tree, axis_name: str | None):
  """Leaves [n, ...] of all devices, one after the other: [devices * n, ...].

  A loss of what was gathered is the same on every device, and the gradient on
  one of them is that of the sum of all these copies: `pmean` of the gradients
  is then the gradient of the loss.
  """
  if axis_name is None:
    return tree
  return jax.tree.map(
    lambda x: jax.lax.all_gather(x, axis_name, tiled=True), tree
  )


def any_along(flag: Array, axis_name: str | None) -> Array:
  """Whether a bool [] is set anywhere along an axis.

  A loop over seeds that are vmapped under `SEEDS` should ask for all of them:
  a condition of its own for each makes every iteration copy what is looped
  over.
  """
  if axis_name is None:
    return flag
  return jax.lax.pmax(flag.astype(jnp.int32), axis_name) > 0


def axis_size(axis_name: str | None) -> int:
  """Number of devices along the axis; 1 without one."""
  return 1 if axis_name is None else jax.lax.axis_size(axis_name)


def _share(count: int, axis_name: str | None) -> Array:
  """This device's positions among `count`, rounded up."""
  each = -(-count // axis_size(axis_name))
  return jax.lax.axis_index(axis_name) * each + jnp.arange(each)


def local_slots(num_tasks: int, axis_name: str | None) -> Array:
  """This device's positions [num_tasks / devices] in the meta-batch."""
  if axis_name is None:
    return jnp.arange(num_tasks)
  if num_tasks % axis_size(axis_name):
    raise ValueError(
      f'a meta-batch of {num_tasks} tasks does not divide over'
      f' {axis_size(axis_name)} devices'
    )
  return _share(num_tasks, axis_name)


def shared_vmap(
  fn: Callable, axis_name: str | None, in_axes: tuple[int | None, ...]
) -> Callable:
  """`jax.vmap(fn, in_axes)`, of which each device does its share.

  Every device gets all results. Where the size is no multiple of the number
  of devices, some entries are computed twice.

  Args:
    fn: pure function of pytrees, positional arguments.
    axis_name: device axis.
    in_axes: per argument 0 or None.
  """
  batched = jax.vmap(fn, in_axes)
  if axis_name is None:
    return batched

  def call(*args):
    mapped = [arg for arg, axis in zip(args, in_axes) if axis == 0]
    count = jax.tree.leaves(mapped)[0].shape[0]
    mine = _share(count, axis_name) % count
    out = batched(
      *[
        arg if axis is None else jax.tree.map(lambda x: x[mine], arg)
        for arg, axis in zip(args, in_axes)
      ]
    )
    return jax.tree.map(lambda x: x[:count], all_gather(out, axis_name))

  return call


# Layouts.


def largest_divisor(number: int, limit: int) -> int:
  """The largest divisor of `number` that is at most `limit`."""
  return max(d for d in range(1, limit + 1) if number % d == 0)


@dataclasses.dataclass(frozen=True)
class Layout:
  """Which devices serve which seeds and tasks; make one with `make_layout`.

  Attributes:
    num_seeds: S, over all processes.
    seeds: those that this process serves.
    devices: what one compiled program runs on; of several processes only
      where they share the meta-batch.
    axis_name: the axis over which the devices share the tasks; None if every
      device has seeds of its own.
  """

  num_seeds: int
  seeds: range
  devices: tuple[jax.Device, ...]
  axis_name: str | None = None

  @property
  def local_devices(self) -> list[jax.Device]:
    """Those of this process."""
    here = jax.process_index()
    return [d for d in self.devices if d.process_index == here]

  @property
  def split(self) -> bool:
    """Whether processes serve different seeds."""
    return len(self.seeds) < self.num_seeds

  @property
  def repeated(self) -> bool:
    """Whether several processes all do the same."""
    return (
      jax.process_count() > 1
      and not self.split
      and len(self.devices) == len(self.local_devices)
    )

  def describe(self) -> str:
    """What a user wants to know, in one line."""
    across = len(self.devices) > len(self.local_devices)
    known = jax.device_count() if across else jax.local_device_count()
    text = 'tasks shared out over' if self.axis_name else 'seeds spread over'
    text += f' {len(self.devices)} of {known} devices'
    if jax.process_count() > 1 and not across:
      text += f' in each of {jax.process_count()} processes'
    return text

  def compile(
    self,
    fn: Callable,
    seed_axes: tuple[int | None, ...],
    donate: tuple[int, ...] = (),
  ) -> Callable:
    """Compiles `fn` of one seed for all seeds of this process.

    Seeds never talk to each other. Where devices share the tasks, `fn` runs
    under `axis_name` on each of them and must return the same on all.

    Args:
      fn: pure function of pytrees without a seed axis, positional arguments.
      seed_axes: per argument 0 (leaves [S, ...], S of this process) or None
        (shared by all seeds).
      donate: positions of arguments whose memory may be reused.

    Returns:
      Function of leaves [S, ...] that returns leaves [S, ...]; no leaf has a
      device axis.
    """
    batched = jax.vmap(fn, in_axes=seed_axes, axis_name=SEEDS)
    if self.axis_name is not None:
      compiled = self._over_tasks(batched, seed_axes, donate)
    elif len(self.devices) > 1:
      compiled = self._over_seeds(batched, seed_axes, donate)
    else:
      compiled = jax.jit(batched, donate_argnums=donate)
    return lambda *args: compiled(
      *[self.place(arg, axis) for arg, axis in zip(args, seed_axes)]
    )

  def place(self, tree: Any, seed_axis: int | None) -> Any:
    """Puts an argument of compiled functions where they want it.

    They do it themselves, in every call; place once what many calls share.

    Args:
      tree: arrays.
      seed_axis: 0 (leaves [S, ...]) or None (shared by all seeds).
    """
    return jax.device_put(tree, self._sharding(seed_axis))

  def _sharding(self, seed_axis: int | None) -> jax.sharding.Sharding:
    local = self.local_devices
    if len(local) == 1 and self.axis_name is None:
      return SingleDeviceSharding(local[0])
    spread = seed_axis is not None and self.axis_name is None
    return NamedSharding(
      Mesh(np.array(local), (_LOCAL_AXIS,)),
      PartitionSpec(_LOCAL_AXIS) if spread else PartitionSpec(),
    )

  def _over_tasks(self, batched, seed_axes, donate):
    """Every argument and result is replicated and has no device axis: in jax
    >= 0.10 a pmap with axes None takes and returns plain arrays."""
    # pmap wants an argument with a device axis.
    mapped = jax.pmap(
      lambda device, *args: batched(*args),
      axis_name=TASK_AXIS,
      in_axes=(0,) + (None,) * len(seed_axes),
      out_axes=None,
      devices=self.devices,
      donate_argnums=tuple(i + 1 for i in donate),
    )
    numbers = np.arange(len(self.local_devices))
    return lambda *args: mapped(numbers, *args)

  def _over_seeds(self, batched, seed_axes, donate):
    """Each device takes an equal share of the seeds.

    On a CPU with several forced host devices this is what keeps every core
    busy: small matrix products do not use a second one.
    """
    mapped = jax.pmap(batched, in_axes=seed_axes, devices=self.devices)
    number = len(self.seeds)
    shape = (len(self.devices), number // len(self.devices))

    def split(x):
      return x.reshape(shape + x.shape[1:])

    def merge(x):
      return x.reshape((number,) + x.shape[2:])

    def call(*args):
      return jax.tree.map(
        merge,
        mapped(
          *[
            arg if axis is None else jax.tree.map(split, arg)
            for arg, axis in zip(args, seed_axes)
          ]
        ),
      )

    # Leaves stay spread over the devices between calls, and splitting them is
    # compiled with the rest: outside of jit it would copy the replay each
    # time.
    return jax.jit(
      call,
      in_shardings=[self._sharding(axis) for axis in seed_axes],
      out_shardings=self._sharding(0),
      donate_argnums=donate,
    )

  # Between processes.

  def all_seeds(self, tree: Any) -> Any:
    """Leaves [S, ...] of this process's seeds -> numpy, of all seeds."""
    if not self.split:
      return jax.device_get(tree)
    return jax.tree.map(processes.concatenate, jax.device_get(tree))

  def to_global(self, x: Array) -> Array:
    """One array of all processes, from this process's part of it.

    What has no axis is the same everywhere, all else has the seeds in front.
    Every process keeps its part where it is, on devices of any platform.
    """
    if jax.process_count() == 1:
      return x
    place = self._everywhere(x)
    return multihost_utils.host_local_array_to_global_array(
      x, place.mesh, place.spec
    )

  def to_local(self, x: Array) -> Array:
    """The inverse of `to_global`."""
    if jax.process_count() == 1:
      return x
    return multihost_utils.global_array_to_host_local_array(
      x, x.sharding.mesh, x.sharding.spec
    )

  def global_struct(self, x: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and sharding of `to_global(x)`, from those of x.

    Without a sharding it is for the first device of each process.
    """
    shape = tuple(x.shape)
    if self.split and shape:
      shape = (shape[0] * jax.process_count(),) + shape[1:]
    return jax.ShapeDtypeStruct(shape, x.dtype, sharding=self._everywhere(x))

  def _everywhere(self, x: Any) -> NamedSharding:
    """The sharding of x here, and the same in all other processes."""
    here = getattr(x, 'sharding', None)
    if not isinstance(here, NamedSharding):
      device = (
        min(here.device_set, key=lambda d: d.id)
        if here
        else (jax.local_devices()[0])
      )
      here = NamedSharding(
        Mesh(np.array([device]), (_LOCAL_AXIS,)), PartitionSpec()
      )
    devices, spec = here.mesh.devices, tuple(here.spec)
    platform = devices.flat[0].platform
    local = jax.local_devices(backend=platform)
    positions = [local.index(device) for device in devices.flat]
    grid = []
    for process in range(jax.process_count()):
      known = jax.local_devices(process, platform)
      grid.append([known[i] for i in positions])
    if self.split and x.shape:
      first = spec[0] if spec and spec[0] is not None else ()
      first = first if isinstance(first, tuple) else (first,)
      spec = ((_PROCESS_AXIS,) + first,) + spec[1:]
    mesh = Mesh(
      np.array(grid).reshape((-1,) + devices.shape),
      (_PROCESS_AXIS,) + here.mesh.axis_names,
    )
    return NamedSharding(mesh, PartitionSpec(*spec))


def make_layout(
  num_seeds: int,
  num_tasks: int = 1,
  max_devices: int | None = None,
  share: str = 'seeds',
) -> Layout:
  """Spreads seeds, or shares out tasks, over devices and processes.

  Seeds: processes take equal parts of them where that comes out even (else
  all do the same), and so do the devices of a process.

  Args:
    num_seeds: S.
    num_tasks: M, what every meta-batch is a multiple of.
    max_devices: per process; None for all.
    share: 'seeds', or 'tasks' for meta-batches that are worth an exchange
      of gradients in every update (small ones are slower so).

  Raises:
    ValueError: unknown `share`, or nothing to share.
  """
  if share not in ('seeds', 'tasks'):
    raise ValueError(f'share={share!r}; choose "seeds" or "tasks"')
  local = jax.local_devices()[:max_devices]
  number, seeds = jax.process_count(), range(num_seeds)
  if share == 'tasks' and num_tasks % number == 0:
    each = largest_divisor(num_tasks // number, len(local))
    devices = tuple(
      d
      for p in range(number)
      for d in jax.local_devices(process_index=p)[:each]
    )
    return Layout(
      num_seeds, seeds, devices, TASK_AXIS if len(devices) > 1 else None
    )
  if num_seeds % number == 0:
    each = num_seeds // number
    first = jax.process_index() * each
    seeds = range(first, first + each)
  if share == 'tasks':
    devices = local[: largest_divisor(num_tasks, len(local))]
    return Layout(
      num_seeds, seeds, tuple(devices), TASK_AXIS if len(devices) > 1 else None
    )
  devices = local[: largest_divisor(len(seeds), len(local))]
  return Layout(num_seeds, seeds, tuple(devices))
