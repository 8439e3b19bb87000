"""Runs of several algorithms on one family and one dataset, side by side.

Reads the folder that `experiments.compare` fills: a run in each subfolder, the
data of all of them in `data`. Scores are returns on held-out tasks; the unit
of replication is the seed, as in the report of one run.
"""

from collections.abc import Iterable, Mapping, Sequence
import csv
import io
import json
import pathlib
from typing import Any, NamedTuple

import numpy as np

from offmeta.results import (
  charts,
  drawing,
  findings,
  records,
  report,
  statistics,
  summary as summary_lib,
  tables,
)

DATA = 'data'  # subfolder with the run that made the datasets
# Key of a row's scores -> column.
COLUMNS = {
  'unadapted': 'before adapting',
  'self_context': 'self-collected',
  'given_context': 'offline context',
  'random_context': 'random context',
  'finetuned': 'fine-tuned',
}
# What is compared with 'unadapted', within a seed.
ADAPTED = ('self_context', 'given_context', 'random_context')
_REFERENCES = ('random', 'behaviour', 'specialists', 'behaviour_data')
_LEGEND = (
  'Return of the last episode in held-out tasks, mean [95% interval] over'
  ' seeds. Before adapting:\nan episode without any context. Self-collected: a'
  ' context that the learner collected itself. Offline\ncontext: one from the'
  " task's dataset. Random context: one of uniform random actions. Fine-tuned:"
  ' mean of\nepisodes at the end of online fine-tuning. Training: offline and'
  ' online phase.'
)

_GAINS = 'Gain by adapting: minus before adapting, within a seed'


class Row(NamedTuple):
  """One line of the table.

  Attributes:
    name: of the run, with '(online VARIANT)' after an online phase.
    run: the run's name; it has several rows if it has online variants.
    scores: by the keys of COLUMNS, as JSON-ready intervals with the scores of
      all seeds; what the run does not have is absent.
    gains: the scores in ADAPTED minus that before adapting, in the same form.
    training_s: wall time of the offline phase, and of the online one if any.
    description: of the variant, or of the run.
  """

  name: str
  run: str
  scores: Mapping[str, Mapping[str, Any]]
  gains: Mapping[str, Mapping[str, Any]]
  training_s: float | None
  description: str


def folder_name(run: str) -> str:
  """Subfolder of a run; an ablation's name holds a slash."""
  return run.replace('/', '+')


def run_name(folder: str) -> str:
  """The run of a subfolder."""
  return folder.replace('+', '/', 1)


def build(
  workdir: str | pathlib.Path,
  described: Mapping[str, str] = {},
  command: str = '',
  failed: Mapping[str, str] = {},
) -> dict[str, Any]:
  """Writes WORKDIR/comparison/ and returns the contents of its JSON file.

  Args:
    workdir: that `experiments.compare` was given.
    described: run -> what it is, '' if the name says it. These come first, in
      this order; others that are there follow by name.
    command: that made them, for the record.
    failed: run -> message.

  Raises:
    ValueError: there is no finished run, or a file of one is damaged.
    ImportError: matplotlib is missing.
  """
  workdir = pathlib.Path(workdir)
  runs = _load(workdir, tuple(described))
  first = next(iter(runs.values()))
  result = {
    'family': first.run.family,
    'profile': first.run.profile,
    'num_seeds': first.run.num_seeds,
    'command': command,
    'versions': dict(first.run.versions),
    'machine': dict(first.run.machine),
    'rows': [
      row._asdict()
      for name, record in runs.items()
      for row in _rows(name, record, described.get(name, ''))
    ],
    'references': _references(workdir, runs.values()),
    'runs': {name: _origin(record) for name, record in runs.items()},
    'failed': dict(failed),
    'unfinished': sorted(
      {run_name(path.parent.name) for path in workdir.glob('*/run.json')}
      - {*runs, *failed, DATA}
    ),
    'notes': _notes(runs),
  }
  folder = workdir / 'comparison'
  folder.mkdir(parents=True, exist_ok=True)
  text = json.dumps(result, indent=1, allow_nan=False) + '\n'
  for name, content in (
    ('comparison.json', text),
    ('table.txt', text_table(result)),
    ('table.md', markdown_table(result)),
    ('table.csv', csv_table(result)),
  ):
    report.write_atomic(folder / name, content.encode())
  chart = charts.comparison_chart(result['rows'], COLUMNS, result['references'])
  report.write_atomic(folder / 'comparison.png', drawing.to_png(chart))
  return result


