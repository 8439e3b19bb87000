"""Small panels of whatever a run logged and an algorithm says of itself.

Nothing here knows the name of a metric or of an algorithm: what is drawn
follows from names and shapes. Every function returns figures, or nothing
without data.
"""

import collections
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from offmeta.results import drawing, records, statistics

_COLUMNS = 3  # panels side by side
_LOGARITHMIC = 30  # places whose ratio exceeds this get a logarithmic axis
_SMALL = 9.0  # points, text of small panels
_POINTS = 150  # of a line
_FITTING = 28  # letters of a title
# A mean that leaves this multiple of the middle range is cut off.
_REACH = 4.0


class _Panel(NamedTuple):
  """Draws itself into an axis."""

  title: str
  draw: Callable[[Any], None]


def colors(run: records.Run, loops: Iterable[str]) -> dict[str, str]:
  """The colour of each loop, as in the other pictures.

  Args:
    run: whose variants have theirs.
    loops: folders of metrics, or evaluation points.
  """
  variants = drawing.variant_colors(
    run.variants, run.headline_variant, run.oracle_variant
  )
  known = {'collect': drawing.BEHAVIOUR, 'offline': drawing.OFFLINE}
  for name, color in variants.items():
    known[f'online/{name}'] = known[f'online-{name}'] = color
  others = [loop for loop in loops if loop not in known]
  return known | {
    loop: drawing.OTHERS[i % len(drawing.OTHERS)]
    for i, loop in enumerate(others)
  }


