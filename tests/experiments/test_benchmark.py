"""The speed report: its schema, its FLOP counts and its messages."""

import copy
import dataclasses
import json
import os
import pathlib
import subprocess
import sys

from absl import flags
import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest

from experiments import benchmark
from experiments.benchmarking import (
    agreement,
    BenchmarkError,
    cases,
    environments,
    episodes,
    flops,
    options,
    plots,
    results,
    workdir,
)
from offmeta import envs
from offmeta.algorithms import ALGORITHMS
from offmeta.testing import probes

ROOT = pathlib.Path(benchmark.__file__).parents[1]
UPDATE_KEYS = {
    'algorithm', 'stage', 'profile', 'seeds', 'updates_per_s',
    'gflop_per_update', 'fraction_of_ceiling', 'compile_s'}
ENV_KEYS = {
    'family', 'backend', 'num_envs', 'steps_per_s', 'compile_s',
    'reset_compile_s', 'reset_cost_in_steps', 'traces', 'reset_traces',
    'timed_steps'}
QUICK = options.Options(profile='smoke', repeats=2, repeat_s=0.02, chunk=5)


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


def test_several_seeds_count_together():
  result = benchmark.run(dataclasses.replace(
      QUICK, only=('sac',), seeds=(1, 3), matmul_precision='bfloat16'))
  assert [u['seeds'] for u in result['updates']] == [1, 3]
  for row in (*result['updates'], result['ceiling']):
    assert row['matmul_precision'] == 'bfloat16'
  # As the ceiling does, which they are a fraction of; there are 4.
  assert [u['devices'] for u in result['updates']] == [1, 1]
  one, three = result['updates']
  assert one['gflop_per_update'] == three['gflop_per_update']
  assert three['ms_per_update_of_all_seeds'] == pytest.approx(
      3e3 / three['updates_per_s'], rel=0.01)


def xla_gflop(case):
  """XLA's own count for one update, from shapes alone.

  Taken before XLA's optimisation, which is the same count to 0.1% and saves
  compiling. The body of a loop counts once.
  """
  lowered = jax.jit(case.get_stage().update).lower(*case.shapes())
  return lowered.cost_analysis()['flops'] / 1e9


@pytest.mark.parametrize(
    'case', cases.make_cases('paper'),
    ids=lambda case: f'{case.algorithm}-{case.stage}-{case.variant}')
def test_flop_count_against_xla_at_the_published_sizes(case):
  gflop, in_loops = case.gflop(), 0.0
  if getattr(case.config, 'task_loop', '') == 'scan':
    case = case._replace(
        config=dataclasses.replace(case.config, task_loop='vmap'))
  if case.variant == 'vae_50_times':
    # The GRU's 399 other steps, [32, 128] x [128, 384], forwards and twice
    # backwards.
    in_loops = 399 * 3 * 2 * 32 * 128 * 384 / 1e9
  # XLA also counts elementwise work, so it must not come out below ours.
  assert 0.99 < (xla_gflop(case) + in_loops) / gflop < 1.06


def test_flop_count_of_the_sac_actor():
  case = cases.make_cases('paper')[0]
  case = case._replace(config=dataclasses.replace(case.config, actor='sac'))
  assert 0.99 < xla_gflop(case) / case.gflop() < 1.05


def test_published_flop_counts():
  counts = {
      (c.algorithm, c.stage, c.variant): c.gflop()
      for c in cases.make_cases('paper', ('smac', 'pearl', 'sac'))}
  assert counts['smac', 'offline', 'released'] == pytest.approx(2.848, 1e-3)
  assert counts['smac', 'online', 'released'] == pytest.approx(6.229, 1e-3)
  assert counts['pearl', 'online', '16_tasks'] == pytest.approx(26.94, 1e-3)
  # Single-task SAC by hand: 256 rows, layers of critic and actor.
  critic, actor = (
      np.array([size * 256, 256 * 256, 256 * out])
      for size, out in ((26, 1), (20, 12)))
  weights = (
      actor.sum() + 2 * critic.sum()  # target
      + 2 * (3 * critic.sum() - critic[0])  # critics learn
      + 3 * actor.sum() - actor[0]
      + 2 * 2 * critic.sum())  # on the way to the actor
  assert counts['sac', 'online', 'one_task'] == pytest.approx(
      2 * 256 * weights / 1e9, 1e-6)