def _load(
  workdir: pathlib.Path, order: Sequence[str]
) -> dict[str, records.Record]:
  """Run -> record, of all that have been tested."""
  found = {
    run_name(path.parent.parent.name): path.parent.parent
    for point in ('offline', 'online-*')
    for path in workdir.glob(f'*/evaluations/{point}.npz')
  }
  if not found:
    raise ValueError(f'{workdir}: no run has been tested yet')
  names = [name for name in order if name in found]
  names += sorted(set(found) - set(names))
  return {name: records.load(found[name]) for name in names}


def _rows(name: str, record: records.Record, description: str) -> list[Row]:
  """The offline phase, if any, then every online variant that was tested."""
  run, timing, rows = record.run, record.timing, []
  for variant in ('', *run.variants):
    loop = f'online/{variant}' if variant else 'offline'
    scores = summary_lib.held_out_scores(record, loop.replace('/', '-'))
    if not scores:
      continue
    tuned = summary_lib.finetune_scores(record)
    if not variant and 'finetune_end' in tuned:
      scores['finetuned'] = tuned['finetune_end']
    gains = {
      key: scores[key] - scores['unadapted']
      for key in ADAPTED
      if key in scores and 'unadapted' in scores
    }
    parts = ('offline', loop) if 'offline' in record.evaluations else (loop,)
    spent = [timing.get(part) for part in dict.fromkeys(parts)]
    rows.append(
      Row(
        f'{name} (online {variant})' if variant else name,
        name,
        _intervals(scores),
        _intervals(gains),
        None if None in spent else sum(spent),
        run.variants[variant] if variant else description,
      )
    )
  return rows


