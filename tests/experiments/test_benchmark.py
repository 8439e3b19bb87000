"""The speed report: its schema, its environments and its messages."""

import copy
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from unittest import mock

from absl import flags
import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest

from experiments import benchmark
from experiments.benchmarking import (
  BenchmarkError,
  agreement,
  environments,
  episodes,
  options,
  results,
  workdir,
)
from offmeta import envs
from offmeta.testing import probes

ROOT = pathlib.Path(benchmark.__file__).parents[1]
UPDATE_KEYS = {
  'algorithm',
  'stage',
  'profile',
  'seeds',
  'updates_per_s',
  'gflop_per_update',
  'fraction_of_ceiling',
  'compile_s',
}
ENV_KEYS = {
  'family',
  'backend',
  'num_envs',
  'steps_per_s',
  'compile_s',
  'reset_compile_s',
  'reset_cost_in_steps',
  'traces',
  'reset_traces',
  'timed_steps',
}
QUICK = options.Options(profile='smoke', repeats=2, repeat_s=0.02, chunk=5)


@pytest.fixture(name='written', scope='module')
def _written(tmp_path_factory):
  """(what the command said, its file); do not write to it."""
  out = tmp_path_factory.mktemp('benchmark') / 'speed.json'
  done = subprocess.run(
    [
      sys.executable,
      '-m',
      'experiments.benchmark',
      '--profile=smoke',
      '--only=sac,env',
      '--seeds=1,3',
      '--matmul_precision=bfloat16',
      '--num_envs=2',
      '--repeats=2',
      f'--out={out}',
      '--resume',
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=120,
    env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
  )
  assert done.returncode == 0, done.stderr
  return done, out


def test_the_fixed_command_writes_the_fixed_schema(written):
  done, out = written
  result = json.loads(out.read_text())
  assert {
    'machine',
    'versions',
    'ceiling_gflops',
    'updates',
    'env_steps',
  } <= set(result)
  assert {'cpu', 'cores', 'platform', 'device_kind'} <= set(result['machine'])
  assert {'python', 'jax', 'jaxlib', 'brax', 'mujoco', 'flax', 'optax'} <= set(
    result['versions']
  )
  for update in result['updates']:
    assert UPDATE_KEYS <= set(update)
    assert (update['algorithm'], update['stage']) == ('sac', 'online')
    assert update['variant'] == 'one_task'
    assert update['data'] == 'synthetic'
    assert update['profile'] == 'smoke'
    assert update['recompilations_while_timing'] == 0
    assert update['compile_s'] > 0
    low, high = update['updates_per_s_spread']
    assert 0 < low <= update['updates_per_s'] <= high
    share = (
      update['updates_per_s']
      * update['gflop_per_update']
      / result['ceiling_gflops']
    )
    assert update['fraction_of_ceiling'] == pytest.approx(share, rel=0.01)
    assert update['variant'] in done.stdout
  ways = result['ceiling']['gflops']
  assert result['ceiling_gflops'] == max(ways.values()) > 0
  assert [p.name for p in out.parent.iterdir()] == ['speed.json']


def test_several_seeds_count_together(written):
  result = json.loads(written[1].read_text())
  assert [u['seeds'] for u in result['updates']] == [1, 3]
  for row in (*result['updates'], result['ceiling']):
    assert row['matmul_precision'] == 'bfloat16'
  # As the ceiling does, which they are a fraction of; there are 4.
  assert [u['devices'] for u in result['updates']] == [1, 1]
  one, three = result['updates']
  assert one['gflop_per_update'] == three['gflop_per_update']
  assert three['ms_per_update_of_all_seeds'] == pytest.approx(
    3e3 / three['updates_per_s'], rel=0.01
  )


def test_shares_of_a_run(tmp_path, capsys):
  (tmp_path / 'timing.json').write_text(
    json.dumps({'collect': 10.0, 'online/smac': 30.0})
  )
  result = benchmark.run(
    options.Options(only=('workdir',), workdir=str(tmp_path))
  )
  assert result['workdir']['total_s'] == 40.0
  assert result['workdir']['stages'] == [
    {'stage': 'online/smac', 'seconds': 30.0, 'share': 0.75},
    {'stage': 'collect', 'seconds': 10.0, 'share': 0.25},
  ]
  assert 'online/smac' in capsys.readouterr().out


def test_unknown_part_is_one_clear_error_and_writes_nothing():
  """As of a command that fails: `test_benchmark_results`."""
  nothing = mock.Mock(side_effect=AssertionError)
  with pytest.raises(BenchmarkError) as caught:
    benchmark.run(
      dataclasses.replace(QUICK, only=('smac', 'dreamer')), nothing, nothing
    )
  assert str(caught.value) == (
    "--only: unknown 'dreamer'; known: borel, csro, focal, macaw,"
    ' meta_bc, multitask, pearl, sac, smac, unicorn, env, workdir, scaling,'
    ' growth, startup'
  )


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'profile': 'huge'}, "--profile: unknown 'huge'"),
    ({'env_families': ('walker',)}, "--env_families: unknown 'walker'"),
    ({'env_backends': ('bullet',)}, "--env_backends: unknown 'bullet'"),
    ({'matmul_precision': 'fp8'}, "--matmul_precision: unknown 'fp8'"),
    (
      {'only': ('env', 'startup'), 'matmul_precision': 'bfloat16'},
      '--matmul_precision is of updates',
    ),
    ({'seeds': (0,)}, '--seeds'),
    ({'devices': (2, 3)}, '--devices: 8 seeds'),
    ({'algorithms': ('smac', 'env')}, "--algorithms: unknown 'env'"),
    ({'algorithms': ()}, '--algorithms: at least one'),
    ({'only': ('env',), 'overhead': True}, 'are of updates'),
    ({'only': ('growth',), 'trace_dir': '/tmp'}, 'are of updates'),
    ({'only': ('sac',), 'overhead': True, 'chunk': 3}, 'at least 4'),
    ({'num_envs': (4, 0)}, '--num_envs'),
    ({'env_steps': -1}, '--env_steps'),
    ({'repeats': 0}, '--repeats'),
    ({'only': ('workdir',)}, '--workdir=DIR'),
    ({'only': ('workdir',), 'workdir': '/nowhere'}, 'timing.json not found'),
  ],
)
def test_bad_options(changes, message):
  with pytest.raises(BenchmarkError, match=message):
    options.validate(dataclasses.replace(QUICK, **changes))


