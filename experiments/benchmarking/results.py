"""Files of results: new, read again, and compared."""

from collections.abc import Iterator, Mapping, Sequence
import pathlib
from typing import Any

from experiments.benchmarking import (
  BenchmarkError,
  environments,
  machine as machines,
)
from experiments.benchmarking.report import table
from offmeta import disk

Result = dict[str, Any]

_UPDATE = ('algorithm', 'stage', 'variant', 'profile', 'matmul_precision')
# Tables to compare: the columns that name a row, and the figure.
_FIGURES = {
  'updates': ((*_UPDATE, 'seeds'), 'updates_per_s'),
  'scaling': ((*_UPDATE, 'kind', 'devices'), 'updates_per_s'),
  'growth': ((*_UPDATE, 'factor', 'value'), 'ms_per_update'),
  'startup': (('profile', 'cache'), 'first_update_s'),
  'env_steps': (('family', 'backend', 'num_envs'), 'steps_per_s'),
}
_TABLES = tuple(dict.fromkeys((*_FIGURES, *environments.TABLES)))


def new_result() -> Result:
  """Nothing measured so far, on this machine."""
  return {
    'machine': machines.machine(),
    'versions': machines.versions(),
    'ceiling_gflops': None,
    'ceiling': {},
    **{name: [] for name in _TABLES},
  }


def read_result(path: pathlib.Path, flag: str) -> Result:
  """A result that was written before; starts no device.

  Args:
    path: of the file.
    flag: which names it, for messages.

  Raises:
    BenchmarkError: no such file, damaged, or something else.
  """
  try:
    result = disk.read_json(path)
  except OSError as error:
    raise BenchmarkError(f'--{flag}: {path}: {error.strerror}') from error
  except ValueError as error:
    raise BenchmarkError(
      f'--{flag}: {path}: damaged or no JSON: {error}'
    ) from error
  what = _fault(result)
  if what:
    raise BenchmarkError(
      f'--{flag}: {path}: not a result of this command ({what})'
    )
  return {'ceiling_gflops': None, **result}


def _fault(result: Any) -> str:
  """What is wrong with a result, '' if nothing; adds what older ones lack."""
  if not isinstance(result, dict):
    return f'a {type(result).__name__}'
  for name in ('machine', 'versions', 'ceiling'):
    if not isinstance(result.get(name), dict):
      return f'no {name!r}'
  if result.get('ceiling_gflops') is not None and not (
    isinstance(result['ceiling'].get('gflops'), dict)
  ):
    return "no 'gflops' in 'ceiling'"
  for name in _TABLES:
    rows = result.setdefault(name, [])
    if not (isinstance(rows, list) and all(isinstance(r, dict) for r in rows)):
      return f'{name!r} is no list of rows'
  for name, (columns, figure) in _FIGURES.items():
    for row in result[name]:
      if 'matmul_precision' in columns:
        row.setdefault('matmul_precision', 'float32')
      for column in (*columns, figure):
        if column not in row:
          return f'no {column!r} in a row of {name!r}'
      if not isinstance(row[figure], (int, float)):
        return f'{figure!r} of {name!r} is no number'
  return ''


def resume_result(path: pathlib.Path) -> Result:
  """An earlier result to go on with; a new one if there is no file.

  Raises:
    BenchmarkError: not a result, or of another machine or other versions.
  """
  new = new_result()
  if not path.is_file():
    return new
  old = read_result(path, 'resume')
  different = differences(old, new)
  if different:
    raise BenchmarkError(
      f'--resume: {path} was measured with another'
      f' {", ".join(different)}; give another --out'
    )
  return old


def differences(old: Result, new: Result) -> dict[str, tuple[Any, Any]]:
  """What differs in machine and versions: name -> (old, new)."""
  return {
    f'{part}.{name}': (old[part].get(name), new[part].get(name))
    for part in ('machine', 'versions')
    for name in {**old[part], **new[part]}
    if name != 'load_average' and old[part].get(name) != new[part].get(name)
  }


# Comparison.


def _figures(result: Result) -> Iterator[tuple[tuple, float]]:
  """(name of the figure, value) of every row that is to be compared."""
  if result['ceiling_gflops']:
    precision = result['ceiling'].get('matmul_precision', 'default')
    # The default of older files, which are of CPUs.
    label = 'float32' if precision == 'default' else precision
    yield ('ceiling', label, 'gflops'), result['ceiling_gflops']
  for name, (columns, figure) in _FIGURES.items():
    for row in result[name]:
      label = ' '.join(
        f'{column}={row[column]}'
        if isinstance(row[column], int)
        else row[column]
        for column in columns
      )
      yield (name, label, figure), row[figure]


def compare(old: Result, new: Result) -> list[dict[str, Any]]:
  """One row per figure that both results have."""
  before = dict(_figures(old))
  return [
    {
      'table': name[0],
      'row': name[1],
      'figure': name[2],
      'old': before[name],
      'new': value,
      'ratio': value / before[name] if before[name] else None,
    }
    for name, value in _figures(new)
    if name in before
  ]


def print_comparison(old: Result, new: Result, name: str):
  """Old and new side by side, with warnings.

  Args:
    old: of the file that is compared with.
    new: measured now, or of another file.
    name: of the old one.
  """
  print(
    f'\nCompared with {name} (ratio: new / old; above 1 is faster for'
    ' rates, slower for ms and s)'
  )
  different = differences(old, new)
  for what, (was, value) in different.items():
    print(f'warning: {what} differs: {was} -> {value}')
  rows: Sequence[Mapping[str, Any]] = compare(old, new)
  if rows:
    print(table(rows, tuple(rows[0])))
  rest = len(dict(_figures(old)).keys() ^ dict(_figures(new)).keys())
  print(f'{len(rows)} figures in both, {rest} in only one of the two')
