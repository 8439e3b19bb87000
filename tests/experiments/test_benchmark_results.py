"""Files of the speed report: read again, compared and drawn."""

import copy
import json
import os
import pathlib
import subprocess
import sys
import types

import matplotlib.image
import numpy as np
import pytest

from experiments import benchmark
from experiments.benchmarking import BenchmarkError, options, plots, results

ROOT = pathlib.Path(benchmark.__file__).parents[1]
UPDATE = {
  'algorithm': 'smac',
  'stage': 'offline',
  'variant': 'released',
  'profile': 'paper',
  'matmul_precision': 'float32',
}


def command(*arguments):
  return subprocess.run(
    [sys.executable, '-m', 'experiments.benchmark', *arguments],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=60,
    env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
  )


def one_result():
  """A result with a row in every table that is compared."""
  return {
    **results.new_result(),
    'machine': {'cpu': 'A', 'cores': 2, 'load_average': [1]},
    'versions': {'jax': '0.10'},
    'ceiling_gflops': 200.0,
    'ceiling': {'gflops': {'square': 200.0}, 'matmul_precision': 'float32'},
    'updates': [
      {**UPDATE, 'seeds': 1, 'updates_per_s': 50.0},
      {**UPDATE, 'seeds': 2, 'updates_per_s': 60.0},
    ],
    'scaling': [
      {
        **UPDATE,
        'kind': kind,
        'devices': devices,
        'forced_devices': True,
        'updates_per_s': 10.0 * devices,
        'speed_up': devices,
      }
      for kind in ('seeds', 'tasks')
      for devices in (1, 4)
    ],
    'growth': [
      {
        **UPDATE,
        'factor': factor,
        'value': value,
        'gflop': 0.5 * value,
        'ms_per_update': 3.0 + value,
      }
      for factor in ('num_tasks', 'query_size', 'seeds')
      for value in (2, 32)
    ],
    'startup': [{'profile': 'cpu', 'cache': 'empty', 'first_update_s': 9.0}],
    'env_steps': [
      {
        'family': 'point_robot',
        'backend': 'jax',
        'num_envs': 4,
        'steps_per_s': 1000.0,
      }
    ],
  }


def write(path, value):
  path.write_text(json.dumps(value))
  return path


# Reading.


@pytest.mark.parametrize(
  'text, message',
  [
    ('', 'damaged or no JSON'),
    ('{"machine": {"cpu": ', 'damaged or no JSON'),
    ('\x00\x01', 'damaged or no JSON'),
    ('[]', 'a list'),
    ('{"a": 1}', "no 'machine'"),
    (
      '{"machine": {}, "versions": {}, "ceiling": {}, "updates": 3}',
      "'updates' is no list of rows",
    ),
    (
      '{"machine": {}, "versions": {}, "ceiling": {}, "updates": [3]}',
      "'updates' is no list of rows",
    ),
    (
      '{"machine": {}, "versions": {}, "ceiling": {}, "ceiling_gflops": 2}',
      "no 'gflops'",
    ),
    (
      '{"machine": {}, "versions": {}, "ceiling": {},'
      ' "startup": [{"profile": "cpu", "cache": "empty"}]}',
      "no 'first_update_s' in a row of 'startup'",
    ),
    (
      '{"machine": {}, "versions": {}, "ceiling": {}, "startup":'
      ' [{"profile": "cpu", "cache": "empty", "first_update_s": "9"}]}',
      "'first_update_s' of 'startup' is no number",
    ),
  ],
)
def test_bad_files(tmp_path, text, message):
  path = tmp_path / 'old.json'
  path.write_text(text)
  with pytest.raises(BenchmarkError) as caught:
    results.read_result(path, 'compare')
  assert str(caught.value).startswith(f'--compare: {path}: ')
  assert message in str(caught.value) and '\n' not in str(caught.value)


def test_a_file_that_is_no_text_or_not_there(tmp_path):
  (tmp_path / 'picture').write_bytes(b'\x89PNG\xff\xfe')
  with pytest.raises(BenchmarkError, match='damaged or no JSON'):
    results.read_result(tmp_path / 'picture', 'load')
  with pytest.raises(BenchmarkError, match='--load: .* No such file'):
    results.read_result(tmp_path / 'nothing', 'load')


@pytest.mark.parametrize('name', ['benchmark_cpu', 'environments_cpu'])
def test_published_results_can_be_read(name):
  path = ROOT / f'experiments/results/{name}.json'
  result = results.read_result(path, 'load')
  assert result['updates'] or result['env_steps']
  assert all(row['ratio'] == 1 for row in results.compare(result, result))


# Comparing.


def test_rows_that_both_have(capsys):
  old, new = one_result(), one_result()
  new['updates'] = [
    {**UPDATE, 'seeds': 2, 'updates_per_s': 90.0},
    {**UPDATE, 'seeds': 3, 'updates_per_s': 90.0},
  ]
  new['scaling'][0]['updates_per_s'] = 5.0
  new['startup'][0]['first_update_s'] = 3.0
  rows = {
    (r['table'], r['row']): (r['old'], r['new'], r['ratio'])
    for r in results.compare(old, new)
  }
  label = 'smac offline released paper float32'
  assert rows['updates', f'{label} seeds=2'] == (60.0, 90.0, 1.5)
  assert rows['scaling', f'{label} seeds devices=1'] == (10.0, 5.0, 0.5)
  assert rows['scaling', f'{label} tasks devices=1'] == (10.0, 10.0, 1.0)
  assert rows['growth', f'{label} num_tasks value=32'] == (35.0, 35.0, 1.0)
  assert rows['startup', 'cpu empty'] == (9.0, 3.0, pytest.approx(1 / 3))
  assert rows['env_steps', 'point_robot jax num_envs=4'][2] == 1.0
  assert rows['ceiling', 'float32'] == (200.0, 200.0, 1.0)
  assert len(rows) == 1 + 1 + 4 + 6 + 1 + 1
  results.print_comparison(old, new, 'old.json')
  printed = capsys.readouterr().out
  assert 'warning' not in printed and 'old.json' in printed
  assert '14 figures in both, 2 in only one of the two' in printed


