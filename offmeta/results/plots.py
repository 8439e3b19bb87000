"""Pictures of a run. Every function returns a Figure, or None without data.

One variant keeps its colour in all pictures.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from offmeta.results import charts, drawing, panels, records, statistics


def draw_all(
  record: records.Record, summary: Mapping[str, Any]
) -> dict[str, Any]:
  """File stem -> Figure, for every picture that the record has data for."""
  figures = {
    'training': training_curves(record, summary),
    'rows': charts.row_chart(summary),
    'episodes': episode_curves(record),
    'z_space': z_space(record),
    'trajectories': trajectories(record),
    'finetune': charts.finetune_curve(record),
    'diagnoses': panels.diagnoses(record),
    'wall_time': charts.wall_time(record.timing),
  }
  return {name: item for name, item in figures.items() if item is not None}


def _run_colors(run: records.Run) -> dict[str, str]:
  """The colour of each variant of a run."""
  return drawing.variant_colors(
    run.variants, run.headline_variant, run.oracle_variant
  )


# --- (1) training curves ----------------------------------------------------


def training_curves(
  record: records.Record, summary: Mapping[str, Any]
) -> Any | None:
  """Adaptation return against updates, offline part then online part.

  Left and right panel touch; the line between them is the phase switch. Their
  widths follow the number of updates, but neither falls below a quarter.
  Bands are 95% t intervals over seeds. Online steps may count on from the
  offline ones or from 0 (then the first must lie below the offline total).
  """
  panels = [
    (title, metric)
    for title, metric in (
      (
        'Held-out tasks, self-collected context',
        'eval/test/self_context/final_return',
      ),
      (
        'Held-out tasks, offline context',
        'eval/test/offline_context/final_return',
      ),
      (
        'Training tasks, offline context',
        'eval/train/offline_context/final_return',
      ),
    )
    if _logged(record, metric)
  ]
  if all(metric.startswith('eval/test') for _, metric in panels):
    title, metric = (
      'Training tasks, self-collected context',
      'eval/train/self_context/final_return',
    )
    panels += [(title, metric)] if _logged(record, metric) else []
  if not panels:
    return None
  curves = [_curves(record, metric) for _, metric in panels]
  last = [
    max((series.step[-1] for series in part.values()), default=0)
    for part in (
      {i: c[0] for i, c in enumerate(curves) if c[0] is not None},
      {(i, n): s for i, c in enumerate(curves) for n, s in c[1].items()},
    )
  ]
  if not last[0]:  # nothing was trained offline
    last = last[1:]
  both = len(last) == 2 and last[1] > 0
  share = float(np.clip(last[0] / max(sum(last), 1), 0.25, 0.75))
  with drawing.rc():
    figure = drawing.figure(8.6, 3.5 * len(panels) + 0.3)
    grid = figure.subplots(
      len(panels),
      1 + both,
      sharey='row',
      squeeze=False,
      gridspec_kw={
        'width_ratios': [share, 1 - share][: 1 + both],
        'wspace': 0.0,
        'hspace': 0.4,
      },
    )
    for axes, (title, metric), (offline, online) in zip(grid, panels, curves):
      labels = _draw_curves(axes, offline, online, record.run)
      labels += _references(axes, summary, metric, set(online), record.run)
      axes[0].set_title(title, pad=20 if both else 6)
      axes[0].set_ylabel(drawing.RETURN)
      drawing.label_right(axes[-1], labels)
    _phase_axes(grid, last)
  return figure


def _logged(record: records.Record, metric: str) -> bool:
  """Whether any training logged it."""
  return any(
    metric in values
    for loop, values in record.metrics.items()
    if loop != 'collect'
  )


def _curves(
  record: records.Record, metric: str
) -> tuple[records.Series | None, dict[str, records.Series]]:
  """The offline series, and variant -> online series in updates since then."""
  offline = record.metrics.get('offline', {}).get(metric)
  end = max(
    (series.step[-1] for series in record.metrics.get('offline', {}).values()),
    default=0,
  )
  online = {}
  for name in record.run.variants:
    series = record.metrics.get(f'online/{name}', {}).get(metric)
    if series is None:
      continue
    if series.step[0] >= end:
      series = series._replace(step=series.step - end)
    if (
      offline is not None
      and series.step[0] > 0
      and (offline.values.shape[1] == series.values.shape[1])
    ):
      series = records.Series(
        np.concatenate([[0], series.step]),
        np.concatenate([offline.values[-1:], series.values]),
      )
    online[name] = series
  return offline, online


def _draw_curves(
  axes: Sequence[Any],
  offline: records.Series | None,
  online: Mapping[str, records.Series],
  run: records.Run,
) -> list[tuple[float, str, str]]:
  """Lines with bands; returns (y, text, colour) of the labels they need."""
  labels, colors = [], _run_colors(run)
  parts = (
    []
    if offline is None
    else [(axes[0], 'offline phase', offline, drawing.OFFLINE)]
  )
  parts += [
    (axes[-1], name, online[name], colors[name])
    for name in sorted(online, key=run.headline_variant.__eq__)
  ]
  for axis, name, series, color in parts:
    mean = drawing.line(axis, series.step, series.values, color)
    if name in online or not online:
      labels.append((mean[-1], _variant_label(name, run), color))
  return labels


def _references(
  axes: Sequence[Any],
  summary: Mapping[str, Any],
  metric: str,
  drawn: set[str],
  run: records.Run,
) -> list[tuple[float, str, str]]:
  """Horizontal dashed lines of rows that do not train; returns labels."""
  wanted = [('random', 'random', drawing.RANDOM)]
  if '/train/' in metric:
    wanted = [('behaviour_data', 'logged data', drawing.BEHAVIOUR)]
  elif '/self_context/' in metric:
    wanted += [
      ('behaviour', 'behaviour policy', drawing.BEHAVIOUR),
      ('oracle', 'oracle, final', drawing.ORACLE),
    ]
  labels = []
  for row, text, color in wanted:
    mean = summary['rows'].get(row, {}).get('mean')
    if mean is None:
      continue
    for axis in axes:
      axis.axhline(mean, color=color, ls=(0, (5, 3)), lw=1.3, zorder=1)
    if row != 'oracle' or run.oracle_variant not in drawn:
      labels.append((mean, text, color))
  return labels


def _phase_axes(grid: np.ndarray, last: Sequence[int]) -> None:
  """Labels of the touching panels, and the line of the phase switch."""
  from matplotlib import ticker  # pylint: disable=g-import-not-at-top

  thousands = ticker.FuncFormatter(lambda value, _: drawing.count(value))
  for axes in grid:
    for index, axis in enumerate(axes):
      axis.xaxis.set_major_formatter(thousands)
      axis.xaxis.set_major_locator(
        ticker.MaxNLocator(
          5, steps=[1, 2, 2.5, 5, 10], prune='both' if index else 'upper'
        )
      )
      margin = 1.01 if index == len(axes) - 1 else 1.0
      axis.set_xlim(0, max(last[index], 1) * margin)
    if len(axes) == 2:
      axes[1].spines['left'].set(color='#222222', linewidth=1.8)
      axes[1].tick_params(axis='y', length=0)
      axes[1].annotate(
        ' phase switch',
        (0, 1),
        xycoords='axes fraction',
        xytext=(2, 3),
        textcoords='offset points',
        fontsize=9,
        color='#222222',
        ha='left',
        va='bottom',
      )
  names = ('offline updates', 'online updates (since the switch)')
  if len(last) == 1:
    names = ('online updates',)
  for axis, name in zip(grid[-1], names):
    axis.set_xlabel(name)


# --- (2) adaptation episodes ------------------------------------------------


def episode_curves(record: records.Record) -> Any | None:
  """Return of each adaptation episode, offline phase and every variant.

  Left: held-out tasks. Right: training tasks, where dashed lines show the
  return with offline context. Bands are 95% t intervals over seeds. Episodes
  that fewer than half of the repetitions have are not drawn.
  """
  run, colors = record.run, _run_colors(record.run)
  drawn = [*record.other_variants, run.oracle_variant, run.headline_variant]
  points = [
    (f'online-{name}', _variant_label(name, run), colors[name])
    for name in drawn
    if f'online-{name}' in record.evaluations
  ]
  points.insert(
    max(len(points) - 1, 0), ('offline', 'offline phase', drawing.OFFLINE)
  )
  training = any(
    record.array(point, 'train_self_returns') is not None
    for point, *_ in points
  )
  with drawing.rc():
    figure = drawing.figure(9.6 if training else 6.2, 3.9)
    axes = figure.subplots(1, 1 + training, squeeze=False, sharey=True)[0]
    for axis, side in zip(axes, ('test', 'train')):
      for point, label, color in points:
        _draw_episodes(
          axis, record.array(point, f'{side}_self_returns'), color, label
        )
        if side == 'train' and point in (
          'offline',
          f'online-{run.headline_variant}',
        ):
          _draw_episodes(
            axis,
            record.array(point, 'train_offline_returns'),
            color,
            f'{label}, offline context',
            ls='--',
          )
      axis.set_xlabel('adaptation episode')
    random = record.array('collect', 'random_test_returns')
    if random is not None:
      axes[0].axhline(
        statistics.seed_scores(random).mean(),  # as in the table
        color=drawing.RANDOM,
        ls=(0, (5, 3)),
        lw=1.3,
        label='random',
      )
    axes[0].set_title('Held-out tasks')
    axes[0].set_ylabel('return of the episode')
    if training:
      axes[1].set_title('Training tasks')
    drawing.legend_below(figure, axes)
  return figure


def _draw_episodes(
  axis: Any, returns: np.ndarray | None, color: str, label: str, ls: str = '-'
) -> None:
  """One line of mean return per episode; returns [S, M, R, E]."""
  if returns is None:
    return
  common = np.isfinite(returns).mean((0, 1, 2)) >= 0.5
  returns = returns[..., common]
  counts = np.isfinite(returns).sum((1, 2))
  per_seed = np.where(counts > 0, np.nansum(returns, (1, 2)), np.nan)
  per_seed = per_seed / np.maximum(counts, 1)  # [S, E]
  episode = np.arange(1, per_seed.shape[1] + 1)
  drawing.line(
    axis,
    episode,
    per_seed.T,
    color,
    band=ls == '-',
    ls=ls,
    label=label,
    marker='o',
    markerfacecolor=color if ls == '-' else 'white',
  )
  axis.set_xticks(episode)


# Share of the variance below which a second component is not drawn.
_FLAT = 0.05

# --- (3) z-space ------------------------------------------------------------


def z_space(
  record: records.Record, seed: int = 0, max_tasks: int = 40
) -> Any | None:
  """Posterior means of offline and self-collected contexts, two panels.

  One seed (latent axes mean nothing across seeds). One PCA, fitted on the
  offline-context means of both panels, so the panels share their axes. Where
  its second component holds next to nothing, the first is drawn against the
  task parameter.
  """
  headline = record.run.headline_variant
  panels = []
  for point, title in (
    ('offline', 'Before: offline phase' if headline else 'Offline phase'),
    (f'online-{headline}', f'After: {headline}'),
  ):
    pair = [
      record.array(point, f'posterior_{kind}_mean')
      for kind in ('offline', 'self')
    ]
    if all(item is not None for item in pair) and (
      len(pair[0][seed]) == len(pair[1][seed])
    ):
      panels.append((title, pair[0][seed], pair[1][seed]))
  if not panels or len({panel[1].shape[-1] for panel in panels}) > 1:
    return None
  num_tasks = min(len(panel[1]) for panel in panels)
  color = _task_color(record, num_tasks)
  order = np.argsort(color, kind='stable')
  shown = order[
    np.unique(
      np.linspace(0, num_tasks - 1, min(num_tasks, max_tasks)).astype(int)
    )
  ]
  center, basis, share = _pca(
    np.concatenate(
      [panel[1].reshape(-1, panel[1].shape[-1]) for panel in panels]
    )
  )
  with drawing.rc():
    figure = drawing.figure(4.7 * len(panels) + 1.0, 4.2, layout='constrained')
    axes = figure.subplots(
      1, len(panels), squeeze=False, sharex=True, sharey=True
    )[0]
    for axis, (title, offline, own) in zip(axes, panels):
      clouds = [(item - center) @ basis for item in (offline, own)]
      if share[1] < _FLAT:
        clouds = [_against(color, cloud) for cloud in clouds]
      points = _draw_clouds(axis, clouds, color, shown)
      axis.set_title(title)
    first = f'z, first component ({share[0]:.0%} of variance)'
    names = first, f'z, second component ({share[1]:.0%})'
    if share[1] < _FLAT:
      names = 'task parameter', f'{first[:-1]}, the second {share[1]:.0%})'
    for axis in axes:
      axis.set_xlabel(names[0])
    axes[0].set_ylabel(names[1])
    bar = figure.colorbar(
      points, ax=list(axes), pad=0.02, fraction=0.04, aspect=30
    )
    bar.set_label('task parameter')
    bar.outline.set_visible(False)
    _z_legend(figure, axes)
  return figure


def _against(color: np.ndarray, cloud: np.ndarray) -> np.ndarray:
  """[N, P, 2] of (task parameter, first component)."""
  cloud = cloud[: len(color)]
  parameter = np.broadcast_to(color[:, None], cloud.shape[:2])
  return np.stack([parameter, cloud[..., 0]], -1)


def _task_color(record: records.Record, num_tasks: int) -> np.ndarray:
  """[N] colour value per training task; its index if none was recorded."""
  for arrays in record.evaluations.values():
    color = arrays.get('train_task_color')
    if color is not None and len(color) == num_tasks:
      return color
  return np.arange(num_tasks, dtype=float)


def _pca(points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Principal axes of [P, Z]: centre [Z], basis [Z, 2], variance share [2]."""
  points = points[np.isfinite(points).all(-1)]
  center = points.mean(0)
  _, scale, rows = np.linalg.svd(points - center, full_matrices=False)
  basis, share = np.zeros((points.shape[-1], 2)), np.zeros(2)
  kept = min(2, len(rows))
  basis[:, :kept] = rows[:kept].T
  share[:kept] = (scale**2)[:kept] / max((scale**2).sum(), 1e-12)
  return center, basis, share


