"""The summary as a table: text, CSV, Markdown, HTML.

All four print the same lines, made by `lines`.
"""

from collections.abc import Mapping, Sequence
import csv
import html
import io
from typing import Any, NamedTuple

from offmeta.results import summary as summary_lib

HELD_OUT = 'Held-out tasks: return of the last adaptation episode'
FINETUNE = 'Held-out tasks, fine-tuned in each: mean return per episode'
TRAINING = 'Training tasks: return of the last adaptation episode'
PAIRED = 'Paired over seeds'
GROUPS = (HELD_OUT, FINETUNE, TRAINING, PAIRED)
COLUMNS = ('name', 'mean', '95% interval', 'seeds', 'what it is')

_HELD_OUT_ROWS = (
  'random',
  'behaviour',
  'specialists',
  'oracle',
  *(
    f'{phase}_{name}'
    for phase in ('offline', 'online')
    for name in summary_lib.HELD_OUT
  ),
)
_UNADAPTED = 'before adapting (an episode without any context)'
_GIVEN = "offline context (from the task's dataset)"
_RANDOM = 'random context (uniform random actions)'
_DESCRIPTIONS = {
  'random': 'uniform random actions',
  'behaviour': 'behaviour policy, self-collected context',
  'specialists': 'one SAC learner per task, each trained in its own',
  'offline_unadapted': f'offline phase, {_UNADAPTED}',
  'offline_self_context': 'offline phase, self-collected context',
  'offline_given_context': f'offline phase, {_GIVEN}',
  'offline_random_context': f'offline phase, {_RANDOM}',
  'online_unadapted': _UNADAPTED,
  'online_self_context': '',
  'online_given_context': _GIVEN,
  'online_random_context': _RANDOM,
  'oracle': 'true rewards online',
  'finetune_meta': 'the meta-policy, before any step in the task',
  'finetune_start': 'after the offline step on random data of the task',
  'finetune_10k': 'after about 10,000 environment steps',
  'finetune_20k': 'after about 20,000 environment steps',
  'finetune_end': 'at the end',
  'behaviour_data': 'the logged data of training tasks, mean per episode',
  'train_specialists': 'one SAC learner per task: those that made the data',
  'offline_offline_context': 'offline phase only, offline context',
  'train_offline_self_context': 'offline phase only, self-collected context',
  'online_offline_context': 'offline context',
  'train_online_self_context': 'self-collected context',
  'online_minus_offline': 'held-out gain of the online phase',
  'gap_closed': 'share of the gap from offline to oracle closed (1: all)',
  'shift_before': 'training tasks: offline minus self-collected context',
  'shift_after': 'offline minus self-collected context, after the online phase',
  'offline_adaptation': 'gain by adapting, held-out, offline phase',
  'offline_adaptation_given': 'the same, offline context',
  'online_adaptation': 'gain by adapting, held-out, online phase',
  'online_adaptation_given': 'the same, offline context',
}
_ONLINE = (
  'online_unadapted',
  'online_self_context',
  'online_given_context',
  'online_random_context',
  'online_offline_context',
  'train_online_self_context',
  'oracle',
)
# Rows that spell out what their variant is; others only name it.
_SPELLED = ('online_self_context', 'oracle')


class Line(NamedTuple):
  """One line of the table.

  Attributes:
    group: of GROUPS.
    name: row name, '<row>/<variant>' for variants other than the headline.
    mean, low, high: None where not available.
    seeds: number of seeds.
    description: what it is.
    reason: why something is None, '' where nothing is.
  """

  group: str
  name: str
  mean: float | None
  low: float | None
  high: float | None
  seeds: int
  description: str
  reason: str


def lines(summary: Mapping[str, Any]) -> list[Line]:
  """Every line of the table in reading order.

  Args:
    summary: what `summary.summarize` returned, or summary.json.
  """
  result = []
  for name, entry in summary['rows'].items():
    result.append(_line(_group(name), name, entry, summary))
  result.sort(key=lambda line: GROUPS.index(line.group))
  variants = summary.get('variants', {})
  for name, entry in summary['paired'].items():
    result.append(_line(PAIRED, name, entry, summary))
    for variant, results in variants.items():
      special = variant == summary.get('headline_variant') or (
        variant == summary.get('oracle_variant') and name == 'gap_closed'
      )
      if name in results and not special:
        result.append(
          _line(PAIRED, f'{name}/{variant}', results[name], summary)
        )
  return [line for line in result if line.seeds or line.group != PAIRED]


def _group(row: str) -> str:
  """The part of the table that a row belongs to."""
  if row.startswith('finetune_'):
    return FINETUNE
  return HELD_OUT if row.split('/')[0] in _HELD_OUT_ROWS else TRAINING


def text_table(summary: Mapping[str, Any]) -> str:
  """Aligned plain text, for a terminal."""
  entries = lines(summary)
  header, rule, *rows = aligned(
    COLUMNS,
    [_cells(line) for line in entries],
    (False, True, False, True, False),
  )
  output, group = [header, rule], None
  for line, row in zip(entries, rows):
    if line.group != group:
      output += ([''] if group else []) + [line.group]
      group = line.group
    output.append(row)
  note = divergence_note(summary)
  if note:
    output += ['', note]
  return '\n'.join(output) + '\n'


