"""What the command prints."""

from collections.abc import Mapping, Sequence
import sys
from typing import Any

# Lists of rows in the result: title and columns.
_TABLES = {
  'updates': (
    'Updates (rates of all seeds together; synthetic data)',
    (
      'algorithm',
      'stage',
      'variant',
      'seeds',
      'updates_per_s',
      'gflop_per_update',
      'gflops',
      'fraction_of_ceiling',
      'compile_s',
    ),
  ),
  'overhead': (
    'Overhead of a call (all seeds together; from two lengths of call)',
    (
      'algorithm',
      'stage',
      'variant',
      'seeds',
      'updates_per_call',
      'us_per_update',
      'updates_per_short_call',
      'us_per_update_in_short_calls',
      'overhead_us_per_call',
    ),
  ),
  'scaling': (
    'Scaling over devices (seeds: 8 seeds spread over them; tasks: one'
    ' seed, its 16 tasks spread)',
    (
      'algorithm',
      'stage',
      'matmul_precision',
      'kind',
      'devices',
      'updates_per_s',
      'speed_up',
      'compile_s',
    ),
  ),
  'growth': (
    'Growth of the time per update (of all seeds together, on one device)',
    (
      'algorithm',
      'stage',
      'matmul_precision',
      'factor',
      'value',
      'ms_per_update',
      'gflop',
      'gflops',
      'fraction_of_ceiling',
    ),
  ),
  'startup': (
    'Start-up (seconds since the process was started; cache of compiled'
    ' programs)',
    (
      'profile',
      'cache',
      'imported_s',
      'initialised_s',
      'first_update_s',
      'programs_from_cache',
    ),
  ),
  'env_steps': (
    'Environment steps (random policy, resets included)',
    (
      'family',
      'backend',
      'num_envs',
      'steps_per_s',
      'timed_steps',
      'reset_cost_in_steps',
      'compile_s',
      'traces',
    ),
  ),
  'env_stability': (
    'Stability (random policy, full episodes)',
    (
      'family',
      'backend',
      'num_envs',
      'terminated',
      'median_steps_to_termination',
      'diverged',
      'non_finite',
      'max_qd',
    ),
  ),
  'env_agreement': (
    'Agreement with C MuJoCo (largest difference per episode; c_: of C'
    ' MuJoCo with itself, start moved by 1e-6)',
    (
      'family',
      'backend',
      'num_envs',
      'control_steps',
      'dq_median',
      'dq_p95',
      'dq_max',
      'c_dq_median',
      'c_dq_p95',
      'c_dq_max',
      'dqd_median',
      'dqd_p95',
      'dqd_max',
    ),
  ),
  'env_refused': ('Refused', ('family', 'backend', 'reason')),
}


def say(text: str):
  """Progress, on stderr."""
  print(text, file=sys.stderr, flush=True)


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
  """Aligned text; numbers to the right."""
  cells = [list(columns)] + [
    [_cell(row.get(c)) for c in columns] for row in rows
  ]
  widths = [max(map(len, column)) for column in zip(*cells)]
  number = [rows and not isinstance(rows[0].get(c), str) for c in columns]
  return '\n'.join(
    '  '.join(
      text.rjust(width) if right else text.ljust(width)
      for text, width, right in zip(line, widths, number)
    ).rstrip()
    for line in cells
  )


def _cell(value: Any) -> str:
  if value is None:
    return '-'
  if not isinstance(value, float):
    return str(value)
  return f'{value:,.0f}' if abs(value) >= 1000 else f'{value:.4g}'


def shared_cores(result: Mapping[str, Any]) -> str:
  """What to know about devices that a CPU was made of."""
  most = max(row['devices'] for row in result['scaling'])
  cores = result['machine']['cores']
  return (
    f'Forced devices of one CPU: up to {most} share {cores} cores, so'
    f' expect no speed-up beyond {cores}, and less where one device'
    ' alone uses several cores.'
  )


def print_result(result: Mapping[str, Any]):
  """Everything that was measured, as tables on stdout."""
  ceiling = result['ceiling']
  if result['ceiling_gflops'] is not None:
    print(
      f'\nMatrix-product ceiling: {result["ceiling_gflops"]:.4g} GFLOP/s'
      f' (matmul_precision {ceiling["matmul_precision"]}; best of '
      + ', '.join(f'{k} {v:.4g}' for k, v in ceiling['gflops'].items())
      + ')'
    )
  for name, (title, columns) in _TABLES.items():
    rows = result.get(name, [])
    if name == 'overhead':  # columns of updates, where they were asked for
      rows = [r for r in result['updates'] if 'overhead_us_per_call' in r]
    if rows:
      print(f'\n{title}\n{table(rows, columns)}')
    if any(row.get('forced_devices') for row in rows):
      print(shared_cores(result))
  if 'workdir' in result:
    print(f'\nWall time of the run: {result["workdir"]["total_s"]:.4g} s')
    print(table(result['workdir']['stages'], ('stage', 'seconds', 'share')))
