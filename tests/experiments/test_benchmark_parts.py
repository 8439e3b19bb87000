"""The parts of the speed report that are about devices, sizes and calls."""

import dataclasses
import gzip
import json
import types

import jax
import numpy as np
import pytest

from experiments import benchmark
from experiments.benchmarking import (
  BenchmarkError,
  cases,
  ceiling,
  growth,
  machine,
  options,
  processes,
  results,
  scaling,
  startup,
  updates,
)
from experiments.benchmarking.timing import Timed
from offmeta import parallel

QUICK = options.Options(
  profile='smoke', repeats=1, repeat_s=0.01, chunk=4, algorithms=('smac',)
)


# Scaling.


def test_the_same_update_on_forced_devices(capsys):
  # The devices of this process do not matter: there are 4.
  result = benchmark.run(
    dataclasses.replace(
      QUICK, only=('scaling',), devices=(8,), algorithms=('focal',)
    )
  )
  found = [(row['kind'], row['devices']) for row in result['scaling']]
  assert found == [('seeds', 1), ('seeds', 8), ('tasks', 1), ('tasks', 8)]
  for row in result['scaling']:
    assert row['algorithm'] == 'focal' and row['stage'] == 'offline'
    assert row['seeds'] == (8 if row['kind'] == 'seeds' else 1)
    assert row['sizes']['num_tasks'] == (2 if row['kind'] == 'seeds' else 16)
    assert row['forced_devices'] and row['updates_per_s'] > 0
  for one, many in (result['scaling'][:2], result['scaling'][2:]):
    assert one['speed_up'] == 1
    assert many['speed_up'] == pytest.approx(
      many['updates_per_s'] / one['updates_per_s'], rel=0.01
    )
    assert one['gflop_per_update'] == many['gflop_per_update']
  cores = result['machine']['cores']
  assert f'up to 8 share {cores} cores' in capsys.readouterr().out


def test_accelerators_are_used_as_they_are(monkeypatch):
  """In this process, as many as there are; medians are compared."""

  class Side:
    def __init__(self, devices, chosen):
      assert chosen.algorithms == ('smac',)
      self.rows = [{'kind': 'seeds', 'algorithm': 'smac', 'devices': devices}]
      # Rates of the rounds by number of devices.
      self._rates = iter({1: (10, 30, 20), 2: (90, 30, 36)}[devices])

    def measure(self):
      return [next(self._rates)]

  monkeypatch.setattr(scaling, 'Side', Side)
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  monkeypatch.setattr(jax, 'local_device_count', lambda: 2)
  one, two = scaling.measure_scaling(dataclasses.replace(QUICK, repeats=3))
  assert (one['devices'], two['devices']) == (1, 2)  # not 4 and 8
  assert two['updates_per_s'] == 36 and two['speed_up'] == 1.8
  assert two['updates_per_s_spread'] == [30, 90]


def test_a_process_that_fails_is_one_message(tmp_path):
  (tmp_path / 'failing.py').write_text("""
import json, sys
print(json.loads(sys.argv[1])['devices'], flush=True)
json.loads(sys.argv[1])['options']
""")
  environment = {'PYTHONPATH': str(tmp_path)}
  with processes.Worker('failing', environment, devices=1) as worker:
    assert worker.receive() == 1
    with pytest.raises(
      BenchmarkError, match="failing: .* status 1: KeyError: 'options'"
    ):
      worker.receive()
    with pytest.raises(BenchmarkError, match='status 1'):
      worker.ask()


# What is timed.


def test_the_ceiling_multiplies_as_the_updates_do():
  def results_of(precision):
    ways = ceiling.make_ceiling(
      dataclasses.replace(QUICK, matmul_precision=precision)
    )
    return {
      name: np.concatenate(jax.tree.leaves(way.call()))
      for name, way in ways.items()
    }

  exact, rounded = results_of('float32'), results_of('bfloat16')
  assert exact.keys() == {'chain', 'four_chains', 'square'}
  for name, value in exact.items():
    # Operands of 8 bits in each of 8 products; on a CPU, jax's own setting
    # changes nothing.
    error = np.linalg.norm(rounded[name] - value) / np.linalg.norm(value)
    assert 2**-9 < error < 8 * 2**-8
    assert rounded[name].dtype == np.float32


