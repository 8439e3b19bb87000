"""The whole report: numbers, files, pictures and missing inputs."""

import ast
from html import parser
import json
import pathlib
import re
import sys

import numpy as np
import pytest

from offmeta import results
from offmeta.results import (
  charts,
  drawing,
  page,
  panels,
  plots,
  records,
  report,
)

PICTURES = {
  'training',
  'rows',
  'episodes',
  'z_space',
  'trajectories',
  'wall_time',
}


def _drawn(workdir):
  """Pictures of a report, without those of all metrics."""
  names = {path.stem for path in (workdir / 'report').glob('*.png')}
  return {name for name in names if not name.startswith('metrics-')}


def _edit(path, remove=(), **changes):
  """Rewrites an .npz without some arrays and with others."""
  arrays = dict(np.load(path)) | changes
  np.savez(path, **{k: v for k, v in arrays.items() if k not in remove})


def _strict(text):
  """Parses JSON, refusing NaN and Infinity."""

  def refuse(name):
    raise AssertionError(f'{name} is not JSON')

  return json.loads(text, parse_constant=refuse)


@pytest.fixture(name='built', scope='module')
def _built(tmp_path_factory, data):
  """A complete run with its report: (workdir, summary)."""
  workdir = data.make_workdir(tmp_path_factory.mktemp('results') / 'run')
  return workdir, report.build(workdir)


@pytest.fixture(name='undrawn')
def _undrawn(monkeypatch):
  """Reports have no pictures: where numbers and words count."""
  monkeypatch.setattr(plots, 'draw_all', lambda record, summary: {})
  monkeypatch.setattr(panels, 'logged', lambda record: {})


def test_rows_hold_the_known_scores(built):
  rows = built[1]['rows']
  expected = {
    'random': -21.0,
    'behaviour': -11.0,
    'offline_self_context': -15.4,
    'online_self_context': -9.16,
    'online_self_context/released': -15.3,
    # A first episode is four fifths random: 0.8 * -21 + 0.2 * final.
    'offline_unadapted': -19.88,
    'online_unadapted': -18.632,
    'offline_given_context': -13.4,
    'offline_random_context': -16.9,
    'online_given_context': -7.16,
    'online_random_context': -10.66,
    'oracle': -8.96,
    'behaviour_data': -13.0,
    'offline_offline_context': -7.5,
    'online_offline_context': -7.5,
    'train_offline_self_context': -14.4,
    'train_online_self_context': -8.16,
    'train_online_self_context/oracle': -7.96,
  }
  for name, mean in expected.items():
    assert rows[name]['mean'] == pytest.approx(mean), name
  assert 'online_self_context/ours' not in rows
  assert 'online_self_context/oracle' not in rows
  assert not [name for name in rows if name.startswith('finetune')]
  assert rows['behaviour']['seeds'] == 1 and rows['behaviour']['low'] is None
  assert all(
    {'mean', 'low', 'high', 'seeds'} <= set(row) for row in rows.values()
  )


def test_paired_results(built):
  paired = built[1]['paired']
  # Differences 6.1, 5.6, 7.2, 5.5, 6.8: mean 6.24, standard deviation
  # 0.743640, error 0.332566, t(0.975, 4) = 2.776445.
  gain = paired['online_minus_offline']
  assert gain['mean'] == pytest.approx(6.24)
  assert gain['low'] == pytest.approx(6.24 - 0.923351, abs=1e-4)
  assert gain['high'] == pytest.approx(6.24 + 0.923351, abs=1e-4)
  assert paired['gap_closed']['mean'] == pytest.approx(6.24 / 6.44)
  gap = paired['gap_closed']
  assert gap['low'] < 6.24 / 6.44 < gap['high']
  assert paired['shift_before']['mean'] == pytest.approx(-7.5 + 14.4)
  assert paired['shift_after']['mean'] == pytest.approx(-7.5 + 8.16)
  assert paired['offline_adaptation']['mean'] == pytest.approx(19.88 - 15.4)
  assert paired['online_adaptation']['mean'] == pytest.approx(18.632 - 9.16)
  assert paired['offline_adaptation_given']['mean'] == pytest.approx(
    19.88 - 13.4
  )
  # Seed by seed 0.8 * final + 16.8; the spread is 0.8 of the returns'.
  spread = lambda entry: entry['high'] - entry['low']
  assert spread(paired['offline_adaptation']) == pytest.approx(
    0.8 * spread(built[1]['rows']['offline_self_context'])
  )
  assert all(entry['seeds'] == 5 for entry in paired.values())


