"""The same update on several devices.

A CPU is made of as many devices as wanted, in one process per number; they
are all kept, and timed in turn. Of GPUs and TPUs the first ones are used.
"""

import contextlib
import dataclasses
import os
import re
import statistics
from typing import Any

import jax

from experiments.benchmarking import cases, processes, updates
from experiments.benchmarking.options import SHARED_SEEDS, Options
from experiments.benchmarking.report import say
from experiments.benchmarking.timing import rounded
from offmeta import parallel

_NUM_TASKS = 16  # meta-batch of PEARL's own paper
_FORCE = '--xla_force_host_platform_device_count'


class Side:
  """Every case on the first so many devices of this process.

  Attributes:
    rows: records without rates.
  """

  def __init__(self, devices: int, options: Options):
    self._runs, self.rows = [], []
    for case in cases.first_cases(options.profile, options.algorithms):
      self._add('seeds', case, SHARED_SEEDS, devices, options)
      if case.algorithm != 'sac':  # it has one task
        self._add(
          'tasks', case.resized(num_tasks=_NUM_TASKS), 1, devices, options
        )

  def _add(self, kind, case, seeds, devices, options):
    layout = parallel.make_layout(
      seeds, case.get_stage().batch.num_tasks, devices, share=kind
    )
    self._runs.append(updates.prepare(case, layout, options))
    self.rows.append(
      {
        'kind': kind,
        **updates.describe(self._runs[-1]),
        'forced_devices': jax.default_backend() == 'cpu',
      }
    )

  def measure(self) -> list[float]:
    """One more timing of each row, updates per second of all seeds."""
    for run in self._runs:
      run.timed.measure()
    return [run.timed.rates[-1] for run in self._runs]


class _Forced:
  """A `Side` in a process that makes so many devices of the CPU."""

  def __init__(self, worker: processes.Worker):
    self.rows = worker.receive()
    self.measure = worker.ask


def _force(devices: int) -> dict[str, str]:
  others = re.sub(rf'{_FORCE}=\S*', '', os.environ.get('XLA_FLAGS', ''))
  return {
    'XLA_FLAGS': f'{others} {_FORCE}={devices}'.strip(),
    'JAX_PLATFORMS': 'cpu',
    # A cached program would pass for a fast compilation.
    'JAX_ENABLE_COMPILATION_CACHE': 'false',
  }


def measure_scaling(options: Options) -> list[dict[str, Any]]:
  """One record per algorithm, kind and number of devices.

  Kind 'seeds': 8 seeds spread over the devices, which exchange nothing.
  Kind 'tasks': one seed whose meta-batch of 16 tasks they share; not for
  single-task SAC.
  """
  forced = jax.default_backend() == 'cpu'
  counts = sorted({1, *options.devices})
  if not forced:
    counts = [n for n in counts if n <= jax.local_device_count()]
  with contextlib.ExitStack() as stack:
    sides = []
    for devices in counts:
      say(f'compiling for {devices} device(s)')
      if not forced:
        sides.append(Side(devices, options))
      else:
        sides.append(
          _Forced(
            stack.enter_context(
              processes.Worker(
                __name__,
                _force(devices),
                devices=devices,
                options=dataclasses.asdict(options),
              )
            )
          )
        )
    rates = [[[] for _ in side.rows] for side in sides]
    for i in range(options.repeats):
      say(f'timing devices, round {i + 1} of {options.repeats}')
      for side, lists in zip(sides, rates):
        for values, rate in zip(lists, side.measure()):
          values.append(rate)
  rows = [
    {
      **row,
      'updates_per_s': rounded(statistics.median(values)),
      'updates_per_s_spread': [rounded(min(values)), rounded(max(values))],
      'speed_up': rounded(statistics.median(values) / statistics.median(first)),
    }
    for side, lists in zip(sides, rates)
    for row, values, first in zip(side.rows, lists, rates[0])
  ]
  return sorted(rows, key=lambda row: (row['kind'], row['algorithm']))


def _main():
  given = processes.argument()
  side = Side(given['devices'], processes.options_from(given['options']))
  processes.reply(side.rows)
  while processes.asked():
    processes.reply(side.measure())


if __name__ == '__main__':
  _main()