@pytest.mark.parametrize('stage', ['offline', 'online'])
def test_timed_calls_find_their_arguments_in_place(stage, monkeypatch):
  asked = []

  def make_update(*unused, **chosen):
    def update(state, replay, extras):
      assert not extras
      asked.append((state, replay, chosen['matmul_precision']))
      return state, {}

    return update

  monkeypatch.setattr(updates.updates_lib, 'make_update', make_update)
  [case] = [
    c
    for c in cases.make_cases('smoke')
    if (c.algorithm, c.stage, c.variant) == ('smac', stage, 'released')
  ]
  devices = tuple(jax.devices()[2:])
  updates.UpdateRunner(
    case, 1, parallel.Layout(4, range(4), devices), 'bfloat16'
  )()
  [(state, replay, precision)] = asked
  assert precision == 'bfloat16'
  each = {'offline': replay.query.size.shape, 'online': (2, case.num_tasks)}
  for tree, size in ((replay.query.size, each[stage]), (state.step, (2,))):
    assert tree.sharding.shard_shape(tree.shape) == size
  for leaf in jax.tree.leaves((state, replay)):
    assert leaf.sharding.device_set == set(devices)


# Growth.


def test_one_size_grows_at_a_time():
  smac, pearl, sac = cases.first_cases('paper', ('sac', 'smac', 'pearl'))
  assert (smac.stage, pearl.variant, sac.algorithm) == (
    'offline',
    'behaviour',
    'sac',
  )
  base = {'num_tasks': 4, 'query_size': 128, 'seeds': 1}
  points = growth.points(smac, 'paper')
  assert len(points) == 6 + 6 + 5
  for factor, value, point in points:
    assert dict(point) == {**base, factor: value}
  assert {f: min(v for g, v, _ in points if g == f) for f in base} == {
    'num_tasks': 1,
    'query_size': 32,
    'seeds': 1,
  }
  assert {f: max(v for g, v, _ in points if g == f) for f in base} == {
    'num_tasks': 32,
    'query_size': 1024,
    'seeds': 16,
  }
  assert {p[0] for p in growth.points(sac, 'paper')} == {'query_size', 'seeds'}


def test_resized_cases():
  for case in cases.first_cases('paper', ('smac', 'pearl')):
    batch = case.resized(num_tasks=7, query_size=33).get_stage().batch
    assert (batch.num_tasks, batch.query.size) == (7, 33)
    assert batch.context == case.get_stage().batch.context
  [sac] = cases.first_cases('paper', ('sac',))
  assert sac.resized(query_size=33).get_stage().batch.query.size == 33
  with pytest.raises(ValueError, match='no meta-batch'):
    sac.resized(num_tasks=2)


def test_contexts_grow_with_the_tasks_but_not_with_the_queries():
  [smac] = cases.first_cases('smoke', ('smac',))
  gflop = smac.gflop()
  assert smac.resized(num_tasks=4).gflop() == pytest.approx(2 * gflop)
  assert 3 < smac.resized(query_size=64).gflop() / gflop < 4


def test_growth_rows(capsys):
  result = benchmark.run(
    dataclasses.replace(QUICK, only=('growth',), algorithms=('sac',))
  )
  rows = {(r['factor'], r['value']): r for r in result['growth']}
  assert list(rows) == [
    ('query_size', 16),
    ('query_size', 64),
    ('seeds', 1),
    ('seeds', 2),
  ]
  base = rows['seeds', 1]
  # Measured once.
  assert rows['query_size', 16]['updates_per_s'] == base['updates_per_s']
  assert rows['query_size', 64]['gflop'] == pytest.approx(
    4 * base['gflop'], rel=1e-3
  )
  assert rows['seeds', 2]['gflop'] == pytest.approx(2 * base['gflop'], rel=1e-3)
  for row in rows.values():
    assert row['devices'] == 1
    assert row['ms_per_update'] == pytest.approx(
      1e3 * row['seeds'] / row['updates_per_s'], rel=0.01
    )
    assert row['gflops'] == pytest.approx(
      1e3 * row['gflop'] / row['ms_per_update'], rel=0.01
    )
  assert 'query_size' in capsys.readouterr().out


