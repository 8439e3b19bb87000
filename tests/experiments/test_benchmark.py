"""The speed report: its schema, its FLOP counts and its messages."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

from absl import flags
import jax
import jax.numpy as jnp
import pytest

from experiments import benchmark
from offmeta.data import sampler

ROOT = pathlib.Path(benchmark.__file__).parents[1]
UPDATE_KEYS = {
    'algorithm', 'stage', 'profile', 'seeds', 'updates_per_s',
    'gflop_per_update', 'fraction_of_ceiling', 'compile_s'}
ENV_KEYS = {'family', 'backend', 'num_envs', 'steps_per_s', 'compile_s'}
QUICK = benchmark.Options(profile='smoke', repeats=2, repeat_s=0.02, chunk=5)


def command(*arguments, timeout=120):
  return subprocess.run(
      [sys.executable, '-m', 'experiments.benchmark', *arguments],
      cwd=ROOT, capture_output=True, text=True, timeout=timeout,
      env={**os.environ, 'JAX_PLATFORMS': 'cpu'})


def test_the_fixed_command_writes_the_fixed_schema(tmp_path):
  out = tmp_path / 'speed.json'
  done = command('--profile=smoke', '--only=smac', f'--out={out}')
  assert done.returncode == 0, done.stderr
  result = json.loads(out.read_text())
  assert {'machine', 'versions', 'ceiling_gflops', 'updates',
          'env_steps'} <= set(result)
  assert {'cpu', 'cores', 'platform', 'device_kind'} <= set(result['machine'])
  assert {'python', 'jax', 'jaxlib', 'brax', 'mujoco', 'flax',
          'optax'} <= set(result['versions'])
  assert [(u['algorithm'], u['stage'], u['variant'])
          for u in result['updates']] == [
              ('smac', 'offline', 'released'), ('smac', 'online', 'released'),
              ('smac', 'online', 'matched')]
  for update in result['updates']:
    assert UPDATE_KEYS <= set(update)
    assert update['data'] == 'synthetic'
    assert update['seeds'] == 1 and update['profile'] == 'smoke'
    assert update['recompilations_while_timing'] == 0
    assert update['compile_s'] > 0
    low, high = update['updates_per_s_spread']
    assert 0 < low <= update['updates_per_s'] <= high
    share = (update['updates_per_s'] * update['gflop_per_update']
             / result['ceiling_gflops'])
    assert update['fraction_of_ceiling'] == pytest.approx(share, rel=0.01)
    assert update['variant'] in done.stdout
  ways = result['ceiling']['gflops']
  assert result['ceiling_gflops'] == max(ways.values()) > 0
  assert result['env_steps'] == []
  assert [p.name for p in tmp_path.iterdir()] == ['speed.json']


def test_several_seeds_count_together_and_env_has_its_schema():
  result = benchmark.run(dataclasses.replace(
      QUICK, only=('pearl', 'env'), seeds=(1, 3), num_envs=4))
  assert [u['seeds'] for u in result['updates']] == [1, 3]
  one, three = result['updates']
  assert one['gflop_per_update'] == three['gflop_per_update']
  assert three['ms_per_update_of_all_seeds'] == pytest.approx(
      3e3 / three['updates_per_s'], rel=0.01)
  [env] = result['env_steps']
  assert ENV_KEYS <= set(env)
  assert env['num_envs'] == 4 and env['steps_per_s'] > 0
  assert env['reset_cost_in_steps'] > 0


def xla_gflop(case):
  """XLA's own count for one update, from shapes alone.

  Taken before XLA's optimisation, which is the same count to 0.1% and saves
  compiling; one update and not a scan, whose body counts once.
  """
  algorithm, stage = case.make(), case.get_stage()
  key = jax.random.key(0)
  state = jax.eval_shape(algorithm.init, key)
  replay = jax.eval_shape(lambda: benchmark.synthetic_replay(case))

  def one(state, replay, key):
    slots = jnp.arange(stage.batch.num_tasks)
    batch = sampler.sample_batch(key, state.step, slots, stage.batch, replay)
    return stage.update(state, batch)

  lowered = jax.jit(one).lower(state, replay, jax.eval_shape(lambda: key))
  return lowered.cost_analysis()['flops'] / 1e9


@pytest.mark.parametrize(
    'case', benchmark.make_cases('paper'),
    ids=lambda case: f'{case.algorithm}-{case.stage}-{case.variant}')
def test_flop_count_against_xla_at_the_published_sizes(case):
  # XLA also counts elementwise work, so it must not come out below ours.
  assert 0.99 < xla_gflop(case) / case.gflop() < 1.05


def test_published_flop_counts():
  counts = {
      (c.algorithm, c.stage, c.variant): c.gflop()
      for c in benchmark.make_cases('paper')}
  assert counts['smac', 'offline', 'released'] == pytest.approx(2.9, rel=0.05)
  assert counts['smac', 'online', 'released'] == pytest.approx(6.4, rel=0.05)
  assert counts['pearl', 'online', '16_tasks'] == pytest.approx(27, rel=0.05)


def test_switches_change_the_flop_count():
  case = benchmark.make_cases('smoke')[0]
  config = dataclasses.replace(case.config, backprop_q_into_encoder=True)
  through = case._replace(config=config)
  extra = through.gflop() - case.gflop()
  # An input gradient of the first layer of two critics, [32, 10] x [10, 16].
  assert extra * 1e9 == pytest.approx(2 * 2 * 32 * 10 * 16)


def test_dense_layers_by_hand():
  layers = ((3, 5), (5, 2))  # 15 and 10 weights
  flop = lambda *gradients: benchmark.Evaluation(
      'net', layers, 7, 2, *gradients).flop() / (2 * 7 * 2)
  assert flop() == 25
  assert flop(True) == 25 + 25 + 10  # no gradient into the first input
  assert flop(True, True) == 75
  assert flop(False, True) == 50


def test_shares_of_a_run(tmp_path, capsys):
  (tmp_path / 'timing.json').write_text(
      json.dumps({'collect': 10.0, 'online/smac': 30.0}))
  result = benchmark.run(benchmark.Options(
      only=('workdir',), workdir=str(tmp_path)))
  assert result['workdir']['total_s'] == 40.0
  assert result['workdir']['stages'] == [
      {'stage': 'online/smac', 'seconds': 30.0, 'share': 0.75},
      {'stage': 'collect', 'seconds': 10.0, 'share': 0.25}]
  assert 'online/smac' in capsys.readouterr().out


def test_unknown_part_is_one_clear_error_and_writes_nothing(tmp_path):
  out = tmp_path / 'speed.json'
  done = command('--only=smac,dreamer', f'--out={out}')
  assert done.returncode == 1
  assert done.stderr.strip().splitlines()[-1] == (
      "error: --only: unknown 'dreamer'; known: pearl, smac, env, workdir")
  assert not out.exists()


@pytest.mark.parametrize('changes, message', [
    ({'profile': 'huge'}, "--profile: unknown 'huge'"),
    ({'env_families': ('walker',)}, "--env_families: unknown 'walker'"),
    ({'env_backends': ('bullet',)}, "--env_backends: unknown 'bullet'"),
    ({'seeds': (0,)}, '--seeds'),
    ({'repeats': 0}, '--repeats'),
    ({'only': ('workdir',)}, '--workdir=DIR'),
    ({'only': ('workdir',), 'workdir': '/nowhere'}, 'timing.json not found'),
])
def test_bad_options(changes, message):
  with pytest.raises(benchmark.BenchmarkError, match=message):
    benchmark.validate(dataclasses.replace(QUICK, **changes))


def test_a_broken_timing_file_is_named(tmp_path):
  path = tmp_path / 'timing.json'
  path.write_text('{"collect": 1')
  with pytest.raises(benchmark.BenchmarkError, match=str(path)):
    benchmark.read_workdir(str(tmp_path))


def test_importing_defines_no_flags():
  assert 'only' not in flags.FLAGS  # experiments.run may live beside it
