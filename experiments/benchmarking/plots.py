"""Pictures of scaling and growth."""

from collections.abc import Mapping, Sequence
import pathlib
import textwrap
from typing import Any

from experiments.benchmarking import BenchmarkError, report

Rows = Sequence[Mapping[str, Any]]

# Okabe and Ito's colours and two more; an algorithm has the same mark in all
# panels.
MARKS = {
  'smac': ('#0072b2', 'o'),
  'pearl': ('#d55e00', 's'),
  'sac': ('#009e73', '^'),
  'macaw': ('#cc79a7', 'D'),
  'borel': ('#e69f00', 'v'),
  'focal': ('#56b4e9', '<'),
  'csro': ('#000000', '>'),
  'unicorn': ('#b8a800', 'P'),
  'meta_bc': ('#7f4f24', 'X'),
  'multitask': ('#5b3a98', 'p'),
}
_STYLE = {
  'font.size': 12,
  'axes.titlesize': 13,
  'axes.titlelocation': 'left',
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.grid': True,
  'axes.axisbelow': True,
  'axes.edgecolor': '#777777',
  'grid.color': '#e3e3e3',
  'legend.frameon': False,
  'lines.linewidth': 2.0,
  'lines.markersize': 6.5,
}
_KINDS = {
  'seeds': '8 seeds over devices',
  'tasks': 'One seed, its 16 tasks over devices',
}
_FACTORS = {
  'num_tasks': 'tasks in the meta-batch',
  'query_size': 'transitions per task',
  'seeds': 'seeds side by side',
}
_IDEAL = {'color': '#777777', 'linestyle': '--', 'linewidth': 1.5}


def save(result: Mapping[str, Any], path: pathlib.Path):
  """Draws scaling and growth of a result, one panel per kind and factor.

  Raises:
    BenchmarkError: it has neither, or the file cannot be written.
  """
  parts = [
    (draw, select)
    for draw, table, column, names in (
      (_draw_scaling, 'scaling', 'kind', _KINDS),
      (_draw_growth, 'growth', 'factor', _FACTORS),
    )
    if (
      select := {
        name: rows
        for name in names
        if (rows := [r for r in result[table] if r[column] == name])
      }
    )
  ]
  if not parts:
    raise BenchmarkError('--plot: the result has neither scaling nor growth')
  # Without pyplot: no display and no global state.
  import matplotlib  # pylint: disable=g-import-not-at-top
  from matplotlib.backends import backend_agg
  from matplotlib.figure import Figure

  with matplotlib.rc_context(_STYLE):
    figure = Figure(
      (4.7 * max(len(panels) for _, panels in parts), 5.0 * len(parts)),
      layout='constrained',
    )
    backend_agg.FigureCanvasAgg(figure)
    figures = figure.subfigures(len(parts), 1, squeeze=False)
    for (part,), (draw, panels) in zip(figures, parts):
      draw(part, panels, result)
    try:
      figure.savefig(path, format='png', dpi=130, facecolor='white')
    except OSError as error:
      raise BenchmarkError(f'--plot: {path}: {error.strerror}') from error


def _draw_scaling(figure: Any, panels: Mapping[str, Rows], result: Any):
  """Speed-up against the number of devices."""
  grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
  everything = [row for rows in panels.values() for row in rows]
  forced = any(row.get('forced_devices') for row in everything)
  _head(
    figure,
    'Scaling over devices',
    everything,
    result,
    report.shared_cores(result) if forced else '',
  )
  for axes, (kind, rows) in zip(grid, panels.items()):
    _lines(axes, rows, 'devices', 'speed_up')
    counts = sorted({row['devices'] for row in rows})
    axes.plot(counts, counts, label='ideal', **_IDEAL)
    if forced and result['machine']['cores'] < counts[-1]:
      axes.axhline(
        result['machine']['cores'],
        label='number of cores',
        **{**_IDEAL, 'linestyle': ':'},
      )
    _log_axes(axes, counts, 'devices', y_base=2)
    axes.set_title(_KINDS[kind])
  grid[0].set_ylabel('speed-up over one device')
  grid[0].legend()


def _draw_growth(figure: Any, panels: Mapping[str, Rows], result: Any):
  """Time per update against a size."""
  grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
  _head(
    figure,
    'Growth of the time per update',
    [row for rows in panels.values() for row in rows],
    result,
    'Along a dashed line time is proportional to FLOP (compute-bound);'
    ' where a curve is flatter, it is bound by latency.',
  )
  for axes, (factor, rows) in zip(grid, panels.items()):
    _lines(axes, rows, 'value', 'ms_per_update')
    for i, points in enumerate(_by_algorithm(rows).values()):
      per_gflop = points[-1]['ms_per_update'] / points[-1]['gflop']
      axes.plot(
        [row['value'] for row in points],
        [row['gflop'] * per_gflop for row in points],
        zorder=1,
        label=None if i else 'proportional to FLOP',
        **_IDEAL,
      )
    _log_axes(axes, sorted({row['value'] for row in rows}), _FACTORS[factor])
  grid[0].set_ylabel('ms per update of all seeds')
  grid[-1].legend()  # single-task SAC is not in the first


def _head(figure: Any, title: str, rows: Rows, result: Any, note: str):
  """Title with machine and sizes, and lines of explanation below."""
  machine = result['machine']
  profiles, precisions = (
    ', '.join(sorted({row[name] for row in rows}))
    for name in ('profile', 'matmul_precision')
  )
  width = int(figure.bbox.width / figure.dpi * 10.5)
  figure.suptitle(
    '\n'.join(
      (
        f'{title}: profile {profiles}, {precisions},'
        f' {machine.get("device_kind")}'
        f' ({machine.get("cpu")}, {machine.get("cores")} cores)',
        *textwrap.wrap(note, width),
      )
    ),
    x=0.01,
    ha='left',
    fontsize=12.5,
  )


def _by_algorithm(rows: Rows) -> dict[str, list[Mapping[str, Any]]]:
  """Rows of each, in their order."""
  return {
    name: found
    for name in MARKS
    if (found := [row for row in rows if row['algorithm'] == name])
  }


def _lines(axes: Any, rows: Rows, x: str, y: str):
  """One line per algorithm."""
  for name, points in _by_algorithm(rows).items():
    color, marker = MARKS[name]
    axes.plot(
      [row[x] for row in points],
      [row[y] for row in points],
      color=color,
      marker=marker,
      label=name.upper(),
      zorder=2,
    )


def _log_axes(axes: Any, values: Sequence[int], label: str, y_base: int = 10):
  """Logarithmic axes with plain numbers; `values` are marked below."""
  from matplotlib import ticker  # pylint: disable=g-import-not-at-top

  axes.set_xscale('log', base=2)
  axes.set_yscale('log', base=y_base)
  axes.set_xticks(values, [str(value) for value in values])
  axes.yaxis.set_major_locator(
    ticker.LogLocator(y_base, subs=(1, 2, 5) if y_base == 10 else (1,))
  )
  axes.yaxis.set_major_formatter(
    lambda value, _: (
      f'1/{1 / value:g}' if y_base == 2 and value < 1 else f'{value:g}'
    )
  )
  axes.minorticks_off()
  axes.set_xlabel(label)