# Calls.


def test_overhead_of_a_call_from_two_lengths():
  # A call takes 300 us and 10 us per update; three seeds in each.
  def timed(updates_per_call):
    timing = Timed(lambda: None, updates_per_call * 3, 1.0)
    timing.rates = [3e6 * updates_per_call / (300 + 10 * updates_per_call)]
    return timing

  run = updates.Run(
    cases.make_cases('smoke')[0],
    parallel.make_layout(3, max_devices=1),
    'smoke',
    'float32',
    22,
    1.0,
    0.0,
    timed(22),
    timed(5),
  )
  row = updates.overhead(run)
  assert row['updates_per_short_call'] == 5
  assert row['us_per_update'] == pytest.approx(10 + 300 / 22, rel=1e-3)
  assert row['us_per_update_in_short_calls'] == pytest.approx(10 + 300 / 5)
  assert row['overhead_us_per_call'] == pytest.approx(300, rel=1e-3)


def test_overhead_and_traces_of_updates(tmp_path, capsys):
  folder = tmp_path / 'deep' / 'traces'
  result = benchmark.run(
    dataclasses.replace(
      QUICK, only=('sac',), overhead=True, trace_dir=str(folder)
    )
  )
  [row] = result['updates']
  assert result['env_steps'] == []
  assert (row['updates_per_call'], row['updates_per_short_call']) == (4, 1)
  for record in (row, result['ceiling']):
    assert record['matmul_precision'] == 'float32'
  assert row['us_per_update'] == pytest.approx(
    1e6 / row['updates_per_s'], rel=0.01
  )
  assert result['device_peak_memory_mb'] is None  # a CPU does not say
  [trace] = folder.glob('sac_online_one_task_x1/**/*.trace.json.gz')
  with gzip.open(trace) as file:
    events = json.load(file)['traceEvents']
  # The products of the update; nothing was compiled in it.
  names = ' '.join(event.get('name', '') for event in events)
  assert 'dot' in names and 'backend_compile' not in names
  printed = capsys.readouterr()
  assert 'overhead_us_per_call' in printed.out
  assert 'perfetto' in printed.err and str(folder) in printed.err


def test_a_trace_folder_that_cannot_be(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(BenchmarkError, match='--trace_dir: .*file'):
    benchmark.run(
      dataclasses.replace(
        QUICK, only=('sac',), trace_dir=str(tmp_path / 'file')
      )
    )


def test_peak_of_the_devices(monkeypatch):
  device = lambda stats: types.SimpleNamespace(memory_stats=lambda: stats)
  monkeypatch.setattr(
    jax,
    'local_devices',
    lambda: [
      device({'peak_bytes_in_use': 2**20}),
      device(None),
      device({'peak_bytes_in_use': 3 * 2**20}),
    ],
  )
  assert machine.device_peak_memory_mb() == 3.0


# Start-up.


def test_start_up_with_an_empty_and_a_filled_cache(monkeypatch, capsys):
  # Whatever this process does itself.
  monkeypatch.setenv('JAX_ENABLE_COMPILATION_CACHE', 'false')
  result = benchmark.run(dataclasses.replace(QUICK, only=('startup',)))
  empty, filled = result['startup']
  assert (empty['cache'], filled['cache']) == ('empty', 'filled')
  assert empty['programs_from_cache'] == 0 < filled['programs_from_cache']
  for row in (empty, filled):
    assert row['profile'] == 'smoke' and row['starts'] == 1
    assert 0 < row['imported_s'] < row['initialised_s'] < row['first_update_s']
  assert 'first_update_s' in capsys.readouterr().out


def test_start_up_comes_before_this_process_takes_the_device(monkeypatch):
  order = []
  monkeypatch.setattr(
    startup, 'measure_startup', lambda chosen: order.append('start') or []
  )

  def begin():
    order.append('begin')
    return results.new_result()

  benchmark.run(dataclasses.replace(QUICK, only=('startup',)), begin)
  assert order == ['start', 'begin']