def _draw_clouds(
  axis: Any,
  clouds: Sequence[np.ndarray],
  color: np.ndarray,
  shown: np.ndarray,
) -> Any:
  """Filled offline and hollow own points of each task, and their links."""
  import matplotlib  # pylint: disable=g-import-not-at-top

  scale = matplotlib.colors.Normalize(
    color.min(), max(color.max(), color.min() + 1e-9)
  )
  shades = matplotlib.colormaps['viridis'](scale(color))
  for task in shown:
    ends = np.stack([np.nanmean(cloud[task], 0) for cloud in clouds])
    axis.plot(*ends.T, color=shades[task], lw=0.9, alpha=0.7, zorder=2)
    axis.scatter(
      *clouds[1][task].T,
      s=24,
      facecolors='none',
      zorder=3,
      edgecolors=shades[task],
      linewidths=1.0,
    )
    axis.scatter(
      *clouds[0][task].T,
      s=20,
      color=shades[task],
      zorder=4,
      edgecolors='white',
      linewidths=0.4,
    )
  return matplotlib.cm.ScalarMappable(scale, 'viridis')


def _z_legend(figure: Any, axes: Sequence[Any]) -> None:
  """Legend of marker fill, below the axes."""
  from matplotlib.lines import Line2D  # pylint: disable=g-import-not-at-top

  grey = '#555555'
  marks = [
    Line2D(
      [],
      [],
      ls='',
      marker='o',
      color=grey,
      label='offline context',
    ),
    Line2D(
      [],
      [],
      ls='',
      marker='o',
      color=grey,
      markerfacecolor='none',
      label='self-collected context',
    ),
    Line2D([], [], color=grey, lw=1, label='same task (between the means)'),
  ]
  drawing.legend_below(figure, axes, marks)


