"""The updates that the speed report measures, and their FLOP counts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import benchmark
from experiments.benchmarking import cases, flops, options, plots
from offmeta.algorithms import ALGORITHMS
from offmeta.types import Sequences

QUICK = options.Options(
  profile='smoke',
  repeats=1,
  repeat_s=0.01,
  chunk=2,
  only=('borel',),
)
# Of one update of one seed.
PUBLISHED = {
  ('smac', 'offline', 'released'): 2.848,
  ('smac', 'online', 'released'): 6.229,
  ('pearl', 'online', '16_tasks'): 26.94,
}


_COUNTED = {}


def gflops(case):
  """(ours, XLA's own count) for one update, from shapes alone; traced once.

  XLA's is taken before its optimisation, which is the same count to 0.1% and
  saves compiling. The body of a loop counts once.
  """
  key = case.algorithm, case.stage, str(case.config), str(case.sizes)
  key += (case.number,)
  if key not in _COUNTED:
    update, shapes = jax.jit(case.get_stage().update), case.shapes()
    theirs = update.lower(*shapes).cost_analysis()['flops']
    _COUNTED[key] = flops.count(update, *shapes) / 1e9, theirs / 1e9
  return _COUNTED[key]


@pytest.mark.parametrize(
  'case',
  cases.make_cases('paper'),
  ids=lambda case: f'{case.algorithm}-{case.stage}-{case.variant}',
)
def test_flop_count_against_xla_at_the_published_sizes(case):
  gflop, in_loops, name = None, 0.0, (case.algorithm, case.stage, case.variant)
  if getattr(case.config, 'task_loop', '') == 'scan':
    gflop = case.gflop()
    case = case._replace(
      config=dataclasses.replace(case.config, task_loop='vmap')
    )
  ours, xla_gflop = gflops(case)
  gflop = gflop or ours
  if case.variant == 'vae_50_times':
    # The GRU's 399 other steps, [32, 128] x [128, 384], forwards and twice
    # backwards.
    in_loops = 399 * 3 * 2 * 32 * 128 * 384 / 1e9
  # XLA also counts elementwise work, so it must not come out below ours.
  assert 0.99 < (xla_gflop + in_loops) / gflop < 1.06
  assert gflop == pytest.approx(PUBLISHED.get(name, gflop), 1e-3)


def test_flop_count_of_the_sac_actor():
  case = cases.make_cases('paper')[0]
  case = case._replace(config=dataclasses.replace(case.config, actor='sac'))
  ours, theirs = gflops(case)
  assert 0.99 < theirs / ours < 1.05


def test_published_flop_count_of_single_task_sac():
  names = [(c.algorithm, c.stage, c.variant) for c in cases.make_cases('paper')]
  assert PUBLISHED.keys() < set(names)
  [sac] = cases.make_cases('paper', ('sac',))
  # By hand: 256 rows, layers of critic and actor.
  critic, actor = (
    np.array([size * 256, 256 * 256, 256 * out])
    for size, out in ((26, 1), (20, 12))
  )
  weights = (
    actor.sum()
    + 2 * critic.sum()  # target
    + 2 * (3 * critic.sum() - critic[0])  # critics learn
    + 3 * actor.sum()
    - actor[0]
    + 2 * 2 * critic.sum()
  )  # on the way to the actor
  assert sac.gflop() == pytest.approx(2 * 256 * weights / 1e9, 1e-6)


def test_switches_change_the_flop_count():
  case = cases.make_cases('smoke')[0]
  without = case.gflop()

  def extra(encoder_loss):
    config = dataclasses.replace(case.config, encoder_loss=encoder_loss)
    return (case._replace(config=config).gflop() - without) * 1e9

  # An input gradient of the first layer, [32, 10] x [10, 16], of two critics;
  # with 'q' none of the decoder's.
  layer = 2 * 32 * 10 * 16
  assert extra('both') == pytest.approx(2 * layer)
  assert extra('q') == pytest.approx(layer)


def test_flops_of_gradients_by_hand():
  x, first, second = (jnp.ones(n) for n in ((7, 3), (3, 5), (5, 2)))

  def loss(x, first, second):
    return jnp.sum(jnp.square(jax.nn.relu(x @ first) @ second))

  flop = lambda *which: (
    flops.count(jax.grad(loss, which), x, first, second) / (2 * 7)
  )
  assert flops.count(loss, x, first, second) == 2 * 7 * 25
  assert flop(1, 2) == 25 + 25 + 10  # no gradient into the first input
  assert flop(0, 1, 2) == 75
  assert flop(0) == 50


def test_flops_of_loops_and_branches_by_hand():
  x, square, wide = (jnp.ones(n) for n in ((2, 3), (3, 3), (3, 6)))
  each = 2 * 2 * 3 * 3

  def steps(x):
    return jax.lax.scan(lambda c, _: (c @ square, c @ wide), x, length=5)

  assert flops.count(steps, x) == 5 * 3 * each
  assert flops.count(lambda x: jax.jit(steps)(x)[0], x) == 5 * each
  assert flops.count(jax.vmap(steps), jnp.ones((4, 2, 3))) == 4 * 5 * 3 * each
  assert (
    flops.count(
      lambda x: jax.lax.cond(
        x[0, 0] > 0, lambda: x @ square, lambda: (x @ wide)[:, :3]
      ),
      x,
    )
    == 2 * each
  )
  assert (
    flops.count(
      lambda x: (
        jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x + 1, x) @ square
      ),
      x,
    )
    == each
  )
  with pytest.raises(ValueError, match="those of 'while' cannot"):
    flops.count(
      lambda x: jax.lax.while_loop(
        lambda x: x[0, 0] < 9, lambda x: x @ square, x
      ),
      x,
    )
  with pytest.raises(ValueError, match="'conv_general_dilated' cannot"):
    flops.count(lambda x: jnp.convolve(x[0], x[1]), x)


# Cases.


@pytest.mark.parametrize('profile', options.PROFILES)
def test_every_algorithm_has_its_cases(profile):
  found = cases.make_cases(profile)
  names = [(c.algorithm, c.stage, c.variant) for c in found]
  assert len(set(names)) == len(names)
  assert names[:3] == [
    ('smac', 'offline', 'released'),
    ('smac', 'online', 'released'),
    ('smac', 'online', 'matched'),
  ]
  drawn = ALGORITHMS.keys() - {'ppo'}  # what is fed from a replay
  assert {c.algorithm for c in found} == drawn == plots.MARKS.keys()
  assert drawn <= set(options.DEFAULT_PARTS)
  batches = {name: c.get_stage().batch for name, c in zip(names, found)}
  if profile == 'paper':
    sizes = {
      'macaw': (5, 256),
      'multitask': (5, 256),
      'meta_bc': (5, 256),
      'focal': (16, 256),
      'csro': (16, 256),
      'unicorn': (16, 256),
    }
    for (name, *_), batch in batches.items():
      if name in sizes:
        assert (batch.num_tasks, batch.query.size) == sizes[name]
    rl = batches['borel', 'offline', 'rl']
    assert (rl.num_tasks, rl.query.size) == (16, 256)
    vae = batches['borel', 'offline', 'vae_50_times']
    assert (vae.num_tasks, vae.context) == (4, Sequences(8, 400))


def test_returns_in_the_synthetic_data():
  [case] = cases.make_cases('smoke', ('multitask',))  # episodes of 8 steps
  buffer = cases.synthetic_replay(case).query
  reward = np.asarray(buffer.data.reward)
  assert reward.shape == (16, 64)
  extras = buffer.data.extras
  power = case.config.discount ** np.arange(8)
  np.testing.assert_allclose(
    extras['return_to_go'][:, 0::8],
    reward.reshape(16, 8, 8) @ power,
    rtol=1e-4,
    atol=1e-5,
  )
  np.testing.assert_array_equal(
    extras['last_observation'][:, 3], buffer.data.next_observation[:, 7]
  )


def test_sequences_in_the_synthetic_data():
  case = cases.make_cases('smoke', ('borel',))[1]  # 3 episodes of 8 steps
  buffer = cases.synthetic_replay(case).query
  np.testing.assert_array_equal(
    buffer.sequence_start, np.tile([0, 24], (16, 1))
  )
  np.testing.assert_array_equal(buffer.sequence_length, 24)
  np.testing.assert_array_equal(buffer.num_sequences, 2)
  np.testing.assert_array_equal(
    buffer.data.extras['time'], np.tile(np.arange(64) % 8, (16, 1))
  )


def test_stages_with_what_they_need_of_the_data():
  # The second stage takes the beliefs of the first one's encoder.
  result = benchmark.run(QUICK)
  assert [(u['algorithm'], u['variant']) for u in result['updates']] == [
    ('borel', 'rl'),
    ('borel', 'vae_4_times'),
  ]
  for row in result['updates']:
    assert row['updates_per_s'] > 0 and row['gflop_per_update'] > 0
  assert [u['sizes']['context_size'] for u in result['updates']] == [
    0,
    2 * 24,
  ]
