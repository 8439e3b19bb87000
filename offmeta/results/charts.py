"""Bars, dots with intervals, and curves of a few numbers.

Every function returns a Figure, or None without data.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from offmeta.results import drawing, records, tables


def wall_time(timing: Mapping[str, float]) -> Any | None:
  """Where the wall time went: one horizontal bar per phase."""
  if not timing:
    return None
  names = list(timing)[::-1]
  seconds = np.array([timing[name] for name in names])
  unit, scale = ('min', 60) if seconds.max() >= 180 else ('s', 1)
  total = max(seconds.sum(), 1e-9)
  with drawing.rc():
    figure = drawing.figure(7.6, 0.36 * len(names) + 1.0)
    axis = figure.subplots()
    axis.barh(names, seconds / scale, color=drawing.HEADLINE, height=0.66)
    for index, value in enumerate(seconds):
      axis.annotate(
        f' {value / scale:.1f} {unit} ({value / total:.0%})',
        (value / scale, index),
        va='center',
        fontsize=9.5,
      )
    axis.set_xlim(0, seconds.max() / scale * 1.22 + 1e-9)
    axis.set_xlabel(f'wall time ({unit})')
    axis.grid(axis='y', visible=False)
    axis.tick_params(axis='y', length=0)
    axis.set_title(f'Wall time by phase, {total / scale:.1f} {unit} in all')
  return figure


def finetune_curve(record: records.Record) -> Any | None:
  """Return against environment steps of fine-tuning, over held-out tasks.

  Dashed: the meta-policy, and after the offline step on random data. The band
  is the 95% t interval over seeds; steps are means over seeds and tasks.
  """
  returns = record.array('finetune', 'finetune_returns')
  if returns is None or returns.shape[-1] < 3:
    return None
  per_seed = returns.mean(1)  # [S, K]
  steps = record.array('finetune', 'finetune_env_steps').mean((0, 1))
  color = drawing.HEADLINE
  with drawing.rc():
    figure = drawing.figure(7.6, 3.6)
    axis = figure.subplots()
    drawing.line(axis, steps[2:], per_seed.T[2:], color, marker=None)
    mean = per_seed.mean(0)
    labels = [(mean[-1], 'fine-tuned', color)]
    for index, (text, shade) in enumerate(
      (
        ('meta-policy', drawing.OFFLINE),
        ('after the offline step', drawing.OTHERS[0]),
      )
    ):
      axis.axhline(mean[index], color=shade, ls=(0, (5, 3)), lw=1.3, zorder=1)
      labels.append((mean[index], text, shade))
    axis.set_xlim(0, steps[-1])
    axis.set_xlabel('environment steps in the task')
    axis.set_ylabel('mean return per episode')
    axis.set_title('Fine-tuning in each held-out task')
    drawing.label_right(axis, labels)
  return figure


def row_chart(summary: Mapping[str, Any]) -> Any | None:
  """The rows of the table: a dot with its 95% interval for each."""
  entries = [
    line
    for line in tables.lines(summary)
    if line.group != tables.PAIRED and line.mean is not None
  ]
  if not entries:
    return None
  parts = [
    [line for line in entries if line.group == group] for group in tables.GROUPS
  ]
  parts = [part for part in parts if part]
  with drawing.rc():
    figure = drawing.figure(8.4, 0.36 * len(entries) + 0.6 * len(parts) + 0.6)
    axes = figure.subplots(
      len(parts),
      1,
      sharex=True,
      squeeze=False,
      gridspec_kw={
        'height_ratios': [len(part) + 0.6 for part in parts],
        'hspace': 0.55 / (0.3 * len(entries) / len(parts)),
      },
    )[:, 0]
    colors = drawing.variant_colors(
      summary.get('variants', {}),
      summary.get('headline_variant', ''),
      summary.get('oracle_variant'),
    )
    for axis, part in zip(axes, parts):
      drawing.dots(
        axis,
        [
          drawing.Dot(
            line.name,
            line.mean,
            line.low,
            line.high,
            _row_color(line.name, colors),
          )
          for line in part
        ],
      )
      axis.set_title(part[0].group.split(':')[0])
    axes[-1].set_xlabel(f'{drawing.RETURN} (environment units)')
  return figure


def _row_color(name: str, colors: Mapping[str, str]) -> str:
  """Colour by loop, as in the other pictures."""
  base, _, variant = name.partition('/')
  if base == 'oracle':
    return drawing.ORACLE
  if variant:
    return colors.get(variant, drawing.OTHERS[0])
  if 'online' in base:
    return drawing.HEADLINE
  if 'behaviour' in base or 'specialists' in base:
    return drawing.BEHAVIOUR
  if base.startswith('finetune'):
    return drawing.OTHERS[0]
  return drawing.RANDOM if base == 'random' else drawing.OFFLINE


# Marker and colour of a comparison's columns.
_MARKS = (
  ('o', drawing.OFFLINE),
  ('o', drawing.HEADLINE),
  ('D', drawing.OTHERS[0]),
  ('s', drawing.OTHERS[1]),
  ('^', drawing.ORACLE),
)


def comparison_chart(
  rows: Sequence[Mapping[str, Any]],
  columns: Mapping[str, str],
  references: Mapping[str, Mapping[str, Any]],
) -> Any:
  """Rows of `offmeta.results.comparison`: a mark for each column's mean.

  Bars are 95% intervals over seeds; dashed lines are references.

  Args:
    rows: with 'name' and 'scores'.
    columns: key of the scores -> its name; at most five.
    references: name -> entry with 'mean'.
  """
  with drawing.rc():
    figure = drawing.figure(8.6, 0.62 * len(rows) + 1.4, layout='constrained')
    axis = figure.subplots()
    for (key, label), (marker, color) in zip(columns.items(), _MARKS):
      place = 0.26 - 0.13 * list(columns).index(key)
      for index, row in enumerate(rows[::-1]):
        if key not in row['scores']:
          continue
        entry, height = row['scores'][key], index + place
        if entry['low'] is not None:
          axis.plot(
            [entry['low'], entry['high']],
            [height] * 2,
            color=color,
            lw=3.0,
            alpha=0.4,
            solid_capstyle='round',
          )
        axis.plot(
          entry['mean'], height, marker, color=color, ms=5.5, ls='', label=label
        )
    for name, entry in references.items():
      axis.axvline(
        entry['mean'],
        color=_row_color(name, {}),
        lw=1.3,
        ls=(0, (5, 3)),
        zorder=1,
      )
      axis.annotate(
        name,
        (entry['mean'], 1.0),
        rotation=35,
        fontsize=8.5,
        xycoords=('data', 'axes fraction'),
        xytext=(0, 3),
        textcoords='offset points',
        color=_row_color(name, {}),
      )
    axis.set_yticks(range(len(rows)), [row['name'] for row in rows[::-1]])
    axis.set_ylim(-0.6, len(rows) - 0.4)
    axis.tick_params(axis='y', length=0)
    axis.set_xlabel(f'{drawing.RETURN} in held-out tasks (environment units)')
    drawing.legend_below(figure, [axis], columns=5)
  return figure
