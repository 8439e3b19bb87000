"""The table of several runs, from synthetic workdirs."""

import csv
import io
import json
import shutil

import numpy as np
import pytest

from offmeta.results import comparison


@pytest.fixture(name='built', scope='module')
def _built(tmp_path_factory, data):
  """(folder, result): SMAC, an ablation of it, MACAW with fine-tuning."""
  folder = tmp_path_factory.mktemp('comparison')
  data.make_workdir(folder / 'smac', variants=('ours', 'oracle'))
  data.make_workdir(folder / 'smac+sac_actor', variants=('ours',))
  data.make_offline_workdir(folder / 'macaw')
  data.write_finetuning(folder / 'macaw', 5)
  data.make_offline_workdir(folder / 'focal', seeds=1)
  # The run that made the data has nothing but its phase `collect`.
  data.make_offline_workdir(folder / 'data', seeds=1)
  for point in ('offline', 'finetune'):
    (folder / f'data/evaluations/{point}.npz').unlink(missing_ok=True)
  collect = folder / 'data/evaluations/collect.npz'
  np.savez(
    collect,
    **np.load(collect),
    specialist_test_returns=np.tile([[-6.0], [-4.0]], (4, 3)),
  )
  for name in ('smac', 'macaw'):  # behaviour and data belong to `data`
    collect = folder / f'{name}/evaluations/collect.npz'
    np.savez(
      collect, random_test_returns=np.load(collect)['random_test_returns']
    )
  for name, seeds in (('macaw', 2), ('smac', 3)):
    path = folder / name / 'run.json'
    run = json.loads(path.read_text())
    run['config']['evaluation'] = {'num_steps': 60 if seeds == 3 else 40}
    path.write_text(json.dumps(run))
  (folder / 'borel').mkdir()
  shutil.copy(folder / 'macaw/run.json', folder / 'borel')
  result = comparison.build(
    folder,
    {'smac': '', 'smac/sac_actor': 'another actor', 'csro': ''},
    'the command',
    {'csro': 'training diverged'},
  )
  return folder, result


def test_rows_and_their_order(built):
  rows = built[1]['rows']
  assert [row['name'] for row in rows] == [
    'smac',
    'smac (online ours)',
    'smac (online oracle)',
    'smac/sac_actor',
    'smac/sac_actor (online ours)',
    'focal',
    'macaw',
  ]
  assert [row['run'] for row in rows[:3]] == ['smac'] * 3


def test_scores(built):
  rows = {row['name']: row['scores'] for row in built[1]['rows']}
  means = lambda name: {key: entry['mean'] for key, entry in rows[name].items()}
  assert means('smac') == pytest.approx(
    {
      'unadapted': -19.88,
      'self_context': -15.4,
      'given_context': -13.4,
      'random_context': -16.9,
    }
  )
  assert means('smac (online ours)') == pytest.approx(
    {
      'unadapted': -18.632,
      'self_context': -9.16,
      'given_context': -7.16,
      'random_context': -10.66,
    }
  )
  # Seeds end at -10, -9, -8, -7 and -6.
  assert means('macaw')['finetuned'] == pytest.approx(-8.0)
  np.testing.assert_allclose(
    rows['macaw']['finetuned']['scores'], [-10, -9, -8, -7, -6]
  )
  # t(0.975, 4) = 2.776445 times a standard error of sqrt(2.5 / 5).
  assert rows['macaw']['finetuned']['high'] == pytest.approx(
    -8 + 2.776445 * 0.707107, abs=1e-5
  )
  assert rows['focal']['self_context']['low'] is None


def test_gains_are_paired_over_seeds(built):
  folder, result = built
  rows = {row['name']: row for row in result['rows']}
  row = rows['smac (online ours)']
  assert list(row['gains']) == list(comparison.ADAPTED)
  for key, entry in row['gains'].items():
    each = np.subtract(
      row['scores'][key]['scores'], row['scores']['unadapted']['scores']
    )
    np.testing.assert_allclose(entry['scores'], each)
    half = 2.776445 * np.std(each, ddof=1) / np.sqrt(5)
    assert entry['low'] == pytest.approx(each.mean() - half, rel=1e-4)
  assert row['gains']['self_context']['mean'] == pytest.approx(9.472)
  text = (folder / 'comparison/table.txt').read_text()
  lines = text[text.index('Gain by adapting') :].splitlines()
  (line,) = [x for x in lines if x.startswith('smac (online ours)  ')]
  assert ' 9.47 [' in line
  assert '9.47 [' in (folder / 'comparison/table.md').read_text()
  assert (
    'self_context_gain,9.47' in (folder / 'comparison/table.csv').read_text()
  )