# --- (4) trajectories -------------------------------------------------------


def trajectories(record: records.Record, max_tasks: int = 4) -> Any | None:
  """Paths on the plane: columns are held-out tasks, rows before and after.

  Seed 0, first repetition. The tasks are spread over the quantiles of the
  return of the last episode, after the online phase if there is one: the worst
  on the left, the best on the right.
  """
  headline = record.run.headline_variant
  rows = [
    (
      title,
      record.array(point, 'trajectories'),
      record.array(point, 'trajectory_goals'),
      _scores_of_paths(record, point),
    )
    for title, point in (
      ('before (offline)' if headline else 'offline phase', 'offline'),
      ('after (online)', f'online-{headline}'),
    )
  ]
  rows = [row for row in rows if row[1] is not None]
  if not rows:
    return None
  shown = _quantiles(rows[-1][-1], min(len(row[1]) for row in rows), max_tasks)
  low, high = _limits(
    [item[shown] for row in rows for item in row[1:3] if item is not None]
  )
  with drawing.rc():
    shape = float(np.clip((high - low)[1] / (high - low)[0], 0.4, 2.5))
    figure = drawing.figure(
      2.1 * len(shown) + 0.7,
      2.3 * shape * len(rows) + 1.3,
      layout='compressed',
    )
    grid = figure.subplots(
      len(rows), len(shown), squeeze=False, sharex=True, sharey=True
    )
    for axes, (title, paths, goals, scores) in zip(grid, rows):
      axes[0].set_ylabel(f'{title}\ny')
      for task, axis in zip(shown, axes):
        _draw_paths(axis, paths[task], None if goals is None else goals[task])
        axis.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), aspect='equal')
        if scores is not None:
          title = f'task {task}: {scores[task]:.1f}'
          axis.set_title(title, loc='center', fontsize=10.5)
    for axis in grid[-1]:
      axis.set_xlabel('x')
    drawing.legend_below(figure, grid[0], columns=max_tasks + 1)
  return figure


