"""What a run found, in one sentence and a few rows, for people."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from offmeta.results import tables

SMOKE = (
  "The profile 'smoke' only shows that everything runs. It learns nothing, and"
  ' its numbers mean nothing.'
)


class Row(NamedTuple):
  """One score on held-out tasks.

  Attributes:
    name: key of `rows` in summary.json.
    words: what it is.
    mean: printed mean over seeds.
    interval: printed 95% interval; '' without one.
  """

  name: str
  words: str
  mean: str
  interval: str


def sentence(summary: Mapping[str, Any]) -> str:
  """The main comparison in the words of its interval; '' if there is none.

  A smoke run has no finding, and says so.

  Args:
    summary: contents of summary.json.
  """
  if summary.get('profile') == 'smoke':
    return SMOKE
  if summary['headline_variant']:
    name, what = 'online_minus_offline', 'the online phase'
  else:
    name, what = 'offline_adaptation', 'adapting to a self-collected context'
  entry, rows = summary['paired'][name], summary['rows']
  if 'offline_self_context' not in rows and 'online_self_context' in rows:
    return ''  # trained online only: there is nothing before it
  if entry['mean'] is None:
    return f'What {what} changes has not been tested yet.'
  mean, interval = tables.shown(entry['mean'], entry['low'], entry['high'])
  mean = mean if mean.startswith('-') else f'+{mean}'
  if interval is None:
    return (
      f'On held-out tasks {what} changes the return by {mean} (one seed, no'
      ' interval).'
    )
  claim = 'does not clearly change'
  if entry['low'] > 0 or entry['high'] < 0:
    claim = 'raises' if entry['low'] > 0 else 'lowers'
  return (
    f'On held-out tasks {what} {claim} the return: {mean} per seed, 95%'
    f' interval {interval}.'
  )


def rows(summary: Mapping[str, Any]) -> list[Row]:
  """Up to six scores that the finding is read against, in a run's order.

  Args:
    summary: contents of summary.json.
  """
  headline = summary['headline_variant']
  oracle = summary.get('oracle_variant')
  named = {
    'random': 'uniform random actions',
    'behaviour': 'behaviour policy, self-collected context',
    'offline_unadapted': 'offline phase, before adapting',
    'offline_self_context': 'offline phase, self-collected context',
    'online_self_context': f'online phase {headline!r}, self-collected context',
    'oracle': f'online phase {oracle!r}, with true rewards',
  }
  found = []
  for name, words in named.items():
    entry = summary['rows'].get(name)
    if entry is not None and entry['mean'] is not None:
      mean, interval = tables.shown(entry['mean'], entry['low'], entry['high'])
      found.append(Row(name, words, mean, interval or ''))
  return found


def text(summary: Mapping[str, Any]) -> str:
  """Rows, sentence and what blew up, for a terminal."""
  entries = rows(summary)
  lines = tables.aligned(
    (
      'return on held-out tasks, last adaptation episode',
      'mean',
      '95% interval',
    ),
    [(row.words, row.mean, row.interval) for row in entries],
    (False, True, False),
  )
  said = filter(None, (sentence(summary), tables.divergence_note(summary)))
  return '\n\n'.join(['\n'.join(lines), *said]) + '\n'