def test_switches_change_the_flop_count():
  case = cases.make_cases('smoke')[0]

  def extra(encoder_loss):
    config = dataclasses.replace(case.config, encoder_loss=encoder_loss)
    return (case._replace(config=config).gflop() - case.gflop()) * 1e9

  # An input gradient of the first layer, [32, 10] x [10, 16], of two critics;
  # with 'q' none of the decoder's.
  layer = 2 * 32 * 10 * 16
  assert extra('both') == pytest.approx(2 * layer)
  assert extra('q') == pytest.approx(layer)


def test_flops_of_gradients_by_hand():
  x, first, second = (jnp.ones(n) for n in ((7, 3), (3, 5), (5, 2)))

  def loss(x, first, second):
    return jnp.sum(jnp.square(jax.nn.relu(x @ first) @ second))

  flop = lambda *which: flops.count(
      jax.grad(loss, which), x, first, second) / (2 * 7)
  assert flops.count(loss, x, first, second) == 2 * 7 * 25
  assert flop(1, 2) == 25 + 25 + 10  # no gradient into the first input
  assert flop(0, 1, 2) == 75
  assert flop(0) == 50


def test_flops_of_loops_and_branches_by_hand():
  x, square, wide = (jnp.ones(n) for n in ((2, 3), (3, 3), (3, 6)))
  each = 2 * 2 * 3 * 3

  def steps(x):
    return jax.lax.scan(
        lambda c, _: (c @ square, c @ wide), x, length=5)

  assert flops.count(steps, x) == 5 * 3 * each
  assert flops.count(lambda x: jax.jit(steps)(x)[0], x) == 5 * each
  assert flops.count(jax.vmap(steps), jnp.ones((4, 2, 3))) == 4 * 5 * 3 * each
  assert flops.count(lambda x: jax.lax.cond(
      x[0, 0] > 0, lambda: x @ square, lambda: (x @ wide)[:, :3]),
                     x) == 2 * each
  assert flops.count(lambda x: jax.lax.while_loop(
      lambda x: x[0, 0] < 9, lambda x: x + 1, x) @ square, x) == each
  with pytest.raises(ValueError, match="those of 'while' cannot"):
    flops.count(lambda x: jax.lax.while_loop(
        lambda x: x[0, 0] < 9, lambda x: x @ square, x), x)
  with pytest.raises(ValueError, match="'conv_general_dilated' cannot"):
    flops.count(lambda x: jnp.convolve(x[0], x[1]), x)


# Cases.


@pytest.mark.parametrize('profile', options.PROFILES)
def test_every_algorithm_has_its_cases(profile):
  found = cases.make_cases(profile)
  names = [(c.algorithm, c.stage, c.variant) for c in found]
  assert len(set(names)) == len(names)
  assert {c.algorithm for c in found} == ALGORITHMS.keys() == (
      plots.MARKS.keys())
  assert set(ALGORITHMS) <= set(options.DEFAULT_PARTS)
  batches = {name: c.get_stage().batch for name, c in zip(names, found)}
  if profile == 'paper':
    sizes = {
        'macaw': (5, 256), 'multitask': (5, 256), 'meta_bc': (5, 256),
        'focal': (16, 256), 'csro': (16, 256), 'unicorn': (16, 256)}
    for (name, *_), batch in batches.items():
      if name in sizes:
        assert (batch.num_tasks, batch.query_size) == sizes[name]
    rl = batches['borel', 'offline', 'rl']
    assert (rl.num_tasks, rl.query_size) == (16, 256)
    vae = batches['borel', 'offline', 'vae_50_times']
    assert (vae.num_tasks, vae.num_sequences, vae.sequence_size) == (4, 8, 400)
  for case in found:
    if hasattr(case.config, 'num_train_tasks'):
      assert case.config.num_train_tasks == case.num_tasks


