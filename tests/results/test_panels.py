"""Panels of all metrics, and of what an algorithm says of itself."""

import json

import numpy as np
import pytest

from offmeta import results
from offmeta.results import drawing, panels, plots, records, report


def _add(workdir, point, **arrays):
  """Adds what an algorithm says of itself to an evaluation."""
  path = workdir / 'evaluations' / f'{point}.npz'
  named = {f'diagnose/{name}': array for name, array in arrays.items()}
  np.savez(path, **dict(np.load(path)) | named)


def _panels(figure):
  """Title -> axis of those that hold something."""
  return {axis.get_title('left'): axis for axis in figure.axes if axis.axison}


@pytest.fixture(name='two', scope='module')
def _two(tmp_path_factory, data):
  """A run of two seeds and one variant, which says much of itself."""
  workdir = data.make_workdir(
    tmp_path_factory.mktemp('panels') / 'run', seeds=2, variants=('ours',)
  )
  for point, gain in (('offline', 0.0), ('online-ours', 1.0)):
    _add(
      workdir,
      point,
      ope_return=np.array([-3.0, -1.0]) + gain,
      error_by_horizon=np.array([[1.0, 2.0, 4.0], [3.0, 4.0, 8.0]]) + gain,
      horizon=np.array([[1, 10, 100]] * 2),
      disagreement=np.ones((2, 5)) + gain,
      y_by_x=np.arange(12.0).reshape(2, 3, 2) + gain,
      error_by_speed_by_angle=np.stack([np.eye(4)[:3], 3 * np.eye(4)[:3]])
      + gain,
      speed=np.array([[10.0, 20.0, 30.0]] * 2),
    )
  return workdir


@pytest.fixture(name='drawn', scope='module')
def _drawn(two):
  return _panels(panels.diagnoses(records.load(two)))


def test_every_diagnosis_has_a_panel(drawn):
  """By stage for maps; what only says where others are has none."""
  assert [title for title in drawn if title] == [
    'ope return',
    'error',
    'disagreement',
    'y',
    'error, offline',
    'error, ours',
  ]


def test_a_number_is_a_dot_with_its_interval(drawn):
  axis = drawn['ope return']
  assert [label.get_text() for label in axis.get_yticklabels()] == [
    'ours',
    'offline',
  ]
  lines = {tuple(line.get_xdata()) for line in axis.lines}
  assert {(-2.0,), (-1.0,)} < lines
  # Standard error 1, t(0.975, 1) = 12.7062.
  (bar,) = [x for x in lines if len(x) == 2 and x[0] < -14]
  np.testing.assert_allclose(bar, [-2 - 12.7062, -2 + 12.7062], atol=1e-4)
  assert {text.get_text() for text in axis.texts} == {'−2', '−1'}


def test_a_vector_is_a_line_against_its_places(drawn):
  axis = drawn['error']
  assert axis.get_xlabel() == 'horizon'
  assert axis.get_xscale() == 'log'
  assert list(axis.get_xticks()) == [1, 10, 100]
  lines = {line.get_label(): line for line in axis.lines}
  for label, gain in (('offline', 0), ('ours', 1)):
    np.testing.assert_array_equal(lines[label].get_xdata(), [1, 10, 100])
    np.testing.assert_allclose(
      lines[label].get_ydata(), np.array([2.0, 3.0, 6.0]) + gain
    )
  assert lines['offline'].get_color() == drawing.OFFLINE
  assert lines['ours'].get_color() == drawing.HEADLINE
  assert len(axis.collections) == 2  # bands
  plain = drawn['disagreement']
  np.testing.assert_array_equal(plain.lines[0].get_xdata(), np.arange(5))
  assert plain.get_xscale() == 'linear'


def test_pairs_are_points_and_other_matrices_maps(drawn):
  axis = drawn['y']
  assert (axis.get_xlabel(), axis.get_ylabel()) == ('x', 'y')
  np.testing.assert_array_equal(
    axis.collections[0].get_offsets(), np.arange(12.0).reshape(6, 2)
  )
  axis = drawn['error, offline']
  (mesh,) = axis.collections
  np.testing.assert_allclose(mesh.get_array(), 2 * np.eye(4)[:3])
  assert (axis.get_xlabel(), axis.get_ylabel()) == ('angle', 'speed')
  low, high = axis.get_ylim()
  assert low < 10 < 30 < high < 40


def test_numbers_are_in_the_summary_and_on_the_page(two):
  summary = report.build(two)
  entry = summary['diagnostics']['online-ours']['ope_return']
  assert (entry['mean'], entry['seeds']) == (-1.0, 2)
  assert 'error_by_horizon' not in summary['diagnostics']['offline']
  assert (two / 'report' / 'diagnoses.png').exists()
  page = (two / 'report' / 'index.html').read_text()
  assert 'offline: ope return' in page and 'What the learner knows' in page


def test_a_map_with_two_columns(workdir):
  _add(workdir, 'offline', error_by_leg_by_side=np.ones((5, 3, 2)))
  found = _panels(panels.diagnoses(records.load(workdir)))
  assert found['error, offline'].get_xlabel() == 'side'


def test_gaps_and_one_seed(make_workdir):
  """NaN where a learner cannot say: the others are drawn, no interval."""
  workdir = make_workdir(seeds=1, variants=())
  values = np.array([[1.0, np.nan, 3.0]])
  _add(
    workdir, 'offline', line=values, lost=np.array([np.nan]), one=values[:, 0]
  )
  found = _panels(panels.diagnoses(records.load(workdir)))
  np.testing.assert_array_equal(found['line'].lines[0].get_ydata(), values[0])
  assert len(found['one'].lines) == 1
  summary = results.summarize(records.load(workdir))
  assert summary['diagnostics']['offline']['lost']['reason'] == 'not finite'


