"""The house style of pictures: colours, fonts, labels that do not overlap.

matplotlib is imported inside the functions and drawn with Agg, without pyplot,
so nothing here touches a display or global state. Colours are Okabe and Ito's
(safe for colour-blind readers).
"""

from collections.abc import Iterable, Sequence
import io
from typing import Any, NamedTuple

import numpy as np

from offmeta.results import statistics

OFFLINE, RANDOM, BEHAVIOUR = '#444444', '#8a8a8a', '#b07d00'
HEADLINE, ORACLE = '#0072b2', '#009e73'
OTHERS = ('#d55e00', '#cc79a7', '#56b4e9', '#e69f00', '#7f4f9b')
_STYLE = {
  'font.size': 10.5,
  'axes.titlesize': 11.5,
  'axes.titleweight': 'bold',
  'axes.titlelocation': 'left',
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.edgecolor': '#777777',
  'axes.labelcolor': '#222222',
  'axes.grid': True,
  'axes.axisbelow': True,
  'grid.color': '#e7e7e7',
  'grid.linewidth': 0.8,
  'legend.frameon': False,
  'xtick.color': '#444444',
  'ytick.color': '#444444',
  'lines.linewidth': 2.0,
  'lines.markersize': 4.5,
}
RETURN = 'return of last episode'


def to_png(figure: Any, dpi: int = 130) -> bytes:
  """A figure as the bytes of a PNG file, with a palette of 256 colours.

  That makes a third of the bytes; pure colours of lines come out as they are.
  """
  from PIL import Image  # pylint: disable=g-import-not-at-top

  stream = io.BytesIO()
  with rc():
    figure.savefig(
      stream,
      format='png',
      dpi=dpi,
      bbox_inches='tight',
      facecolor='white',
      pil_kwargs={'compress_level': 0},  # read again at once
    )
  small = io.BytesIO()
  picture = Image.open(stream).convert('RGB').quantize(256, dither=0)
  picture.save(small, 'png', optimize=True)
  return small.getvalue()


def variant_colors(
  variants: Iterable[str], headline: str, oracle: str | None
) -> dict[str, str]:
  """The colour of each variant."""
  others = [name for name in variants if name not in (headline, oracle)]
  colors = {name: OTHERS[i % len(OTHERS)] for i, name in enumerate(others)}
  return {**colors, oracle or '': ORACLE, headline: HEADLINE}


def rc() -> Any:
  """The house style as a context; a clear error without matplotlib."""
  try:
    import matplotlib  # pylint: disable=g-import-not-at-top
  except ImportError as error:
    raise ImportError(
      'pictures need matplotlib: pip install offmeta[report]'
    ) from error
  return matplotlib.rc_context(_STYLE)


def figure(width: float, height: float, layout: str | None = None) -> Any:
  """An empty Agg figure; inches."""
  # pylint: disable=g-import-not-at-top
  from matplotlib.backends import backend_agg
  from matplotlib.figure import Figure

  made = Figure(figsize=(width, height), layout=layout)
  backend_agg.FigureCanvasAgg(made)
  return made


def count(value: float) -> str:
  """12500 as 12.5k."""
  for scale, unit in ((1e6, 'M'), (1e3, 'k')):
    if abs(value) >= scale:
      return f'{value / scale:g}{unit}'
  return f'{value:g}'


def line(
  axis: Any,
  x: np.ndarray,
  values: np.ndarray,
  color: str,
  band: bool = True,
  **style: Any,
) -> np.ndarray:
  """Draws a mean over seeds, and the 95% t interval as a band.

  Args:
    axis: to draw into.
    x: [K].
    values: [K, S].
    color: of both.
    band: whether the interval is drawn.
    **style: of the line; points are marked where there are few.

  Returns:
    The mean [K].
  """
  mean, low, high = statistics.band(values)
  if band:
    axis.fill_between(x, low, high, color=color, alpha=0.16, lw=0)
  marker = 'o' if len(mean) <= 25 else None
  axis.plot(x, mean, color=color, **{'marker': marker, **style})
  return mean


class Dot(NamedTuple):
  """A mean with its interval; no interval where its ends are None."""

  name: str
  mean: float
  low: float | None
  high: float | None
  color: str


def dots(axis: Any, entries: Sequence[Dot], number: str = '{:.1f}') -> None:
  """Dots with intervals and their means in figures, first entry on top."""
  for index, dot in enumerate(entries[::-1]):
    if dot.low is not None:
      axis.plot(
        [dot.low, dot.high],
        [index, index],
        color=dot.color,
        lw=3.5,
        alpha=0.45,
        solid_capstyle='round',
      )
    axis.plot(dot.mean, index, 'o', color=dot.color, ms=7.5)
    axis.annotate(
      number.format(dot.mean).replace('-', '−'),
      (dot.mean, index),
      xytext=(0, 6),
      ha='center',
      textcoords='offset points',
      fontsize=8.5,
      color='#333333',
    )
  axis.set_yticks(range(len(entries)), [dot.name for dot in entries[::-1]])
  axis.set_ylim(-0.6, len(entries) - 0.2)
  axis.tick_params(axis='y', length=0)


def legend_below(
  figure: Any,
  axes: Sequence[Any],
  handles: Sequence[Any] | None = None,
  columns: int = 4,
) -> None:
  """One legend under all axes, without repeated labels."""
  found: dict[str, Any] = {}
  if handles is not None:
    found = {handle.get_label(): handle for handle in handles}
  else:
    for axis in axes:
      for handle, label in zip(*axis.get_legend_handles_labels()):
        found.setdefault(label, handle)
  if not found:
    return
  place = {'loc': 'upper center', 'bbox_to_anchor': (0.5, 0.0)}
  if figure.get_layout_engine() is not None:
    place = {'loc': 'outside lower center'}
  figure.legend(
    list(found.values()),
    list(found),
    **place,
    ncols=min(len(found), columns),
    fontsize=9.5,
    handlelength=3.0,
  )


def label_right(
  axis: Any, labels: Sequence[tuple[float, str, str]], gap: float = 0.075
) -> None:
  """Writes (y, text, colour) right of an axis, pushed apart to be legible."""
  low, high = axis.get_ylim()
  labels = sorted(label for label in labels if np.isfinite(label[0]))
  wanted = [(label[0] - low) / (high - low) for label in labels]
  for (_, text, color), start, end in zip(labels, wanted, spread(wanted, gap)):
    axis.annotate(
      text,
      (1.0, start),
      xytext=(1.045, end),
      xycoords='axes fraction',
      textcoords='axes fraction',
      color=color,
      fontsize=9.5,
      ha='left',
      va='center',
      annotation_clip=False,
      arrowprops={
        'arrowstyle': '-',
        'color': color,
        'lw': 0.8,
        'shrinkA': 0,
        'shrinkB': 0,
        'relpos': (0, 0.5),
      },
    )


def spread(wanted: Sequence[float], gap: float) -> list[float]:
  """Moves sorted positions as little as needed to be `gap` apart in [0, 1]."""
  blocks: list[list[float]] = []  # [sum of (wanted - offset), count]
  for position in wanted:
    blocks.append([position, 1])
    while len(blocks) > 1:
      (first, m), (second, n) = blocks[-2:]
      if first / m + gap * m <= second / n:
        break
      blocks[-2:] = [[first + second - gap * m * n, m + n]]
  places = [
    total / number + gap * index
    for total, number in blocks
    for index in range(int(number))
  ]
  top = 1.0 - gap * (len(places) - 1)
  return [
    max(min(position, top + gap * index), gap * index)
    for index, position in enumerate(places)
  ]
