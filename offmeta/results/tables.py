"""The summary as a table: text, CSV, Markdown, HTML.

All four print the same lines, made by `lines`.
"""

from collections.abc import Mapping, Sequence
import csv
import html
import io
from typing import Any, NamedTuple

HELD_OUT = ('Held-out tasks, self-collected context: return of the last '
            'adaptation episode')
TRAINING = 'Training tasks: return of the last adaptation episode'
PAIRED = 'Paired over seeds'
COLUMNS = ('name', 'mean', '95% interval', 'seeds', 'what it is')

_HELD_OUT_ROWS = ('random', 'behaviour', 'offline_self_context',
                  'online_self_context', 'oracle')
_DESCRIPTIONS = {
    'random': 'uniform random actions',
    'behaviour': 'the policy that collected the data, adapting on its own',
    'offline_self_context': 'offline stage only',
    'online_self_context': '',
    'oracle': 'true rewards online',
    'behaviour_data': 'the logged data, mean return per episode',
    'offline_offline_context': 'offline stage only, context from the data',
    'train_offline_self_context': 'offline stage only, own context',
    'online_offline_context': 'context from the data',
    'train_online_self_context': 'own context',
    'online_minus_offline': 'held-out gain of the online phase',
    'gap_closed': 'share of the gap from offline to oracle closed (1: all)',
    'shift_before': 'context from the data minus own, before the online phase',
    'shift_after': 'context from the data minus own, after the online phase',
}
_ONLINE = ('online_self_context', 'online_offline_context',
           'train_online_self_context', 'oracle')
# Rows that spell out what their variant is; others only name it.
_SPELLED = ('online_self_context', 'oracle')


class Line(NamedTuple):
  """One line of the table.

  Attributes:
    group: HELD_OUT, TRAINING or PAIRED.
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
    held_out = name.split('/')[0] in _HELD_OUT_ROWS
    group = HELD_OUT if held_out else TRAINING
    result.append(_line(group, name, entry, summary))
  result.sort(key=lambda line: line.group != HELD_OUT)
  variants = summary.get('variants', {})
  for name, entry in summary['paired'].items():
    result.append(_line(PAIRED, name, entry, summary))
    for variant, results in variants.items():
      special = variant == summary.get('headline_variant') or (
          variant == summary.get('oracle_variant') and name == 'gap_closed')
      if name in results and not special:
        result.append(
            _line(PAIRED, f'{name}/{variant}', results[name], summary))
  return [line for line in result if line.seeds or line.group != PAIRED]


def text_table(summary: Mapping[str, Any]) -> str:
  """Aligned plain text, for a terminal."""
  cells, groups = [], []
  for line in lines(summary):
    cells.append(_cells(line))
    groups.append(line.group)
  widths = [max(len(row[i]) for row in [COLUMNS, *cells]) for i in range(5)]
  right = (False, True, False, True, False)

  def render(row: Sequence[str]) -> str:
    padded = [cell.rjust(width) if flush else cell.ljust(width)
              for cell, width, flush in zip(row, widths, right)]
    return '  '.join(padded).rstrip()

  rule = '-' * len(render([*('x' * width for width in widths)]))
  output = [render(COLUMNS), rule]
  for index, row in enumerate(cells):
    if index == 0 or groups[index] != groups[index - 1]:
      output += ([''] if index else []) + [groups[index]]
    output.append(render(row))
  note = divergence_note(summary)
  if note:
    output += ['', note]
  return '\n'.join(output) + '\n'


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
          f'**{group}**', '', '| ' + ' | '.join(COLUMNS) + ' |',
          '|---|---:|---|---:|---|']
    name, *rest = [cell.replace('|', r'\|') for cell in _cells(line)]
    output.append('| ' + ' | '.join([f'`{name}`', *rest]) + ' |')
  return '\n'.join(output) + '\n'


def html_table(summary: Mapping[str, Any]) -> str:
  """One <table> with a heading line for each group."""
  output = ['<table>', '<thead><tr>' + ''.join(
      f'<th>{html.escape(column)}</th>' for column in COLUMNS)
            + '</tr></thead>', '<tbody>']
  group = None
  for line in lines(summary):
    if line.group != group:
      group = line.group
      output.append(f'<tr class="group"><th colspan="5">{html.escape(group)}'
                    '</th></tr>')
    name, mean, interval, seeds, what = map(html.escape, _cells(line))
    mark = ' class="headline"' if line.name == 'online_self_context' else ''
    output.append(
        f'<tr{mark}><td><code>{name}</code></td><td class="n">{mean}</td>'
        f'<td class="n">{interval}</td><td class="n">{seeds}</td>'
        f'<td>{what}</td></tr>')
  return '\n'.join(output + ['</tbody>', '</table>'])


def describe(name: str, summary: Mapping[str, Any]) -> str:
  """What a row is, in one line.

  Args:
    name: a key of `rows` or `paired`, or '<key>/<variant>'.
    summary: where variant descriptions are looked up.
  """
  base, _, variant = name.partition('/')
  text = _DESCRIPTIONS.get(base, '')
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
  return Line(group, name, entry['mean'], entry['low'], entry['high'],
              entry['seeds'], describe(name, summary),
              entry.get('reason') or '')


def _cells(line: Line) -> list[str]:
  """The five printed cells of a line."""
  if line.low is not None and line.high is not None:
    digits = _digits(line.low, line.high)
    interval = f'[{line.low:.{digits}f}, {line.high:.{digits}f}]'
  else:
    digits = _digits(line.mean or 0.0)
    interval = 'n/a (1 seed)' if line.seeds == 1 else 'n/a'
  mean = 'n/a' if line.mean is None else f'{line.mean:.{digits}f}'
  what = line.description
  if line.reason and line.seeds > 1:
    what += f' ({line.reason})'
  return [line.name, mean, interval, str(line.seeds), what]


def _digits(*values: float) -> int:
  """Two decimals, fewer for large values and more for tiny ones."""
  largest = max(abs(value) for value in values)
  return 1 if largest >= 1000 else 4 if 0 < largest < 0.01 else 2
