"""What a run found in words, from summaries written by hand."""

import pytest

from offmeta.results import findings


def _entry(mean, low=None, high=None, seeds=3):
  return {'mean': mean, 'low': low, 'high': high, 'seeds': seeds}


def _summary(gain, profile='cpu', headline='mine', rows=None):
  name = 'online_minus_offline' if headline else 'offline_adaptation'
  return {
    'rows': rows
    or {
      'oracle': _entry(-7.0, -8.0, -6.0),
      'random': _entry(-21.0, -22.0, -20.0),
      'offline_self_context': _entry(-11.0, -12.0, -10.0),
      'online_self_context': _entry(-8.0, seeds=1),
      'train_online_self_context': _entry(-1.0),
    },
    'paired': {name: gain},
    'profile': profile,
    'headline_variant': headline,
    'oracle_variant': 'true' if headline else None,
    'diverged': {},
  }


@pytest.mark.parametrize(
  'gain, expected',
  [
    (_entry(3.0, 1.0, 5.0), 'raises the return: +3.00 per seed, 95%'),
    (_entry(-3.0, -5.0, -1.0), 'lowers the return: -3.00 per seed'),
    (_entry(3.0, -1.0, 7.0), 'does not clearly change the return: +3.00'),
    (_entry(3.0, seeds=1), 'changes the return by +3.00 (one seed'),
    (_entry(None, seeds=0), 'has not been tested yet'),
  ],
)
def test_the_sentence_follows_the_interval(gain, expected):
  said = findings.sentence(_summary(gain))
  assert expected in said and 'the online phase' in said


def test_without_an_online_phase_it_is_about_adaptation():
  said = findings.sentence(_summary(_entry(3.0, 1.0, 5.0), headline=''))
  assert 'adapting to a self-collected context raises' in said


def test_a_smoke_run_has_no_finding():
  summary = _summary(_entry(3.0, 1.0, 5.0), profile='smoke')
  assert findings.sentence(summary) == findings.SMOKE
  assert 'raises' not in findings.text(summary)


def test_trained_online_only_there_is_nothing_before_it():
  rows = {'online_self_context': _entry(-8.0)}
  summary = _summary(_entry(None, seeds=0), rows=rows)
  assert not findings.sentence(summary)


def test_rows_in_reading_order_with_words():
  found = findings.rows(_summary(_entry(3.0, 1.0, 5.0)))
  assert [row.name for row in found] == [
    'random',
    'offline_self_context',
    'online_self_context',
    'oracle',
  ]
  assert found[0].words == 'uniform random actions'
  assert (found[0].mean, found[0].interval) == ('-21.00', '[-22.00, -20.00]')
  assert found[2].interval == '' and "'mine'" in found[2].words
  lines = findings.text(_summary(_entry(3.0, 1.0, 5.0))).splitlines()
  assert lines[-1].startswith('On held-out tasks') and len(lines) == 8


def test_a_terminal_says_what_blew_up():
  summary = _summary(_entry(3.0, 1.0, 5.0))
  assert 'blew up' not in findings.text(summary)
  summary['diverged'] = {'online/mine': 3}
  assert findings.text(summary).endswith('blew up: 3 in online/mine.\n')