def _grid(panels: list[_Panel], width: float, height: float) -> Any:
  """One figure of panels; width and height of each in inches."""
  columns = 2 if len(panels) == 4 else min(_COLUMNS, len(panels))
  rows = -(-len(panels) // columns)
  figure = drawing.figure(
    width * columns + 0.4, height * rows + 0.5, layout='constrained'
  )
  axes = figure.subplots(rows, columns, squeeze=False).ravel()
  for axis, panel in zip(axes, panels):
    panel.draw(axis)
    # Long names stay within their panel.
    fits = _FITTING / max(len(panel.title), 1)
    axis.set_title(panel.title, fontsize=(_SMALL + 0.5) * min(1.0, fits))
    axis.tick_params(labelsize=_SMALL - 1)
    axis.xaxis.label.set_size(_SMALL)
    axis.yaxis.label.set_size(_SMALL)
  for axis in axes[len(panels) :]:
    axis.set_axis_off()
  drawing.legend_below(figure, axes)
  return figure


# --- what every loop logged --------------------------------------------------


def logged(record: records.Record) -> dict[str, Any]:
  """Group -> Figure of all metrics of all loops, a panel for each.

  A group is the beginning of the names, `algorithm/stage` of
  `algorithm/stage/part/quantity`, or its first word where that gives hardly
  any panels. Loops that logged the same name share its panel, so variants of
  the online phase can be compared.
  """
  every = sorted({name for m in record.metrics.values() for name in m})
  prefix = lambda name: '/'.join(name.split('/')[:-1][:2])
  sizes = collections.Counter(map(prefix, every))
  groups: dict[str, list[str]] = {}
  for name in every:
    group = prefix(name)
    if sizes[group] < _COLUMNS:
      group = group.split('/')[0]
    groups.setdefault(group, []).append(name)
  shades = colors(record.run, record.metrics)
  figures = {}
  for group, names in sorted(groups.items()):
    panels = [
      _Panel(
        name.removeprefix(f'{group}/'),
        lambda axis, name=name: _draw_metric(axis, record, name, shades),
      )
      for name in names
    ]
    with drawing.rc():
      figures[group or 'other'] = _grid(panels, 2.6, 1.8)
  return figures


def _draw_metric(
  axis: Any, record: records.Record, name: str, shades: Mapping[str, str]
) -> None:
  """One metric of all loops that have it, against their updates."""
  means = []
  for loop, metrics in record.metrics.items():
    if name in metrics:
      step, values = _averaged(metrics[name])
      means.append(
        drawing.line(axis, step, values, shades[loop], label=loop, lw=1.4)
      )
  _cut_outliers(axis, np.concatenate(means))
  axis.xaxis.set_major_formatter(lambda value, _: drawing.count(value))
  axis.locator_params(axis='x', nbins=4)
  axis.locator_params(axis='y', nbins=4)


def _averaged(series: records.Series) -> records.Series:
  """Means over neighbouring rows of a log that is longer than a panel is wide.

  Where a row has no number, its mean has none either: a gap.
  """
  if len(series.step) <= _POINTS:
    return series
  mean = lambda rows: np.stack(
    [part.mean(0) for part in np.array_split(rows, _POINTS)]
  )
  return records.Series(mean(series.step), mean(series.values))


def _cut_outliers(axis: Any, means: np.ndarray) -> None:
  """Keeps a few extreme values from flattening all others.

  A line then leaves the panel; without them nothing is changed.
  """
  means = means[np.isfinite(means)]
  if not means.size:
    return
  first, last = np.quantile(means, [0.05, 0.95])
  reach = _REACH * (last - first)
  low, high = axis.get_ylim()
  if reach > 0:
    if means.min() < first - reach:
      low = first - 0.5 * reach
    if means.max() > last + reach:
      high = last + 0.5 * reach
    axis.set_ylim(low, high)


# --- what an algorithm says of itself ----------------------------------------


def diagnoses(record: records.Record) -> Any | None:
  """All that `Algorithm.diagnose` returned, by shape (see there).

  One number per seed: a dot with its 95% interval for each loop. [K]: a line
  with a band. [n, 2]: points of all seeds. [K, L]: a map of the mean over
  seeds for each loop.
  """
  found: dict[tuple[str, int], dict[str, np.ndarray]] = {}
  for point, arrays in record.evaluations.items():
    for name, values in records.diagnoses(arrays).items():
      found.setdefault((name, values.ndim), {})[point] = values
  shades = colors(record.run, record.evaluations)
  # What only says where others are.
  places = {place for name, _ in found for place in name.split('_by_')[1:]}
  panels = []
  for (name, ndim), points in found.items():
    if name not in places:
      panels += _panels(name, ndim, points, record, shades)
  if not panels:
    return None
  with drawing.rc():
    return _grid(panels, 3.3, 2.6)


def _panels(
  name: str,
  ndim: int,
  points: Mapping[str, np.ndarray],
  record: records.Record,
  shades: Mapping[str, str],
) -> list[_Panel]:
  """The panels of one diagnosis: point -> [S, ...]."""
  title, *axes = name.split('_by_')

  def along(point: str, place: str, count: int) -> np.ndarray:
    """Places [K] of an axis."""
    given = record.array(point, f'{records.DIAGNOSE}{place}')
    usable = given is not None and given.shape[1:] == (count,)
    return given.mean(0) if usable else np.arange(count)

  def scalars(axis):
    entries = []
    for point, values in points.items():
      mean, low, high = (float(x) for x in statistics.band(values))
      interval = (low, high) if np.isfinite(values).sum() > 1 else (None, None)
      entries.append(drawing.Dot(_label(point), mean, *interval, shades[point]))
    drawing.dots(axis, entries, '{:.3g}')

  def lines(axis):
    for point, values in points.items():
      x = along(point, axes[0] if axes else '', values.shape[1])
      drawing.line(
        axis, x, values.T, shades[point], label=_label(point), lw=1.6
      )
    if x.min() > 0 and x.max() > _LOGARITHMIC * x.min():
      axis.set_xscale('log')
      axis.set_xticks(x if len(x) <= 10 else x[:: len(x) // 5])
      axis.set_xticks([], minor=True)
    axis.xaxis.set_major_formatter(lambda value, _: drawing.count(value))
    axis.set_xlabel(words(axes[0]) if axes else 'index')

  def scatter(axis):
    for point, values in points.items():
      axis.scatter(
        *values.reshape(-1, 2).T, s=9, alpha=0.6, lw=0, color=shades[point],
        label=_label(point),
      )  # fmt: skip
    axis.set(ylabel=words(title), xlabel=words(axes[0]) if axes else '')

  def heat(axis, point):
    values = points[point]
    names = [*axes, '', ''][:2]
    y, x = [along(point, *at) for at in zip(names, values.shape[1:])]
    mean = statistics.band(np.moveaxis(values, 0, -1))[0]
    image = axis.pcolormesh(x, y, mean, cmap='viridis', shading='nearest')
    axis.figure.colorbar(image, ax=axis).ax.tick_params(labelsize=_SMALL - 1)
    axis.set(ylabel=words(names[0]), xlabel=words(names[1]))
    axis.grid(visible=False)

  if ndim == 1:
    return [_Panel(words(title), scalars)]
  if ndim == 2:
    return [_Panel(words(title), lines)]
  if len(axes) < 2 and all(x.shape[-1] == 2 for x in points.values()):
    return [_Panel(words(title), scatter)]
  return [
    _Panel(
      f'{words(title)}, {_label(point)}', lambda axis, p=point: heat(axis, p)
    )
    for point in points
  ]


def _label(point: str) -> str:
  """An evaluation point as it is read: a variant by its name alone."""
  return point.removeprefix('online-')


def words(name: str) -> str:
  """A name as it is read: 'kl_to_prior' as 'kl to prior'."""
  return name.replace('_', ' ')