def test_time_of_training(built):
  seconds = {row['name']: row['training_s'] for row in built[1]['rows']}
  assert seconds['smac'] == 64.0 and seconds['smac (online ours)'] == 95.0


def test_references(built):
  entries = built[1]['references']
  assert {name: entry['mean'] for name, entry in entries.items()} == (
    pytest.approx(
      {
        'random': -21.0,
        'behaviour': -11.0,
        'specialists': -5.0,
        'behaviour_data': -13.0,
      }
    )
  )
  assert entries['random']['seeds'] == 5  # of the runs, not of the data


def test_what_readers_must_know(built):
  folder, result = built
  text = (folder / 'comparison/table.txt').read_text()
  assert result['unfinished'] == ['borel']
  for line in (
    'smac/sac_actor: another actor',
    'Not finished: borel',
    'Failed: csro: training diverged',
    'Not the same protocol: macaw: evaluation.num_steps is 40, but 60 in smac',
    'Not the same protocol: focal: num_seeds is 1, but 5 in smac',
  ):
    assert line in text.splitlines(), line


def test_text_and_markdown(built):
  folder, result = built
  text = comparison.text_table(result)
  main = text.split('Gain by adapting')[0]
  rows = {line.split('  ')[0]: line for line in main.splitlines()}
  assert ' -9.16 [-9.45, -8.87] ' in rows['smac (online ours)']
  cells = rows['focal'].split()
  assert cells == ['focal', '-19.86', '-15.30', '-13.30', '-16.80', '-', '64']
  begin = text.splitlines().index('') + 1
  header, rule, *others = text.splitlines()[begin : begin + 9]
  assert header.startswith('algorithm') and others[-1].startswith('macaw')
  assert len({len(line) for line in (header, rule, *others)}) == 1  # aligned
  markdown = (folder / 'comparison/table.md').read_text()
  lines = [line for line in markdown.splitlines() if line.startswith('| ')]
  assert len(lines) == (1 + 7) + (1 + 7) + (1 + 4)
  assert all(line.count('|') == 8 for line in lines[:8])


def test_csv(built):
  text = (built[0] / 'comparison/table.csv').read_text()
  rows = {
    (row['name'], row['column']): row
    for row in csv.DictReader(io.StringIO(text))
  }
  assert float(rows['smac', 'self_context']['mean']) == pytest.approx(-15.4)
  assert rows['focal', 'self_context']['low'] == ''
  assert rows['smac', 'self_context']['training_s'] == '64.0'
  assert rows['behaviour', 'reference']['seeds'] == '1'


def test_columns_that_no_run_has_are_left_out(tmp_path, data):
  data.make_offline_workdir(tmp_path / 'focal')
  path = tmp_path / 'focal/evaluations/offline.npz'
  np.savez(path, test_self_returns=np.load(path)['test_self_returns'])
  text = comparison.text_table(comparison.build(tmp_path))
  header = next(x for x in text.splitlines() if x.startswith('algorithm'))
  assert header.split('  ')[-1] == 'training, s'
  assert 'self-collected' in header
  assert not any(
    word in header for word in ('random', 'offline context', 'tuned')
  )


def test_a_run_that_trains_online_only(tmp_path, data):
  workdir = data.make_workdir(tmp_path / 'ppo', variants=('ours',))
  (workdir / 'evaluations/offline.npz').unlink()
  shutil.rmtree(workdir / 'offline')
  (row,) = comparison.build(tmp_path)['rows']
  assert (row['name'], row['run']) == ('ppo (online ours)', 'ppo')
  assert row['training_s'] == 31.0


def test_how_they_were_made(built):
  folder, result = built
  stored = json.loads((folder / 'comparison/comparison.json').read_text())
  assert stored == result
  assert stored['command'] == 'the command'
  assert stored['versions']['jax'] == '0.10.2' and stored['machine']
  run = stored['runs']['macaw']
  assert run['config_hash'] == '3f1c5a9b77d2' and run['algorithm'] == 'focal'
  png = (folder / 'comparison/comparison.png').read_bytes()
  assert png.startswith(b'\x89PNG') and len(png) > 8000


def test_an_empty_folder(tmp_path):
  with pytest.raises(ValueError, match='no run has been tested yet'):
    comparison.build(tmp_path)


def test_a_comparison_of_smoke_runs_says_what_it_is_worth(tmp_path, data):
  workdir = data.make_offline_workdir(tmp_path / 'focal')
  assert "profile 'smoke'" not in comparison.text_table(
    comparison.build(tmp_path)
  )
  run = json.loads((workdir / 'run.json').read_text())
  (workdir / 'run.json').write_text(json.dumps({**run, 'profile': 'smoke'}))
  result = comparison.build(tmp_path)
  for table in (comparison.text_table, comparison.markdown_table):
    assert "profile 'smoke' only shows that everything runs" in table(result)