def _scores_of_paths(record: records.Record, point: str) -> np.ndarray | None:
  """Return of the last episode [m], seed 0, first repetition.

  None where paths are not those of the first tasks, as in runs of earlier
  versions, which kept four.
  """
  returns = record.array(point, 'test_self_returns')
  paths = record.array(point, 'trajectories')
  if paths is None or returns is None:
    return None
  if len(paths) != min(returns.shape[1], records.MOST_PATHS):
    return None
  return statistics.final_returns(returns[0, : len(paths), 0])


def _quantiles(scores: np.ndarray | None, number: int, most: int) -> np.ndarray:
  """Numbers of tasks among the first `number`, from the worst to the best."""
  order = np.arange(number)
  if scores is not None:
    order = np.argsort(scores[:number], kind='stable')
  places = np.linspace(0, number - 1, min(most, number))
  return order[np.round(places).astype(int)]


def _draw_paths(axis: Any, paths: np.ndarray, goal: np.ndarray | None) -> None:
  """Paths [E, T+1, 2] from light (first episode) to dark (last)."""
  import matplotlib  # pylint: disable=g-import-not-at-top

  shades = matplotlib.colormaps['viridis_r'](np.linspace(0.12, 1, len(paths)))
  for episode, (path, color) in enumerate(zip(paths, shades)):
    axis.plot(
      *path.T, color=color, lw=1.7, alpha=0.95, label=f'episode {episode + 1}'
    )
  axis.plot(
    *paths[0, 0],
    marker='o',
    ms=5,
    color='#444444',
    ls='',
    label='start',
    zorder=5,
  )
  if goal is not None:
    axis.plot(
      *goal,
      marker='*',
      ms=14,
      color='#d55e00',
      ls='',
      label='goal',
      markeredgecolor='white',
      markeredgewidth=0.8,
      zorder=6,
    )
  axis.spines[['top', 'right']].set_visible(True)


def _limits(arrays: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
  """Common limits [2], [2] of arrays [..., 2] with a margin."""
  points = np.concatenate([array.reshape(-1, 2) for array in arrays])
  low, high = np.nanmin(points, 0), np.nanmax(points, 0)
  margin = 0.08 * max((high - low).max(), 1e-6)
  return low - margin, high + margin


def _variant_label(name: str, run: records.Run) -> str:
  """Variant name with its role."""
  if name == run.oracle_variant and name != 'oracle':
    return f'{name} (oracle)'
  return name