@pytest.mark.parametrize(
  'array, message',
  [
    (np.ones((3, 4)), r'3 seeds, but run.json has 2'),
    (np.ones((2, 1, 1, 1)), r'must be numbers of shape \[S, a, b\]'),
    (np.array(1.0), r'diagnose/it must be numbers of shape \[S\]'),
    (np.array(['a', 'b']), 'diagnose/it must be numbers'),
  ],
)
def test_what_cannot_be_read(make_workdir, array, message):
  workdir = make_workdir(seeds=2, variants=())
  _add(workdir, 'offline', it=array)
  with pytest.raises(ValueError, match=message):
    records.load(workdir)


def _log(folder, rows):
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'metrics.jsonl').write_text(
    ''.join(
      json.dumps({'step': step, 'values': values}) + '\n'
      for step, values in rows
    )
  )


def test_every_metric_of_every_loop_is_drawn(make_workdir):
  workdir = make_workdir(seeds=2, variants=('ours',))
  rows = [
    (
      10 * i,
      {
        'lompo/model/dynamics/loss': [i, i + 2],
        'lompo/model/dynamics/variance': [i, i],
        'lompo/model/reward/loss': i,
        'count': [0, 1],
      },
    )
    for i in range(1, 40)
  ]
  _log(workdir / 'offline' / 'model', rows)
  _log(workdir / 'held_out' / 'model', rows[:5])
  record = records.load(workdir)
  figures = panels.logged(record)
  # Three names begin with lompo/model; those of `eval` are too few to split.
  assert set(figures) == {'eval', 'smac', 'lompo/model', 'other'}
  found = {
    f'{group}/{title}': axis
    for group, figure in figures.items()
    for title, axis in _panels(figure).items()
  }
  names = {name for metrics in record.metrics.values() for name in metrics}
  assert set(found) == {
    name if '/' in name else f'other/{name}' for name in names
  }
  axis = found['lompo/model/dynamics/loss']
  lines = {line.get_label(): line for line in axis.lines}
  assert set(lines) == {'offline/model', 'held_out/model'}
  np.testing.assert_array_equal(
    lines['offline/model'].get_xdata(), 10 * np.arange(1, 40)
  )
  np.testing.assert_allclose(
    lines['offline/model'].get_ydata(), np.arange(1, 40) + 1
  )
  assert {line.get_label() for line in found['smac/critic/loss'].lines} == {
    'offline',
    'online/ours',
  }
  returns = found['eval/test/self_context/final_return'].lines
  assert {line.get_color() for line in returns} == {
    drawing.OFFLINE,
    drawing.HEADLINE,
  }


def test_an_offline_loop_before_the_last_is_shown(make_workdir):
  workdir = make_workdir(seeds=2, variants=())
  _log(workdir / 'offline' / 'model', [(1, {'a/b/c/loss': [1, 2]})])
  scores = dict(np.load(workdir / 'evaluations' / 'offline.npz'))
  np.savez(workdir / 'evaluations' / 'offline-model.npz', **scores)
  _add(workdir, 'offline-model', error=np.array([1.0, 2.0]))
  record = records.load(workdir)
  labels = _panels(panels.diagnoses(record))['error'].get_yticklabels()
  assert [label.get_text() for label in labels] == ['offline-model']


def test_an_outlier_does_not_flatten_the_rest(make_workdir):
  workdir = make_workdir(seeds=2, variants=())
  values = np.concatenate([[1e6], np.linspace(2, 1, 60)])
  _log(
    workdir / 'offline',
    [(i, {'a/b/loss': [x, x], 'a/b/q': [i, i]}) for i, x in enumerate(values)],
  )
  found = _panels(panels.logged(records.load(workdir))['a'])
  low, high = found['b/loss'].get_ylim()
  assert low < 1 and 2 < high < 10
  low, high = found['b/q'].get_ylim()
  assert low < 0 and 60 < high


def test_long_logs_are_averaged(make_workdir):
  workdir = make_workdir(seeds=2, variants=())
  _log(
    workdir / 'offline',
    [(i, {'a/b/c/x': [i % 2, 3 + i % 2], 'a/b/c/y': i}) for i in range(600)],
  )
  found = _panels(panels.logged(records.load(workdir))['a'])
  (line,) = found['b/c/x'].lines
  np.testing.assert_allclose(line.get_xdata(), 1.5 + 4 * np.arange(150))
  np.testing.assert_allclose(line.get_ydata(), 2.0)
  (line,) = found['b/c/y'].lines
  np.testing.assert_allclose(line.get_ydata(), 1.5 + 4 * np.arange(150))


def test_metrics_are_folded_on_the_page_and_weigh_little(
  make_workdir, monkeypatch
):
  monkeypatch.setattr(plots, 'draw_all', lambda record, summary: {})
  workdir = make_workdir(seeds=2, variants=('ours',))
  rng = np.random.default_rng(0)
  rows = [
    (i, {f'a/b/part/{n}': list(rng.normal(size=2)) for n in range(30)})
    for i in range(60)
  ]
  _log(workdir / 'offline', rows)
  report.build(workdir)
  page = (workdir / 'report' / 'index.html').read_text()
  assert '<details><summary><code>a/b</code></summary><img' in page
  assert '<details open' not in page
  # Noise in 30 panels: what compresses worst.
  assert (workdir / 'report' / 'metrics-a-b.png').stat().st_size < 150_000