def test_rows_of_another_precision_are_others(tmp_path):
  without, lower = one_result(), one_result()
  for name in ('updates', 'scaling', 'growth'):
    for row in without[name]:
      del row['matmul_precision']
    for row in lower[name]:
      row['matmul_precision'] = 'bfloat16'
  without['ceiling']['matmul_precision'] = 'default'
  lower['ceiling']['matmul_precision'] = 'bfloat16'
  older = results.read_result(write(tmp_path / 'old.json', without), 'compare')
  same = results.compare(older, one_result())
  assert same == results.compare(one_result(), one_result())
  assert {r['table'] for r in results.compare(older, lower)} == {
    'startup',
    'env_steps',
  }


def test_other_machines_and_versions_are_warned_of(capsys):
  old, new = one_result(), one_result()
  new['machine'] = {'cpu': 'B', 'cores': 2, 'load_average': [9]}
  new['versions'] = {'jax': '0.10', 'brax': '1'}
  del old['versions']['jax'], new['machine']['cores']
  results.print_comparison(old, new, 'old.json')
  warnings = [
    line
    for line in capsys.readouterr().out.splitlines()
    if line.startswith('warning')
  ]
  assert warnings == [
    'warning: machine.cpu differs: A -> B',
    'warning: machine.cores differs: 2 -> None',
    'warning: versions.jax differs: None -> 0.10',
    'warning: versions.brax differs: None -> 1',
  ]


def test_two_files_are_compared_and_drawn_without_measuring(tmp_path):
  new = one_result()
  new['updates'][0]['updates_per_s'] = 25.0
  old = write(tmp_path / 'old.json', one_result())
  done = command(
    f'--load={write(tmp_path / "new.json", new)}',
    f'--compare={old}',
    f'--plot={tmp_path / "a.png"}',
  )
  assert done.returncode == 0, done.stderr
  line = next(
    line for line in done.stdout.splitlines() if 'paper float32 seeds=1' in line
  )
  assert line.split()[-3:] == ['50', '25', '0.5']
  assert 'compiling' not in done.stderr
  assert (tmp_path / 'a.png').is_file()
  old.write_text(old.read_text()[:-30])
  done = command('--only=sac', f'--compare={old}')
  assert done.returncode == 1 and done.stdout == ''
  [line] = done.stderr.strip().splitlines()  # before anything was measured
  assert line.startswith(f'error: --compare: {old}: damaged')


# Flags.


def files(chosen=options.Options(), **given):
  holders = {
    name: types.SimpleNamespace(value=given.get(name, ''))
    for name in ('out', 'resume', 'load', 'compare', 'plot')
  }
  return options.files_from_flags(holders, chosen)


def test_files_of_flags(tmp_path):
  found = files(out=str(tmp_path / 'a.json'), resume=True)
  assert found.out == tmp_path / 'a.json' and found.resume
  assert found.load is found.compare is found.plot is None
  named = options.Options(only=('growth',))
  assert files(named, plot='a.png').plot == pathlib.Path('a.png')


@pytest.mark.parametrize(
  'given, only, message',
  [
    ({'resume': True}, (), '--resume needs --out'),
    ({'load': 'a', 'out': 'b'}, (), '--load measures nothing'),
    ({'load': 'a'}, ('env',), '--load measures nothing'),
    ({'out': '/no/where/a.json'}, (), '--out: no folder'),
    ({'load': 'a', 'plot': '/no/where/a.png'}, (), '--plot: no folder'),
    ({'plot': 'a.png'}, ('smac',), '--plot: needs scaling or growth'),
  ],
)
def test_flags_that_do_not_go_together(given, only, message):
  with pytest.raises(BenchmarkError, match=message):
    files(options.Options(only=only), **given)


# Drawing.


def test_the_picture_shows_each_part(tmp_path):
  def draw(**without):
    plots.save({**one_result(), **without}, tmp_path / 'a.png')
    return matplotlib.image.imread(tmp_path / 'a.png')

  both = draw()
  assert draw(scaling=[]).shape[0] < both.shape[0] > draw(growth=[]).shape[0]
  # The line of an algorithm is there in its colour, in either part.
  blue = np.array([0x00, 0x72, 0xB2]) / 255
  is_blue = np.abs(both[..., :3] - blue).max(axis=-1) < 0.02
  middle = len(both) // 2
  assert is_blue[:middle].sum() > 500 < is_blue[middle:].sum()
  # Other rates, another picture.
  faster = copy.deepcopy(one_result()['scaling'])
  faster[1]['speed_up'] = 2
  assert not np.array_equal(draw(scaling=faster), both)


def test_nothing_to_draw(tmp_path):
  with pytest.raises(BenchmarkError, match='neither scaling nor growth'):
    plots.save(results.new_result(), tmp_path / 'a.png')
  with pytest.raises(BenchmarkError, match='--plot: .*Is a directory'):
    plots.save(one_result(), tmp_path)