def _intervals(scores: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
  """JSON-ready intervals of scores [S], and the scores."""
  return {
    key: {**statistics.t_interval(values).as_dict(), 'scores': values.tolist()}
    for key, values in scores.items()
  }


def _references(
  workdir: pathlib.Path, runs: Iterable[records.Record]
) -> dict[str, dict[str, Any]]:
  """What returns are to be compared with: name -> interval, description."""
  path, found = workdir / DATA, {}
  made = [records.load(path, tested=False)] if path.exists() else []
  for record in (*runs, *made):
    for name, values in summary_lib.seed_scores(record).items():
      if name in _REFERENCES:
        found.setdefault(name, values)
  return {
    name: {
      **statistics.t_interval(found[name]).as_dict(),
      'description': tables.describe(name, {}),
    }
    for name in _REFERENCES
    if name in found
  }


def _origin(record: records.Record) -> dict[str, Any]:
  """How a run was made."""
  run = record.run
  return {
    'algorithm': run.algorithm,
    'config_hash': run.config_hash,
    'command': run.command,
    'profile': run.profile,
    'num_seeds': run.num_seeds,
    'versions': dict(run.versions),
    'machine': dict(run.machine),
    'timing_s': dict(record.timing),
  }


def _notes(runs: Mapping[str, records.Record]) -> list[str]:
  """Settings in which runs differ from the first, though they should not."""
  (first, reference), *others = (
    (name, _shared(record.run)) for name, record in runs.items()
  )
  notes = []
  for name, shared in others:
    for key in sorted(reference.keys() | shared.keys()):
      old, new = reference.get(key), shared.get(key)
      if old != new:
        notes.append(
          f'{name}: {key} is {new or "not set"}, but'
          f' {old or "not set"} in {first}'
        )
  return notes


def _shared(run: records.Run) -> dict[str, str]:
  """Dotted key -> value of what all runs should have in common."""
  keep = ('family', 'evaluation', 'seed', 'first_seed')
  collect = run.config.get('collect', {})
  return dict(
    tables.flat(
      {
        'profile': run.profile,
        'num_seeds': run.num_seeds,
        **{key: run.config[key] for key in keep if key in run.config},
        'collect': {
          key: collect[key]
          for key in ('dataset', 'test_dataset')
          if key in collect
        },
      }
    )
  )


def text_table(result: Mapping[str, Any]) -> str:
  """Aligned plain text, for a terminal."""
  columns, cells = _cells(result)
  header, rule, *rows = tables.aligned(
    columns, cells, (False, *[True] * (len(columns) - 1))
  )
  output = [_title(result), _LEGEND, '', header, rule, *rows, '']
  columns, cells = _gain_cells(result)
  if cells:
    output += [
      _GAINS,
      '',
      *tables.aligned(columns, cells, (False, *[True] * (len(columns) - 1))),
      '',
    ]
  references = [
    (name, _shown(entry), entry['description'])
    for name, entry in result['references'].items()
  ]
  if references:
    output += tables.aligned(
      ('reference', 'return', ''), references, (False, True, False)
    ) + ['']
  return '\n'.join(output + _remarks(result)).rstrip() + '\n'


def markdown_table(result: Mapping[str, Any]) -> str:
  """GitHub Markdown."""

  def table(columns, cells):
    line = lambda row: '| ' + ' | '.join(row) + ' |'
    rule = '|---|' + '---:|' * (len(columns) - 1)
    return [
      line(columns),
      rule,
      *(line([f'`{name}`', *rest]) for name, *rest in cells),
      '',
    ]

  output = [f'**{_title(result)}**', '', _LEGEND, '', *table(*_cells(result))]
  columns, cells = _gain_cells(result)
  if cells:
    output += [_GAINS, '', *table(columns, cells)]
  if result['references']:
    output += table(
      ('reference', 'return', 'what it is'),
      [
        (name, _shown(entry), entry['description'])
        for name, entry in result['references'].items()
      ],
    )
  output += [f'* {line}' for line in _remarks(result)]
  return '\n'.join(output).rstrip() + '\n'


def csv_table(result: Mapping[str, Any]) -> str:
  """One line for each row and column: full precision, empty where missing."""
  stream = io.StringIO()
  writer = csv.writer(stream, lineterminator='\n')
  writer.writerow(
    ('name', 'column', 'mean', 'low', 'high', 'seeds', 'training_s')
  )
  empty = lambda value: '' if value is None else value

  def write(name, column, entry, seconds):
    writer.writerow(
      (
        name,
        column,
        entry['mean'],
        empty(entry['low']),
        empty(entry['high']),
        entry['seeds'],
        empty(seconds),
      )
    )

  for row in result['rows']:
    for key, entry in row['scores'].items():
      write(row['name'], key, entry, row['training_s'])
    for key, entry in row['gains'].items():
      write(row['name'], f'{key}_gain', entry, row['training_s'])
  for name, entry in result['references'].items():
    write(name, 'reference', entry, None)
  return stream.getvalue()


def _title(result: Mapping[str, Any]) -> str:
  number = result['num_seeds']
  return (
    f'{result["family"]}, profile {result["profile"]}, {number}'
    f' seed{"s" if number > 1 else ""}'
  )


def _cells(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
  """Header and rows; columns that no run has are left out."""
  keys = [
    key
    for key in COLUMNS
    if any(key in row['scores'] for row in result['rows'])
  ]
  cells = []
  for row in result['rows']:
    seconds = row['training_s']
    cells.append(
      [
        row['name'],
        *(
          _shown(row['scores'][key]) if key in row['scores'] else '-'
          for key in keys
        ),
        '-' if seconds is None else f'{seconds:.0f}',
      ]
    )
  return ['algorithm', *(COLUMNS[key] for key in keys), 'training, s'], cells


def _gain_cells(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
  """Header and rows of the gains; no rows if no run has any."""
  keys = [
    key for key in ADAPTED if any(key in row['gains'] for row in result['rows'])
  ]
  cells = [
    [
      row['name'],
      *(
        _shown(row['gains'][key]) if key in row['gains'] else '-'
        for key in keys
      ),
    ]
    for row in result['rows']
    if row['gains']
  ]
  return ['algorithm', *(COLUMNS[key] for key in keys)], cells


def _shown(entry: Mapping[str, Any]) -> str:
  """'-9.16 [-9.45, -8.87]', without the interval for one seed."""
  mean, interval = tables.shown(entry['mean'], entry['low'], entry['high'])
  return f'{mean} {interval}' if interval else mean


def _remarks(result: Mapping[str, Any]) -> list[str]:
  """What the profile means, what variants are, what differs, what failed."""
  lines = [findings.SMOKE] if result['profile'] == 'smoke' else []
  lines += [
    f'{row["name"]}: {row["description"]}'
    for row in result['rows']
    if row['description']
  ]
  lines += [f'Not the same protocol: {note}' for note in result['notes']]
  lines += [
    f'Failed: {name}: {message}' for name, message in result['failed'].items()
  ]
  return lines + [f'Not finished: {name}' for name in result['unfinished']]