def aligned(
  columns: Sequence[str],
  cells: Sequence[Sequence[str]],
  right: Sequence[bool],
) -> list[str]:
  """A header, a rule and the rows as lines of plain text.

  Args:
    columns: names.
    cells: a row each, as many as there are columns.
    right: which columns are flush right.
  """
  widths = [max(map(len, column)) for column in zip(columns, *cells)]

  def render(row: Sequence[str]) -> str:
    padded = [
      cell.rjust(width) if flush else cell.ljust(width)
      for cell, width, flush in zip(row, widths, right)
    ]
    return '  '.join(padded).rstrip()

  rule = '-' * (sum(widths) + 2 * (len(widths) - 1))
  return [render(columns), rule, *map(render, cells)]


def divergence_note(summary: Mapping[str, Any]) -> str:
  """One sentence on simulations that blew up; empty if none did."""
  counts = summary['diverged']
  if not counts:
    return ''
  places = ', '.join(f'{count} in {place}' for place, count in counts.items())
  return f'Simulated steps that blew up: {places}.'  # places may overlap


def csv_table(summary: Mapping[str, Any]) -> str:
  """Comma-separated, full precision, empty where not available."""
  stream = io.StringIO()
  writer = csv.writer(stream, lineterminator='\n')
  writer.writerow(Line._fields)
  for line in lines(summary):
    writer.writerow(['' if cell is None else cell for cell in line])
  return stream.getvalue()


def markdown_table(summary: Mapping[str, Any]) -> str:
  """GitHub Markdown, one table for each group."""
  output, group = [], None
  for line in lines(summary):
    if line.group != group:
      group = line.group
      output += ([''] if output else []) + [
        f'**{group}**',
        '',
        '| ' + ' | '.join(COLUMNS) + ' |',
        '|---|---:|---|---:|---|',
      ]
    name, *rest = [cell.replace('|', r'\|') for cell in _cells(line)]
    output.append('| ' + ' | '.join([f'`{name}`', *rest]) + ' |')
  return '\n'.join(output) + '\n'


def html_table(summary: Mapping[str, Any]) -> str:
  """One <table> with a heading line for each group."""
  main = 'online' if summary.get('headline_variant') else 'offline'
  output = [
    '<table>',
    '<thead><tr>'
    + ''.join(f'<th>{html.escape(column)}</th>' for column in COLUMNS)
    + '</tr></thead>',
    '<tbody>',
  ]
  group = None
  for line in lines(summary):
    if line.group != group:
      group = line.group
      output.append(
        f'<tr class="group"><th colspan="5">{html.escape(group)}</th></tr>'
      )
    name, mean, interval, seeds, what = map(html.escape, _cells(line))
    mark = ' class="headline"' if line.name == f'{main}_self_context' else ''
    output.append(
      f'<tr{mark}><td><code>{name}</code></td><td class="n">{mean}</td>'
      f'<td class="n">{interval}</td><td class="n">{seeds}</td>'
      f'<td>{what}</td></tr>'
    )
  return '\n'.join(output + ['</tbody>', '</table>'])


def describe(name: str, summary: Mapping[str, Any]) -> str:
  """What a row is, in one line.

  Args:
    name: a key of `rows` or `paired`, or '<key>/<variant>'.
    summary: where variant descriptions are looked up.
  """
  base, _, variant = name.partition('/')
  text = _DESCRIPTIONS.get(base, '')
  if base == 'shift_before' and summary.get('headline_variant'):
    text += ', before the online phase'
  if base in _ONLINE:
    role = 'oracle_variant' if base == 'oracle' else 'headline_variant'
    variant = variant or summary.get(role) or ''
    phase = f'online phase {variant!r}' if variant else 'online phase'
    text = f'{phase}, {text}' if text else phase
  if base in _SPELLED:
    entry = summary.get('variants', {}).get(variant, {})
    detail = entry.get('description', '')
    text += f': {detail}' if detail else ''
  return text


def _line(
  group: str, name: str, entry: Mapping[str, Any], summary: Mapping[str, Any]
) -> Line:
  """One summary entry as a line."""
  return Line(
    group,
    name,
    entry['mean'],
    entry['low'],
    entry['high'],
    entry['seeds'],
    describe(name, summary),
    entry.get('reason') or '',
  )


def _cells(line: Line) -> list[str]:
  """The five printed cells of a line."""
  mean, interval = shown(line.mean, line.low, line.high)
  if interval is None:
    interval = 'n/a (1 seed)' if line.seeds == 1 else 'n/a'
  what = line.description
  if line.reason and line.seeds > 1:
    what += f' ({line.reason})'
  return [line.name, mean, interval, str(line.seeds), what]


def shown(
  mean: float | None, low: float | None, high: float | None
) -> tuple[str, str | None]:
  """A mean and its interval (None without one) with equally many digits."""
  if low is not None and high is not None:
    digits = _digits(low, high)
    interval = f'[{low:.{digits}f}, {high:.{digits}f}]'
  else:
    digits, interval = _digits(mean or 0.0), None
  return 'n/a' if mean is None else f'{mean:.{digits}f}', interval


def _digits(*values: float) -> int:
  """Two decimals, fewer for large values and more for tiny ones."""
  largest = max(abs(value) for value in values)
  return 1 if largest >= 1000 else 4 if 0 < largest < 0.01 else 2


def flat(config: Mapping[str, Any], prefix: str = '') -> list[tuple[str, str]]:
  """Nested groups as (dotted name, value)."""
  rows = []
  for key, value in config.items():
    name = f'{prefix}{key}'
    if isinstance(value, Mapping):
      rows += flat(value, f'{name}.')
    else:
      rows.append((name, str(value)))
  return rows
