"""How much memory each phase of a run will keep, before it starts.

Capacities are a function of the configuration (`training/schedule.py`), so this
is known to the byte; nothing is allocated here.
"""

from collections.abc import Iterator

import jax

from offmeta import processes
from offmeta.training import collect as collecting
from offmeta.training import config as configs
from offmeta.training import gather as gathering
from offmeta.training import memory, schedule, streaming
from offmeta.training.config import ConfigError
from offmeta.training.setup import Setup
from offmeta.types import LearnerState, Transition

_ADVICE = (
    'Keep the replay in the host\'s memory with --replay=host, run fewer'
    ' --seeds at a time (--config.first_seed continues), or shorten the phase'
    ' (iterations, gather.*_steps); devices that share tasks hold a copy each.')

# Name, learners, what stays in memory.
_Phase = tuple[str, schedule.Seeds, list[memory.Demand]]


def _example(setup: Setup, extras: bool) -> Transition:
  example = jax.eval_shape(
      lambda: gathering.example_transition(setup.family, setup.train_tasks))
  return example if extras else example._replace(extras={})


def _replay(
    setup: Setup, example: Transition, sizes: schedule.Sizes, num_seeds: int,
    one_buffer: bool, table: int,
) -> list[memory.Demand]:
  """Both buffers, or the one that serves both roles."""
  parts = [('replay', sizes.rl)]
  if not one_buffer:
    parts.append(('replay for contexts', sizes.encoder))
  return [
      memory.replay_demand(
          example, setup.config.family.num_train, capacity, num_seeds, what,
          table)
      for what, capacity in parts]


def _dataset(setup: Setup, rl: int, encoder: int) -> memory.Demand:
  """The offline data; every device has a copy."""
  layout = setup.seeds.layout
  places = len(layout.local_devices)
  if setup.runtime.replay == 'host' or layout.axis_name:
    places = 1  # all that devices share tasks of is multiplied later
  return memory.replay_demand(
      _example(setup, False), setup.config.family.num_train, rl + encoder,
      places, 'dataset', unit='place')


def _learners(algorithm, num_seeds: int) -> memory.Demand:
  state: LearnerState = jax.eval_shape(algorithm.init, jax.random.key(0))
  size = memory.nbytes(state)
  return memory.Demand(
      'learners', num_seeds * size, f'{memory.times(num_seeds, "seed")} x {size:,} B')


def _phases(setup: Setup, phases: tuple[str, ...]) -> Iterator[_Phase]:
  """Phases still to run."""
  config = setup.config
  if ('collect' in phases and not setup.is_done('collect')
      and collecting.trains_behaviour(config.collect)):
    seeds = collecting.behaviour_seeds(setup)
    sizes = collecting.behaviour_sizes(setup, seeds)
    behaviour = setup.algorithm('pearl', config.collect.behaviour)
    yield 'collect', seeds, [
        *_replay(setup, _example(setup, True), sizes, 1, False, 0),
        _learners(behaviour, 1)]
  if not {'offline', 'online'} & set(phases):
    return
  start = collecting.dataset_sizes(setup)
  dataset = _dataset(setup, *start)
  num_seeds = len(setup.seeds.layout.seeds)
  if 'offline' in phases and not setup.is_done('offline'):
    yield 'offline', setup.seeds, [
        dataset, _learners(setup.algorithm('smac', config.smac), num_seeds)]
  if 'online' in phases:
    for name in config.online.variants:
      if setup.is_done(f'online/{name}'):
        continue
      changed = configs.variant(config, name)
      sizes = schedule.online_sizes(
          setup.family.spec, changed, setup.seeds, *start)
      yield f'online/{name}', setup.seeds, [
          *_replay(setup, _example(setup, False), sizes, num_seeds,
                   changed.online.share_encoder_buffer, sizes.sequences),
          dataset,
          _learners(setup.algorithm('smac', changed.smac), num_seeds)]


def check(setup: Setup, phases: tuple[str, ...]) -> list[str]:
  """What the phases still to run will keep in memory, for people.

  Returns:
    One line per phase, and one with what is available.

  Raises:
    ConfigError: one would not fit; names the sizes and what to change.
    ProcessError: it would not fit in another process.
  """
  planned = list(_phases(setup, phases))  # asks the main process
  return processes.in_all(lambda: _fitting(setup, planned))


def _fitting(setup: Setup, planned: list[_Phase]) -> list[str]:
  """`check`, for the memory of this process."""
  on_host = setup.runtime.replay == 'host'
  lines, available = [], None
  for name, seeds, demands in planned:
    devices = seeds.layout.local_devices
    if on_host:
      devices = [streaming.host()]
    elif seeds.layout.axis_name:  # every device has all of it
      demands = [
          demand._replace(nbytes=demand.nbytes * len(devices))
          for demand in demands]
    available = memory.available_bytes(devices)
    try:
      memory.check(demands, available, _ADVICE)
    except memory.MemoryBudgetError as error:
      raise ConfigError(f'phase {name}: {error}') from error
    total = memory.readable(sum(demand.nbytes for demand in demands))
    lines.append(f'memory, {name}: {total} ({demands[0].detail})')
  if available is not None:
    place = 'in the host' if on_host else 'on the devices in use'
    lines.append(f'memory available {place}: {memory.readable(available)}')
  return lines