def test_variants_are_listed_with_the_headline(built, data):
  summary = built[1]
  assert set(summary['variants']) == set(data.VARIANTS)
  ours = summary['variants']['ours']
  assert (
    ours['online_minus_offline'] == summary['paired']['online_minus_offline']
  )
  assert ours['self_context'] == summary['rows']['online_self_context']
  released = summary['variants']['released']
  assert released['online_minus_offline']['mean'] == pytest.approx(0.1)
  assert released['shift_after']['mean'] == pytest.approx(-7.5 + 14.3)
  oracle = summary['variants']['oracle']
  assert oracle['row'] == 'oracle'
  assert oracle['gap_closed']['mean'] == pytest.approx(1.0)


def test_summary_fields(built):
  workdir, summary = built
  stored = _strict((workdir / 'report' / 'summary.json').read_text())
  assert stored == summary
  assert summary['command'] == 'python -m experiments.run'
  assert summary['config_hash'] == '3f1c5a9b77d2'
  assert summary['wall_time_s'] == pytest.approx(21.4 + 64 + 4 * 31 + 12.6)
  assert summary['diagnostics']['offline']['kl_offline']['mean'] == 3.5
  robust = summary['robust']['interquartile_mean']
  assert set(robust) == {
    'offline_self_context',
    'online_self_context',
    'oracle',
  }


def test_steps_that_blew_up_are_counted(make_workdir, undrawn):
  workdir = make_workdir(variants=('ours',))
  row = {
    'step': 9000,
    'values': {
      'gather/diverged': [0, 2, 0, 1, 0],
      'eval/diverged': [1, 0, 0, 0, 0],
    },
  }
  with (workdir / 'offline/metrics.jsonl').open('a') as stream:
    stream.write(json.dumps(row) + '\n')
  counts = {
    'collect': {
      'dataset_diverged': np.array([7]),
      'random_diverged': np.array([0, 0, 1, 1, 0]),
      'behaviour_diverged': np.array([0]),
    },
    'offline': {'diverged': np.zeros(5)},
    'online-ours': {'diverged': np.array([0, 0, 0, 0, 3])},
  }
  for point, arrays in counts.items():
    path = workdir / f'evaluations/{point}.npz'
    np.savez(path, **np.load(path), **arrays)
  summary = report.build(workdir)
  assert summary['diverged'] == {
    'dataset': 7,
    'random policy': 2,
    'offline': 4,
    'test of online/ours': 3,
  }
  page = (workdir / 'report/index.html').read_text()
  assert (
    'Simulated steps that blew up: 7 in dataset, 2 in random policy, 4 in'
    ' offline, 3 in test of online/ours.'
  ) in page


def test_files(built):
  names = {path.name for path in (built[0] / 'report').iterdir()}
  assert names == {
    'summary.json',
    'table.txt',
    'table.csv',
    'table.md',
    'index.html',
    *(f'{name}.png' for name in PICTURES),
    'metrics-eval.png',
    'metrics-smac.png',
  }
  for name in PICTURES:
    png = (built[0] / 'report' / f'{name}.png').read_bytes()
    assert png.startswith(b'\x89PNG') and len(png) > 8000
  text = (built[0] / 'report' / 'table.txt').read_text()
  assert text == results.text_table(built[1])


class _Page(parser.HTMLParser):
  """Collects tags, and checks that they are closed in order."""

  def __init__(self):
    super().__init__()
    self.stack, self.tags, self.sources = [], [], []

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.sources += [value for key, value in attrs if key in ('src', 'href')]
    if tag not in ('meta', 'img', 'br'):
      self.stack.append(tag)

  def handle_endtag(self, tag):
    assert self.stack.pop() == tag


def test_page_is_self_contained(built):
  text = (built[0] / 'report' / 'index.html').read_text()
  html_page = _Page()
  html_page.feed(text)
  assert not html_page.stack
  assert html_page.tags.count('img') == len(PICTURES) + 2
  assert all(
    source.startswith('data:image/png;base64,') for source in html_page.sources
  )
  assert 'script' not in html_page.tags and 'link' not in html_page.tags
  assert not re.search(r'https?://|@import|url\(', text)
  for expected in (
    'python -m experiments.run',
    'Student t',
    '3f1c5a9b77d2',
    'latent_size',
    'Fieller',
    'raises',
  ):
    assert expected in text


def test_page_escapes(workdir):
  run = json.loads((workdir / 'run.json').read_text())
  run['command'] = 'run --x="<script>alert(1)</script>"'
  run['variants']['ours'] = '<b>bold</b>'
  (workdir / 'run.json').write_text(json.dumps(run))
  record = records.load(workdir)
  text = page.render(record, results.summarize(record), {'rows': b''})
  assert '<script>' not in text and '<b>bold' not in text


