"""How the time of an update grows with its sizes."""

from typing import Any

from experiments.benchmarking import cases, ceiling as ceilings, updates
from experiments.benchmarking.cases import Case
from experiments.benchmarking.options import Options
from experiments.benchmarking.report import say
from experiments.benchmarking.timing import rounded
from offmeta import parallel

Point = tuple[tuple[str, int], ...]  # (factor, value) of every factor

_VALUES = {
  'num_tasks': (1, 2, 4, 8, 16, 32),
  'query_size': (32, 64, 128, 256, 512, 1024),
  'seeds': (1, 2, 4, 8, 16),
}
_SMOKE_VALUES = {'num_tasks': (4,), 'query_size': (64,), 'seeds': (2,)}


def points(case: Case, profile: str) -> list[tuple[str, int, Point]]:
  """(factor, its value, sizes): one factor at a time, the others as they are.

  The case's own sizes are among the values of each factor.
  """
  batch = case.get_stage().batch
  base = {
    'num_tasks': batch.num_tasks,
    'query_size': batch.query.size,
    'seeds': 1,
  }
  if case.algorithm == 'sac':
    del base['num_tasks']  # always one
  values = _SMOKE_VALUES if profile == 'smoke' else _VALUES
  return [
    (factor, value, tuple({**base, factor: value}.items()))
    for factor in base
    for value in sorted({*values[factor], base[factor]})
  ]


def measure_growth(options: Options) -> list[dict[str, Any]]:
  """One record per algorithm, factor and value; seeds are on one device."""
  wanted, runs = [], {}
  for case in cases.first_cases(options.profile, options.algorithms):
    for factor, value, point in points(case, options.profile):
      wanted.append((factor, value, (case.algorithm, point)))
      if wanted[-1][-1] in runs:
        continue
      sizes = dict(point)
      say(
        f'compiling {case.algorithm} {case.stage} '
        + ' '.join(f'{name}={size}' for name, size in point)
      )
      layout = parallel.make_layout(sizes.pop('seeds'), max_devices=1)
      runs[wanted[-1][-1]] = updates.prepare(
        case.resized(**sizes), layout, options
      )
  ways = ceilings.make_ceiling(options)
  _, rows = updates.time_runs(list(runs.values()), ways, options, len(runs))
  rows = dict(zip(runs, rows))
  return [
    {
      'factor': factor,
      'value': value,
      'gflop': rounded(rows[key]['gflop_per_update'] * rows[key]['seeds']),
      'ms_per_update': rows[key]['ms_per_update_of_all_seeds'],
      **rows[key],
    }
    for factor, value, key in wanted
  ]
