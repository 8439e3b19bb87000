"""What a run will keep in memory, and whether it fits: asked before it starts.

Sizes are in bytes; kB, MB and GB are powers of 1000.
"""

from collections.abc import Iterator, Sequence
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax

from offmeta.data import buffer as buffers
from offmeta.types import Transition

# Share of what is available that a plan must leave: the demands are the arrays
# that stay, while activations, copies and the gaps of an allocator come and go.
MARGIN = 0.1


class MemoryBudgetError(ValueError):
  """A run would not fit; the message says what takes how much."""


class Demand(NamedTuple):
  """One thing that stays in memory.

  Attributes:
    what: its name, for people.
    nbytes: its size, all seeds together.
    detail: how the size comes about.
  """

  what: str
  nbytes: int
  detail: str


def nbytes(tree: Any) -> int:
  """Size of all leaves: arrays, ShapeDtypeStructs, typed PRNG keys."""
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def times(number: int, unit: str) -> str:
  """'1 seed', '2 seeds'."""
  return f'{number:,} {unit}' + ('s' if number != 1 else '')


def replay_demand(
  example: Transition,
  num_tasks: int,
  capacity: int,
  num_seeds: int,
  what: str,
  max_sequences: int = 0,
  unit: str = 'seed',
) -> Demand:
  """What `num_seeds` buffers will take; makes none.

  Args:
    example: one transition, leaves [...] (arrays or ShapeDtypeStructs).
    num_tasks, capacity, max_sequences: as for `buffers.empty`.
    num_seeds: S.
    what: name of the demand.
    unit: what there are `num_seeds` of.
  """
  replay = jax.eval_shape(
    lambda x: buffers.empty(x, num_tasks, capacity, max_sequences), example
  )
  return Demand(
    what,
    num_seeds * nbytes(replay),
    f'{times(num_seeds, unit)} x {num_tasks:,} tasks'
    f' x {capacity:,} transitions'
    f' x {nbytes(example):,} B',
  )


def available_bytes(
  devices: Sequence[jax.Device], root: Path = Path('/')
) -> int | None:
  """What these devices can still take together; None where nobody knows.

  Accelerators are asked how much of their limit is free. Seeds are spread
  evenly over them, so the fullest one tells for all. All CPU devices of a
  process share the machine's memory, which counts once.

  Args:
    devices: those of this process that the run will use.
    root: where the files of the operating system are.
  """
  accelerators = [d for d in devices if d.platform != 'cpu']
  free = [_device_bytes(device) for device in accelerators]
  host = [_host_bytes(root)] if len(accelerators) < len(devices) else []
  if None in free + host:
    return None
  return len(free) * min(free, default=0) + sum(host)


def _device_bytes(device: jax.Device) -> int | None:
  """Free part of an accelerator's limit."""
  try:
    stats = device.memory_stats() or {}
  except jax.errors.JaxRuntimeError:  # a backend without this call
    return None
  if not {'bytes_limit', 'bytes_in_use'} <= stats.keys():
    return None
  return stats['bytes_limit'] - stats['bytes_in_use']


def _host_bytes(root: Path) -> int | None:
  """RAM that this process can still get, within the limits of its group."""
  machine = _fields(root / 'proc/meminfo').get('MemAvailable:')
  if machine is not None:
    machine *= 1024
  else:
    # Not Linux: all RAM, of which some is in use. Better than no check.
    try:
      machine = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    except (AttributeError, ValueError, OSError):
      return None
  return max(0, min([machine, *_group_bytes(root)]))


def _fields(path: Path) -> dict[str, int]:
  """{first word: second word} of the lines of a file; {} without the file."""
  try:
    lines = [line.split() for line in path.read_text().splitlines()]
  except OSError:
    return {}
  return {
    words[0]: int(words[1])
    for words in lines
    if len(words) > 1 and words[1].isdigit()
  }


def _number(path: Path) -> int | None:
  """The number that a file holds; None without one ('max': no limit)."""
  try:
    text = path.read_text().strip()
  except OSError:
    return None
  return int(text) if text.isdigit() else None


def _group_bytes(root: Path) -> Iterator[int]:
  """What the control groups of this process (containers, Slurm) leave it.

  A limit holds for a group and all below it, so every group on the way up
  counts. Cached files are in a group's usage but make way.
  """
  try:
    lines = (root / 'proc/self/cgroup').read_text().splitlines()
  except OSError:
    return
  for line in lines:
    _, controllers, group = line.split(':', 2)
    if not controllers:  # version 2
      mount = root / 'sys/fs/cgroup'
      names = 'memory.max', 'memory.current', 'inactive_file'
    elif 'memory' in controllers.split(','):
      mount = root / 'sys/fs/cgroup/memory'
      names = (
        'memory.limit_in_bytes',
        'memory.usage_in_bytes',
        'total_inactive_file',
      )
    else:
      continue
    lowest = mount / group.strip('/')
    # Inside a container the path may be the host's; then the mount itself is
    # the group, and the folders between them are not there.
    for folder in (lowest, *lowest.parents):
      limit = _number(folder / names[0])
      if limit is not None:
        used = _number(folder / names[1]) or 0
        cached = _fields(folder / 'memory.stat').get(names[2], 0)
        yield limit - used + cached
      if folder == mount:
        break


def readable(size: int) -> str:
  """Three digits and a unit: 1234567 -> '1.23 MB'."""
  if size < 1000:
    return f'{size} B'
  value, units = size / 1000, ['kB', 'MB', 'GB', 'TB']
  while value >= 999.5 and len(units) > 1:
    value, units = value / 1000, units[1:]
  digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
  return f'{value:.{digits}f} {units[0]}'


def report(demands: Sequence[Demand], available: int | None) -> list[str]:
  """One line per demand, then the sum and what is available."""
  total = sum(demand.nbytes for demand in demands)
  free = 'unknown' if available is None else readable(available)
  rows = [(readable(d.nbytes), d.what, d.detail) for d in demands]
  rows += [(readable(total), 'in all', ''), (free, 'available', '')]
  size_width, what_width = (
    max(len(row[column]) for row in rows) for column in (0, 1)
  )
  return [
    f'{size:>{size_width}}  {what:{what_width}}  {detail}'.rstrip()
    for size, what, detail in rows
  ]


def check(
  demands: Sequence[Demand], available: int | None, advice: str
) -> None:
  """Refuses a run that leaves less than `MARGIN` of the memory.

  Args:
    demands: all that stays in memory.
    available: from `available_bytes`; None checks nothing.
    advice: what to change, one sentence.

  Raises:
    MemoryBudgetError: names every size, the sum, what is available, and the
      advice.
  """
  total = sum(demand.nbytes for demand in demands)
  if available is None or total <= (1 - MARGIN) * available:
    return
  raise MemoryBudgetError(
    '\n'.join(
      [
        f'this run would keep {readable(total)} in memory, and of the'
        f' {readable(available)} available {MARGIN:.0%} must stay free for what'
        ' comes and goes:',
        *(f'  {line}' for line in report(demands, available)),
        advice,
      ]
    )
  )