def test_tensorfloat32_is_of_gpus(monkeypatch):
  chosen = dataclasses.replace(
    QUICK, only=('sac',), matmul_precision='tensorfloat32'
  )
  with pytest.raises(BenchmarkError, match='on GPUs only, and this is a cpu'):
    benchmark.run(chosen)
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  options.validate_device(chosen)


def test_a_broken_timing_file_is_named(tmp_path):
  path = tmp_path / 'timing.json'
  path.write_text('{"collect": 1')
  with pytest.raises(BenchmarkError, match=str(path)):
    workdir.read_workdir(str(tmp_path))


# Environments.


@pytest.fixture(scope='module')
def cheetah():
  """A family on MJX, to be compiled for 4 environments side by side."""
  return episodes.Programs(envs.make('cheetah_vel', backend='mjx'))


def test_env_tables_of_a_family_without_a_simulator(capsys):
  result = benchmark.run(
    dataclasses.replace(QUICK, only=('env',), num_envs=(1, 4))
  )
  assert [row['num_envs'] for row in result['env_steps']] == [1, 4]
  for row in result['env_steps']:
    assert ENV_KEYS <= set(row)
    low, high = row['steps_per_s_spread']
    assert 0 < low <= row['steps_per_s'] <= high
    assert row['traces'] == row['reset_traces'] == 1
    assert row['reset_cost_in_steps'] > 0
    assert 10 <= row['timed_steps'] <= row['episode_length'] == 20
  [row] = result['env_stability']
  assert (row['family'], row['backend']) == ('point_robot', 'jax')
  assert row['terminated'] == row['diverged'] == row['non_finite'] == 0
  assert row['max_qd'] is row['median_steps_to_termination'] is None
  assert result['env_agreement'] == result['env_refused'] == []
  printed = capsys.readouterr().out
  assert 'Environment steps' in printed and 'Stability' in printed


def test_stability_counts_until_the_termination():
  family = probes.CountingFamily(episode_length=8, terminates=True)
  programs = episodes.Programs(family)
  row = environments.measure_stability(programs, 32)
  lifetime = np.asarray(programs.start(0, 32)[0]['lifetime'])
  # One that ends at the time limit ends by a termination all the same. What
  # the family does after its lifetime is NaN and must not be counted.
  assert row['terminated'] == 1.0 and row['non_finite'] == 0
  assert row['median_steps_to_termination'] == np.median(lifetime)
  assert row['mean_steps_before_termination'] == pytest.approx(
    lifetime.mean(), rel=1e-3
  )


def test_stability_counts_blow_ups_and_starts_again():
  programs = episodes.Programs(probes.BlowsUp(episode_length=8))
  row = environments.measure_stability(programs, 4)
  assert row['diverged'] == 4 * 2 and row['terminated'] == 0.0
  family = probes.PoisonedReward(probes.CountingFamily(episode_length=8))
  row = environments.measure_stability(episodes.Programs(family), 4)
  assert row['non_finite'] == 4 * 8