def test_offline_only(make_workdir):
  """A run that has not come to its online phase, with nothing optional."""
  workdir = make_workdir(seeds=2, variants=())
  (workdir / 'evaluations' / 'collect.npz').unlink()
  (workdir / 'timing.json').unlink()
  (workdir / 'offline' / 'metrics.jsonl').unlink()
  path = workdir / 'evaluations' / 'offline.npz'
  _edit(
    path, remove=[name for name in np.load(path) if name != 'test_self_returns']
  )
  summary = report.build(workdir)
  assert list(summary['rows']) == ['offline_unadapted', 'offline_self_context']
  assert summary['wall_time_s'] is None
  gain = summary['paired']['online_minus_offline']
  assert gain['mean'] is None and 'online_self_context' in gain['reason']
  assert _drawn(workdir) == {'rows', 'episodes'}
  assert 'not been tested yet' in (workdir / 'report/index.html').read_text()


def test_an_algorithm_without_an_online_phase(tmp_path, data):
  workdir = data.make_offline_workdir(tmp_path / 'run')
  summary = report.build(workdir)
  assert list(summary['paired']) == [
    'shift_before',
    'offline_adaptation',
    'offline_adaptation_given',
  ]
  assert all('online' not in name for name in summary['rows'])
  assert summary['rows']['offline_self_context']['mean'] == pytest.approx(-15.4)
  table = (workdir / 'report' / 'table.txt').read_text()
  assert 'online' not in table and 'n/a' not in table.replace(
    'n/a (1 seed)', ''
  )
  page_text = (workdir / 'report' / 'index.html').read_text()
  words = re.sub('base64,[^"]*', '', page_text.split('</style>')[1])
  for absent in ('variant', 'gap_closed', 'switch', 'online phase', 'oracle'):
    assert absent not in words, absent
  verdict = 'to a self-collected context raises the return: +4.48'
  assert verdict in page_text
  assert re.search('class="headline"><td><code>offline_self_con', page_text)
  assert _drawn(workdir) == PICTURES


def test_learners_that_made_the_data(make_workdir, undrawn):
  workdir = make_workdir(seeds=2, variants=('ours',))
  path = workdir / 'evaluations' / 'collect.npz'
  _edit(
    path,
    specialist_test_returns=np.full((8, 3), -4.0),
    specialist_train_returns=np.linspace(-8, -6, 16)[:, None],
    specialist_diverged=np.array(2),
  )
  summary = report.build(workdir)
  rows = summary['rows']
  assert (rows['specialists']['mean'], rows['specialists']['seeds']) == (-4, 1)
  assert rows['train_specialists']['mean'] == pytest.approx(-7.0)
  assert summary['diverged'] == {'test of specialists': 2}
  table = (workdir / 'report' / 'table.txt').read_text()
  training = table.index(results.tables.TRAINING)
  assert (
    table.index('\nspecialists') < training < table.index('\ntrain_specialists')
  )
  labels = [
    label.get_text()
    for axis in charts.row_chart(summary).axes
    for label in axis.get_yticklabels()
  ]
  assert {'specialists', 'train_specialists'} < set(labels)


def test_fine_tuning(tmp_path, data):
  workdir = data.make_offline_workdir(tmp_path / 'run', seeds=3)
  data.write_finetuning(workdir, 3)
  summary = report.build(workdir)
  found = {
    name: row['mean']
    for name, row in summary['rows'].items()
    if name.startswith('finetune')
  }
  # Seeds are 0, 1, 2 above, so 1 in the mean; evaluation 6 is at 10,000 steps,
  # the last at 12,000: nobody has come to 20,000.
  assert found == pytest.approx(
    {
      'finetune_meta': -17.0,
      'finetune_start': -15.0,
      'finetune_10k': -9.5,
      'finetune_end': -9.0,
    }
  )
  assert (workdir / 'report' / 'finetune.png').exists()
  table = (workdir / 'report' / 'table.txt').read_text()
  begin = table.index(results.tables.FINETUNE)
  assert begin < table.index('finetune_meta') < table.index('finetune_end')
  assert table.index('finetune_end') < table.index(results.tables.TRAINING)


def test_fine_tuning_that_only_began(tmp_path, data, undrawn):
  """Evaluations before any online step."""
  workdir = data.make_offline_workdir(tmp_path / 'run', seeds=2)
  data.write_finetuning(workdir, 2)
  path = workdir / 'evaluations' / 'finetune.npz'
  arrays = {name: array[..., :2] for name, array in np.load(path).items()}
  np.savez(path, **arrays)
  summary = report.build(workdir)
  assert [name for name in summary['rows'] if name.startswith('finetune')] == [
    'finetune_meta',
    'finetune_start',
  ]
  assert charts.finetune_curve(records.load(workdir)) is None