def test_returns_in_the_synthetic_data():
  [case] = cases.make_cases('smoke', ('multitask',))  # episodes of 8 steps
  buffer = cases.synthetic_replay(case).rl
  reward = np.asarray(buffer.data.reward)
  assert reward.shape == (16, 64)
  extras = buffer.data.extras
  power = case.config.discount ** np.arange(8)
  np.testing.assert_allclose(
      extras['return_to_go'][:, 0::8], reward.reshape(16, 8, 8) @ power,
      rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(
      extras['last_observation'][:, 3],
      buffer.data.next_observation[:, 7])


def test_sequences_in_the_synthetic_data():
  case = cases.make_cases('smoke', ('borel',))[1]  # 2 episodes of 8 steps
  buffer = cases.synthetic_replay(case).rl
  np.testing.assert_array_equal(
      buffer.sequence_start, np.tile([0, 16, 32, 48], (16, 1)))
  np.testing.assert_array_equal(buffer.sequence_length, 16)
  np.testing.assert_array_equal(buffer.num_sequences, 4)
  np.testing.assert_array_equal(
      buffer.data.extras['time'], np.tile(np.arange(64) % 8, (16, 1)))


@pytest.mark.usefixtures('compile_once')
def test_stages_with_what_they_need_of_the_data():
  # The second stage takes the beliefs of the first one's encoder.
  result = benchmark.run(dataclasses.replace(
      QUICK, only=('borel', 'multitask'), repeats=1, repeat_s=0.01, chunk=2))
  assert [(u['algorithm'], u['variant']) for u in result['updates']] == [
      ('multitask', 'released'), ('borel', 'rl'), ('borel', 'vae_4_times')]
  for row in result['updates']:
    assert row['updates_per_s'] > 0 and row['gflop_per_update'] > 0
  assert [u['sizes']['context_size'] for u in result['updates']] == [
      1, 1, 2 * 16]


def test_shares_of_a_run(tmp_path, capsys):
  (tmp_path / 'timing.json').write_text(
      json.dumps({'collect': 10.0, 'online/smac': 30.0}))
  result = benchmark.run(options.Options(
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
      "error: --only: unknown 'dreamer'; known: borel, csro, focal, macaw,"
      ' meta_bc, multitask, pearl, sac, smac, unicorn, env, workdir, scaling,'
      ' growth, startup')
  assert not out.exists()


@pytest.mark.parametrize('changes, message', [
    ({'profile': 'huge'}, "--profile: unknown 'huge'"),
    ({'env_families': ('walker',)}, "--env_families: unknown 'walker'"),
    ({'env_backends': ('bullet',)}, "--env_backends: unknown 'bullet'"),
    ({'matmul_precision': 'fp8'}, "--matmul_precision: unknown 'fp8'"),
    ({'only': ('env', 'startup'), 'matmul_precision': 'bfloat16'},
     '--matmul_precision is of updates'),
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
])
def test_bad_options(changes, message):
  with pytest.raises(BenchmarkError, match=message):
    options.validate(dataclasses.replace(QUICK, **changes))


def test_tensorfloat32_is_of_gpus(monkeypatch):
  chosen = dataclasses.replace(
      QUICK, only=('sac',), matmul_precision='tensorfloat32')
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
  result = benchmark.run(dataclasses.replace(
      QUICK, only=('env',), num_envs=(1, 4)))
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
      lifetime.mean(), rel=1e-3)


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
      cheetah, 4, dataclasses.replace(QUICK, env_steps=3))
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
      '</mujoco>')
  before = model.body_mass.copy()
  changed = agreement.changed_model(model, {
      'body_mass': np.array([0.0, 2.5], np.float32),
      'opt.gravity': np.array([0.0, 0.0, -1.0])})
  np.testing.assert_array_equal(changed.body_mass, [0.0, 2.5])
  np.testing.assert_array_equal(changed.opt.gravity, [0.0, 0.0, -1.0])
  np.testing.assert_array_equal(model.body_mass, before)
  assert model.opt.gravity[2] == -9.81


def test_backends_of_a_family():
  chosen = options.Options(
      env_families=('point_robot', 'walker_params', 'ant_dir'),
      env_backends=('default', 'mjx'))
  assert environments.cases(chosen) == [
      ('point_robot', 'jax'), ('walker_params', 'mjx'),
      ('ant_dir', 'spring'), ('ant_dir', 'mjx')]


def test_a_refused_backend_is_a_row_with_its_reason(capsys):
  result = benchmark.run(options.Options(
      only=('env',), env_families=('walker_params',),
      env_backends=('spring',)))
  [row] = result['env_refused']
  assert row['backend'] == 'spring' and 'would ignore' in row['reason']
  assert result['env_steps'] == result['env_stability'] == []
  assert row['reason'] in capsys.readouterr().out


def test_a_stopped_command_goes_on_with_its_file(tmp_path):
  out = tmp_path / 'speed.json'
  quick = ('--profile=smoke', '--only=env', f'--out={out}', '--resume')
  done = command(*quick, '--num_envs=2')
  assert done.returncode == 0, done.stderr
  first = json.loads(out.read_text())
  # Another size is added; what is there is not measured again.
  saved = []
  result = benchmark.run(
      dataclasses.replace(QUICK, only=('env',), num_envs=(2, 3)),
      lambda: results.resume_result(out), saved.append)
  assert [row['num_envs'] for row in result['env_steps']] == [2, 3]
  assert result['env_steps'][0] == first['env_steps'][0]
  assert result['env_stability'] == first['env_stability']
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