def test_mjx_agrees_with_c_mujoco_and_the_measure_can_tell(cheetah):
  row = agreement.measure_agreement(cheetah, 4)
  assert row['dq_median'] < 1e-3 and row['dqd_median'] < 3e-2
  assert row['dq_median'] <= row['dq_p95'] <= row['dq_max']
  assert row['mean_contacts'] > 0 and row['c_dq_max'] > 0
  # The same with five times the mass of the torso in C MuJoCo only.
  family = cheetah.family
  model = copy.copy(family.simulator.model)
  model.body_mass[1] *= 5.0
  cheetah.family = copy.copy(family)
  cheetah.family.simulator = family.simulator._replace(model=model)
  heavy = agreement.measure_agreement(cheetah, 4)
  cheetah.family = family
  assert heavy['dq_median'] > 1e-2
  assert cheetah.traces == {4: 1}
  speed = environments.measure_speed(
    cheetah, 4, dataclasses.replace(QUICK, env_steps=3)
  )
  assert speed['timed_steps'] == 3 and speed['traces'] == 1
  stability = environments.measure_stability(cheetah, 4)
  assert stability['diverged'] == stability['non_finite'] == 0
  assert 5 < stability['max_qd'] < 50


def test_what_a_family_hands_to_its_simulator():
  family = envs.make('walker_params')
  task = envs.take_tasks(family.sample_tasks(jax.random.key(0), 1), 0)
  state = family.reset(jax.random.key(1), task)
  action = 3.0 * jnp.ones(6)
  control, changes = agreement.commands(family, state, action, task)
  np.testing.assert_array_equal(control, np.ones(6))
  expected = family.system_changes(task)
  assert changes.keys() == expected.keys() and len(changes) == 4
  model = agreement.changed_model(family.simulator.model, changes)
  for name, value in expected.items():
    np.testing.assert_array_equal(getattr(model, name), value)
    assert np.any(value != getattr(family.simulator.model, name))


def test_tasks_are_written_into_a_copy_of_the_c_model():
  model = mujoco.MjModel.from_xml_string(
    '<mujoco><worldbody><body><joint/><geom size="1"/></body></worldbody>'
    '</mujoco>'
  )
  before = model.body_mass.copy()
  changed = agreement.changed_model(
    model,
    {
      'body_mass': np.array([0.0, 2.5], np.float32),
      'opt.gravity': np.array([0.0, 0.0, -1.0]),
    },
  )
  np.testing.assert_array_equal(changed.body_mass, [0.0, 2.5])
  np.testing.assert_array_equal(changed.opt.gravity, [0.0, 0.0, -1.0])
  np.testing.assert_array_equal(model.body_mass, before)
  assert model.opt.gravity[2] == -9.81


def test_backends_of_a_family():
  chosen = options.Options(
    env_families=('point_robot', 'walker_params', 'ant_dir'),
    env_backends=('default', 'mjx'),
  )
  assert environments.cases(chosen) == [
    ('point_robot', 'jax'),
    ('walker_params', 'mjx'),
    ('ant_dir', 'spring'),
    ('ant_dir', 'mjx'),
  ]


def test_a_refused_backend_is_a_row_with_its_reason(capsys):
  result = benchmark.run(
    options.Options(
      only=('env',), env_families=('walker_params',), env_backends=('spring',)
    )
  )
  [row] = result['env_refused']
  assert row['backend'] == 'spring' and 'would ignore' in row['reason']
  assert result['env_steps'] == result['env_stability'] == []
  assert row['reason'] in capsys.readouterr().out


def test_a_stopped_command_goes_on_with_its_file(written):
  out = written[1]
  first = json.loads(out.read_text())
  # Another size is added; what is there is not measured again.
  saved = []
  result = benchmark.run(
    dataclasses.replace(QUICK, only=('env',), num_envs=(2, 3)),
    lambda: results.resume_result(out),
    saved.append,
  )
  assert [row['num_envs'] for row in result['env_steps']] == [2, 3]
  assert result['env_steps'][0] == first['env_steps'][0]
  for name in ('env_stability', 'updates', 'ceiling'):
    assert result[name] == first[name]
  assert saved == [result]  # one new row


def test_another_machine_is_refused(tmp_path):
  path = tmp_path / 'speed.json'
  other = results.new_result()
  other['versions']['jax'] = '0.1'
  path.write_text(json.dumps(other))
  with pytest.raises(BenchmarkError, match='another versions.jax;'):
    results.resume_result(path)
  path.write_text('[]')
  with pytest.raises(BenchmarkError, match='not a result'):
    results.resume_result(path)


def test_importing_defines_no_flags():
  assert 'only' not in flags.FLAGS  # experiments.run may live beside it