def test_one_seed(make_workdir):
  workdir = make_workdir(seeds=1)
  summary = report.build(workdir)
  row = summary['rows']['online_self_context']
  assert row['mean'] == pytest.approx(-9.2) and row['low'] is None
  assert summary['paired']['gap_closed']['mean'] == pytest.approx(1.0)
  assert 'n/a (1 seed)' in results.text_table(summary)
  _strict((workdir / 'report' / 'summary.json').read_text())


def test_building_twice_gives_the_same_files(make_workdir):
  workdir = make_workdir(seeds=2, variants=())
  (workdir / 'offline' / 'metrics.jsonl').unlink()
  report.build(workdir)
  first = {
    path.name: path.read_bytes() for path in (workdir / 'report').iterdir()
  }
  report.build(workdir)
  again = {
    path.name: path.read_bytes() for path in (workdir / 'report').iterdir()
  }
  assert first == again


def test_bad_input_leaves_the_old_report(make_workdir):
  workdir = make_workdir(seeds=2, variants=('ours',))
  (workdir / 'report').mkdir()
  (workdir / 'report' / 'summary.json').write_text('old')
  (workdir / 'evaluations' / 'online-ours.npz').write_bytes(b'PK broken')
  with pytest.raises(ValueError, match='online-ours.npz'):
    report.build(workdir)
  assert (workdir / 'report' / 'summary.json').read_text() == 'old'


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / 'table.txt'
  path.write_text('old')

  def full(_):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(report.os, 'fsync', full)
  with pytest.raises(OSError, match='No space'):
    report.write_atomic(path, b'new')
  assert [item.name for item in tmp_path.iterdir()] == ['table.txt']
  assert path.read_text() == 'old'


def test_missing_matplotlib(make_workdir, monkeypatch):
  workdir = make_workdir(seeds=2, variants=())
  monkeypatch.setitem(sys.modules, 'matplotlib', None)
  with pytest.raises(ImportError, match=r'pip install offmeta\[report\]'):
    report.build(workdir)
  assert (workdir / 'report' / 'table.txt').exists()


@pytest.mark.parametrize('restart', [False, True])
def test_online_steps_may_count_on_or_restart(make_workdir, data, restart):
  workdir = make_workdir(seeds=2, variants=('ours',))
  path = workdir / 'online' / 'ours' / 'metrics.jsonl'
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  if restart:
    for row in rows:
      row['step'] -= 4000
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  _, online = plots._curves(  # pylint: disable=protected-access
    records.load(workdir), 'eval/test/self_context/final_return'
  )
  # The last offline point, then every 1500 updates after the switch.
  assert online['ours'].step.tolist() == [1500 * i for i in range(9)]
  np.testing.assert_allclose(online['ours'].values[0], data.OFFLINE[:2])


def test_principal_axes_of_a_known_cloud():
  # Variance 9 along (0, 1, 0), 1 along (1, 0, 0), none along (0, 0, 1).
  points = np.array([[1.0, 3, 5], [1, -3, 5], [-1, 3, 5], [-1, -3, 5]])
  center, basis, share = plots._pca(points)  # pylint: disable=protected-access
  np.testing.assert_allclose(center, [0, 0, 5])
  np.testing.assert_allclose(
    np.abs(basis), [[0, 1], [1, 0], [0, 0]], atol=1e-12
  )
  np.testing.assert_allclose(share, [0.9, 0.1])


def test_labels_are_pushed_apart_as_little_as_needed():
  spread = drawing.spread
  np.testing.assert_allclose(spread([0.0, 0.5, 1.0], 0.1), [0.0, 0.5, 1.0])
  np.testing.assert_allclose(spread([0.5, 0.5, 0.9], 0.1), [0.45, 0.55, 0.9])
  np.testing.assert_allclose(
    spread([0.4, 0.45, 0.5, 0.55], 0.1), [0.325, 0.425, 0.525, 0.625]
  )
  np.testing.assert_allclose(
    spread([0.0, 0.02, 1.0, 1.0], 0.1), [0.0, 0.1, 0.9, 1.0]
  )


