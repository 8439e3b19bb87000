"""The table in its four forms, from a summary written by hand."""

import csv
import io

import pytest

from offmeta.results import tables


def _entry(mean, low=None, high=None, seeds=3, **more):
  return {'mean': mean, 'low': low, 'high': high, 'seeds': seeds, **more}


@pytest.fixture(name='summary')
def _summary():
  return {
    'rows': {
      'random': _entry(-21.0, -22.0, -20.0),
      'behaviour': _entry(-11.234, seeds=1, reason='one seed'),
      'offline_offline_context': _entry(-1234.56, -1300.0, -1200.0),
      'online_self_context': _entry(0.5, 0.4, 0.6),
      'online_self_context/other': _entry(0.1, 0.0, 0.2),
    },
    'paired': {
      'online_minus_offline': _entry(6.0, 5.0, 7.0),
      'gap_closed': _entry(None, reason='no gap'),
      'shift_before': _entry(None, seeds=0, reason='no row x'),
    },
    'variants': {
      'mine': {'description': 'the <new> | recipe'},
      'other': {
        'description': 'the old recipe',
        'online_minus_offline': _entry(0.004, -0.001, 0.009),
      },
    },
    'headline_variant': 'mine',
    'oracle_variant': None,
    'diagnostics': {},
    'diverged': {},
  }


def test_text_table(summary):
  text = tables.text_table(summary)
  rows = {line.split()[0]: line for line in text.splitlines() if line}
  assert '-21.00  [-22.00, -20.00]' in rows['random']
  assert '-11.23  n/a (1 seed)' in rows['behaviour']
  assert '[-1300.0, -1200.0]' in rows['offline_offline_context']
  assert (
    "online phase 'mine': the <new> | recipe" in rows['online_self_context']
  )
  assert 'the old recipe' in rows['online_self_context/other']
  assert '[-0.0010, 0.0090]' in rows['online_minus_offline/other']
  assert 'n/a' in rows['gap_closed'] and '(no gap)' in rows['gap_closed']
  assert 'shift_before' not in rows  # nothing to compute it from


def test_text_columns_are_aligned(summary):
  lines = tables.text_table(summary).splitlines()
  start = lines[0].index('95% interval')
  data = [line for line in lines[2:] if '  ' in line]
  assert len(data) == 8
  assert all(line[start] in '[n' and line[start - 1] == ' ' for line in data)


def test_groups_come_in_order(summary):
  text = tables.text_table(summary)
  places = [
    text.index(group)
    for group in (tables.HELD_OUT, tables.TRAINING, tables.PAIRED)
  ]
  assert places == sorted(places)
  assert text.index('online_self_context/other') < places[1]


def test_csv_round_trip(summary):
  rows = list(csv.DictReader(io.StringIO(tables.csv_table(summary))))
  by_name = {row['name']: row for row in rows}
  assert float(by_name['behaviour']['mean']) == -11.234
  assert by_name['behaviour']['low'] == ''
  assert by_name['gap_closed']['mean'] == ''
  assert by_name['gap_closed']['reason'] == 'no gap'


def test_markdown_cells(summary):
  text = tables.markdown_table(summary)
  rows = [line for line in text.splitlines() if line.startswith('| `')]
  assert len(rows) == 8
  assert all(row.replace(r'\|', '').count('|') == 6 for row in rows)


def test_html_is_escaped(summary):
  text = tables.html_table(summary)
  assert 'the &lt;new&gt; | recipe' in text and '<new>' not in text
  assert text.count('<tr') == text.count('</tr>') == 12


def test_steps_that_blew_up_are_told(summary):
  assert 'blew up' not in tables.text_table(summary)
  summary['diverged'] = {'dataset': 3, 'online/mine': 1}
  assert tables.text_table(summary).endswith(
    '\nSimulated steps that blew up: 3 in dataset, 1 in online/mine.\n'
  )