def test_imports_no_jax_and_of_offmeta_only_how_files_are_written():
  """Read from the source, because offmeta/__init__.py imports types.py."""
  folder = pathlib.Path(report.__file__).parent
  for path in folder.glob('*.py'):
    for node in ast.walk(ast.parse(path.read_text())):
      names = []
      if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
      elif isinstance(node, ast.ImportFrom):
        names = [f'{node.module}.{alias.name}' for alias in node.names]
      for name in names:
        root = name.split('.')[0]
        assert root not in ('jax', 'flax', 'pickle'), path
        own = ('offmeta.results', 'offmeta.disk')
        assert root != 'offmeta' or name.startswith(own), (path, name)


def test_unadapted_is_without_noise_where_that_was_scored(workdir, undrawn):
  """Not the first episode of those that collect, where it is there."""
  path = workdir / 'evaluations' / 'offline.npz'
  arrays = dict(np.load(path))
  arrays['test_prior_returns'] = np.full_like(arrays['test_self_returns'], -3.0)
  np.savez(path, **arrays)
  rows = report.build(workdir)['rows']
  assert rows['offline_unadapted']['mean'] == -3.0
  assert rows['online_unadapted']['mean'] != -3.0


def test_paths_are_of_tasks_from_the_worst_to_the_best():
  scores = np.array([3.0, 1.0, 2.0, 5.0, 4.0])
  np.testing.assert_array_equal(plots._quantiles(scores, 5, 3), [1, 0, 3])
  np.testing.assert_array_equal(plots._quantiles(scores, 5, 9), [1, 2, 0, 4, 3])
  np.testing.assert_array_equal(plots._quantiles(None, 5, 3), [0, 2, 4])
  # Of another run's paths there are fewer: none but these can be shown.
  np.testing.assert_array_equal(plots._quantiles(scores, 2, 3), [1, 0])


def test_paths_are_named_by_task_and_return(make_workdir):
  workdir = make_workdir(seeds=2, variants=('ours',))
  record = records.load(workdir)
  before, after = (
    record.array(point, 'test_self_returns')[0, :, 0, -1]
    for point in ('offline', 'online-ours')
  )
  top, *_ = plots.trajectories(record).axes
  worst = int(np.argmin(after))
  assert top.get_title() == f'task {worst}: {before[worst]:.1f}'
  # A run of an earlier version kept four of eight, which say no number.
  for point in ('offline', 'online-ours'):
    path = workdir / 'evaluations' / f'{point}.npz'
    kept = {
      name: np.load(path)[name][:4]
      for name in ('trajectories', 'trajectory_goals')
    }
    _edit(path, **kept)
  top, *_ = plots.trajectories(records.load(workdir)).axes
  assert not top.get_title()


def test_latents_on_a_line_are_drawn_against_the_task(make_workdir):
  workdir = make_workdir(seeds=2, variants=('ours',))
  first, *_ = plots.z_space(records.load(workdir)).axes
  assert first.get_xlabel().startswith('z, first component')
  for point in ('offline', 'online-ours'):
    path = workdir / 'evaluations' / f'{point}.npz'
    line = {
      f'posterior_{kind}_mean': np.load(path)[f'posterior_{kind}_mean']
      * np.array([1.0, 0.01, 0.0])
      for kind in ('offline', 'self')
    }
    _edit(path, **line)
  first, *_ = plots.z_space(records.load(workdir)).axes
  assert first.get_xlabel() == 'task parameter'
  assert re.match('z, first component .1?[0-9]{2}% of', first.get_ylabel())


def _page_of(workdir, profile):
  """The page before and after the beginning of the folded table."""
  run = json.loads((workdir / 'run.json').read_text())
  (workdir / 'run.json').write_text(json.dumps({**run, 'profile': profile}))
  record = records.load(workdir)
  summary = {**results.summarize(record), 'diverged': {'online/ours': 3}}
  text = page.render(record, summary, {'training': b'', 'episodes': b''})
  return text.split('<h2>Every row</h2><details>')


def test_the_page_begins_with_its_finding(make_workdir):
  before, after = _page_of(make_workdir(seeds=2, variants=('ours',)), 'cpu')
  places = [
    before.index(part)
    for part in (
      'On held-out tasks the online phase',
      '<table class="main">',
      'blew up: 3 in online/ours',
      page.CAPTIONS['training'][0],
      page.CAPTIONS['episodes'][0],
    )
  ]
  assert places == sorted(places)
  assert before.split('</table>')[0].count('<tr>') == 4  # a head, three rows
  assert 'gap_closed' in after and '<code>random</code>' not in before


def test_the_page_of_a_smoke_run_has_no_finding(make_workdir):
  before, _ = _page_of(make_workdir(seeds=2, variants=('ours',)), 'smoke')
  assert '<p class="warning">The profile' in before
  assert 'the return' not in before.split('<table')[0]
