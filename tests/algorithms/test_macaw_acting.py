"""MACAW: weights of actions, acting, fine-tuning, settings."""

import functools

import helpers
import jax
import jax.numpy as jnp
import macaw_inputs as inputs
import macaw_reference as reference
import numpy as np
import pytest

from offmeta import optim
from offmeta.algorithms import macaw, macaw_losses
from offmeta.losses import policy as policy_losses
from offmeta.networks.distributions import Normal
from offmeta.types import (
  BatchSpec,
  Problem,
  Rows,
  Slice,
)

SPEC, CONFIG = inputs.SPEC, inputs.CONFIG


@pytest.fixture(name='state', scope='module')
def _state():
  return inputs.make_state(CONFIG)


# Parts.


def test_advantage_weights():
  rng = np.random.default_rng(0)
  advantage = rng.normal(3.0, 40.0, (2, 30)).astype(np.float32)
  mask = np.ones((2, 30), np.float32)
  mask[1, 20:] = 0
  # (advantage, mask, ...) -> numpy; one program per number of arguments.
  bounded = jax.jit(
    policy_losses.exponential_advantage_weights, static_argnums=(2, 3, 4)
  )
  logs = np.log(bounded(advantage, mask, 1e9))
  for row, size in zip((0, 1), (30, 20)):
    counted = advantage[row, :size].astype(np.float64)
    np.testing.assert_allclose(logs[row, :size].mean(), 0.0, atol=1e-5)
    np.testing.assert_allclose(
      logs[row, :size],
      (counted - counted.mean()) / counted.std(ddof=1),
      rtol=1e-4,
      atol=1e-5,
    )
  # An upper bound, no lower one.
  outliers, ones = np.zeros((2, 1, 100), np.float32)
  outliers[0, 0] = 50.0
  ones += 1.0
  np.testing.assert_allclose(np.max(bounded(outliers, ones)), 20.0, rtol=1e-5)
  assert float(np.min(bounded(-outliers, ones))) < 1e-3
  np.testing.assert_allclose(  # logarithms 9.9 / 4 and 9.9 / (1 + 5 / 9.9)
    np.log(bounded(outliers, ones, 1e9, 4.0))[0, 0], 9.9 / 4, rtol=1e-4
  )
  np.testing.assert_allclose(
    np.log(bounded(outliers, ones, 1e9, 1.0, 5.0))[0, 0],
    49.5 / 10.0,
    rtol=1e-4,
  )
  for same in (np.full((1, 4), 7.0), np.full((1, 1), -2.0)):
    same = np.float32(same)
    np.testing.assert_array_equal(bounded(same, np.ones_like(same)), 1.0)
  gradient = jax.jit(jax.grad(lambda a: jnp.sum(bounded(a, ones))))(outliers)
  assert not np.any(gradient)


def test_normal_is_not_squashed():
  mean, action = np.float32([[[0.5, -1.0]], [[0.7, -1.0]]])
  expected = -0.5 - 2 * np.log(0.2) - np.log(2 * np.pi)
  log_prob = lambda m: Normal(m, 0.2).log_prob(action)
  found, gradient = jax.jit(
    lambda m: (log_prob(m), jax.grad(lambda m: log_prob(m)[0])(m))
  )(mean)
  np.testing.assert_allclose(found, [expected], rtol=1e-5)
  # Its gradient in the mean is (a - mean) / 0.04.
  np.testing.assert_allclose(gradient, [[5.0, 0.0]], rtol=1e-5, atol=1e-6)


def test_step_sizes_at_the_start():
  tree = {'a': np.ones((2, 3), np.float32), 'b': (np.ones(4, np.float32),)}

  @jax.jit
  def run(tree):
    steps = optim.step_sizes(optim.init_step_sizes(tree, 1e-3))
    double = jax.tree.map(lambda x: 2 * x, tree)
    return steps, optim.inner_sgd(tree, double, steps)

  steps, new = run(tree)
  assert jax.tree.structure(steps) == jax.tree.structure(tree)
  for step in jax.tree.leaves(steps):
    assert step.shape == ()
    np.testing.assert_allclose(step, 9.995e-4, rtol=1e-5)
  for leaf in jax.tree.leaves(new):
    np.testing.assert_allclose(leaf, 1 - 2 * 9.995e-4, rtol=1e-6)


# Acting.

_ALGORITHM = macaw.make(Problem(SPEC, 7), CONFIG)
_init = jax.jit(_ALGORITHM.evaluate.init)
_adapt = jax.jit(_ALGORITHM.evaluate.adapt)


def test_adaptation_is_the_inner_loop(state):
  algorithm = _ALGORITHM
  rows, valid = inputs.make_context(True)
  networks = macaw.make_networks(SPEC, CONFIG)
  counted = jax.tree.map(lambda x: x[None, :6], rows)
  expected = jax.jit(
    lambda: macaw_losses.inner_loop(
      state.params, counted, jnp.ones((1, 6)), networks, CONFIG
    )
  )().policy
  expected = jax.tree.map(lambda x: np.asarray(x)[0], expected)
  params = algorithm.actor_params(state)
  for policy in (
    algorithm.explore,
    algorithm.evaluate,
    algorithm.evaluate_given_context,
  ):
    prior = jax.jit(policy.init)(params, jax.random.key(0))
    adapt = jax.jit(policy.adapt)
    adapted = adapt(params, prior, rows, valid, jax.random.key(1))
    assert adapted.known and not prior.known
    helpers.assert_close(adapted.weights, expected, 1e-4, 1e-5)
    # Self-collected contexts come without returns.
    helpers.assert_close(
      adapt(
        params, prior, *inputs.make_context(False), jax.random.key(1)
      ).weights,
      adapted.weights,
      1e-5,
      1e-6,
    )
    change = jax.tree.map(np.subtract, adapted.weights, prior.weights)
    assert helpers.largest(change) > 1e-3


def test_nothing_valid_is_the_prior_to_the_bit():
  # Large enough for products of one and of three vectors to round apart.
  config = inputs.changed(hidden=(30, 30), latent_size=50)
  algorithm = macaw.make(Problem(SPEC, 7), config)
  params = jax.jit(algorithm.init)(jax.random.key(0)).params
  stack = lambda tree: jax.tree.map(lambda x: np.stack(3 * [x]), tree)
  rows, valid = stack(inputs.make_context(False))
  key = jax.random.key(0)
  adapted = jax.jit(
    jax.vmap(lambda *given: algorithm.evaluate.adapt(params, (), *given, key))
  )(rows, 0 * valid)
  prior = jax.jit(algorithm.evaluate.init)(params, key)
  helpers.assert_same(adapted, stack(prior))


def test_the_state_is_the_small_network(state):
  # 3 x 4 + 4, 4 x 3 + 3, 3 x 2 + 2; 5 x 3 + 3, 3 + 1.
  prior = _init(state.params, jax.random.key(0))
  assert sum(x.size for x in jax.tree.leaves(prior.weights)) == 39 + 22


def test_actions(state):
  algorithm = _ALGORITHM
  prior = _init(state.params, jax.random.key(0))
  known = prior._replace(known=np.ones((), bool))
  observation = np.float32([0.3, -0.2, 0.5])
  keys = jax.random.split(jax.random.key(2), 4000)

  @functools.partial(jax.jit, static_argnums=0)
  def acting(policy, belief):
    return jax.vmap(
      lambda key: policy.act(state.params, belief, observation, key)[0]
    )(keys)

  act = lambda policy, belief: np.asarray(acting(policy, belief))
  networks = macaw.make_networks(SPEC, CONFIG)
  mean = np.asarray(
    jax.jit(networks.policy.apply)(state.params['policy'], observation)
  )
  given = algorithm.evaluate_given_context
  for policy, belief in (
    (algorithm.evaluate, known),
    (given, known),
    (given, prior),
  ):
    np.testing.assert_allclose(
      act(policy, belief), np.tile(mean, (4000, 1)), atol=1e-6
    )
  expected = np.clip(
    mean + 0.2 * np.random.default_rng(0).normal(size=(4000, 2)), -1, 1
  )
  # What collects for itself explores until it knows something.
  for policy, belief in (
    (algorithm.explore, prior),
    (algorithm.explore, known),
    (algorithm.evaluate, prior),
  ):
    noisy = act(policy, belief)
    np.testing.assert_allclose(noisy.mean(0), expected.mean(0), atol=0.02)
    np.testing.assert_allclose(noisy.std(0), expected.std(0), rtol=0.05)
  saturated = prior._replace(
    weights=jax.tree.map(lambda x: 30 * np.asarray(x), prior.weights)
  )
  action, _, _ = jax.jit(algorithm.explore.act)(
    state.params, saturated, observation, keys[0]
  )
  assert np.max(np.abs(action)) <= 1.0


# Fine-tuning.


_begin = jax.jit(_ALGORITHM.loop('finetune').begin)


@pytest.fixture(name='begun', scope='module')
def _begun(state):
  return _begin(state, *inputs.make_context(True))


def test_fine_tuning_starts_from_the_adapted_networks(state, begun):
  algorithm = _ALGORITHM
  assert jax.tree.structure(algorithm.actor_params(begun)) == (
    jax.tree.structure(algorithm.actor_params(state))
  )
  key = jax.random.key(0)
  adapted = _adapt(state.params, (), *inputs.make_context(True), key)
  helpers.assert_close(
    _init(begun.params, key).weights,
    adapted.weights,
    1e-4,
    1e-5,
  )
  networks = macaw.make_networks(SPEC, CONFIG)
  rows, valid = jax.tree.map(lambda x: x[None], inputs.make_context(True))
  inner, generated = jax.jit(
    lambda: (
      macaw_losses.inner_loop(state.params, rows, valid, networks, CONFIG),
      networks.value.generate(begun.params['value']),
    )
  )()
  helpers.assert_close(
    generated,
    jax.tree.map(lambda x: np.asarray(x)[0], inner.value),
    1e-4,
    1e-5,
  )
  assert set(begun.opt_state) == {'policy', 'value'}
  assert int(begun.step) == 0
  nothing = _begin(state, inputs.make_context(True)[0], np.zeros(8, np.float32))
  helpers.assert_same(nothing.params, state.params)


def test_stages_of_fine_tuning(begun):
  algorithm = macaw.make(Problem(SPEC, 7), CONFIG)
  value, policy = algorithm.loop('finetune').stages
  assert [(s.name, s.num_steps) for s in algorithm.loop('finetune').stages] == [
    ('finetune_value', 2),
    ('finetune_policy', 3),
  ]
  for stage in algorithm.loop('finetune').stages:
    assert stage.batch == BatchSpec(
      1, Rows(5, replacement=False), replacement=False
    )
  batch = helpers.random_batch(4, SPEC, value.batch, algorithm.data)
  rows = reference.task_rows(batch.query, 0)
  own = reference.Macaw(begun.params, CONFIG)
  phi, theta = (
    reference.vector(begun.params[name]) for name in ('value', 'policy')
  )
  # Plain returns for the value; the policy's advantages bootstrap.
  error = np.mean((own.value(phi, rows['s']) - rows['return_to_go']) ** 2)
  awr, _ = own.awr_and_advantage_loss(theta, phi, rows)
  for stage, group, expected in (
    (value, 'value', error),
    (policy, 'policy', awr),
  ):
    update = jax.jit(stage.update)
    after, logs = update(begun, batch)
    np.testing.assert_allclose(logs[f'{group}/loss'], expected, rtol=1e-4)
    moved = jax.tree.map(np.subtract, after.params, begun.params)
    np.testing.assert_allclose(
      helpers.largest(moved.pop(group)), 1e-3, rtol=1e-2
    )
    assert helpers.largest(moved) == 0
    if group == 'policy':  # without the head's loss
      helpers.assert_same(
        after.params['policy']['head'], begun.params['policy']['head']
      )
    for _ in range(20):
      after, logs = update(after, batch)
    assert float(logs[f'{group}/loss']) < expected
    assert int(after.step) == 21


# Settings.


def test_what_it_asks_for():
  algorithm = macaw.make(Problem(SPEC, 7), CONFIG)
  (stage,) = algorithm.loop('offline').stages
  assert (stage.name, stage.num_steps) == ('meta', 4)
  assert (algorithm.data.returns_discount, algorithm.data.stride) == (0.99, 7)
  assert algorithm.in_phase('online') == ()
  kinds = {
    Slice(6): {},
    Rows(6, replacement=False): dict(train_inner_sampling='uniform'),
  }
  distinct = lambda size, context: BatchSpec(
    2, Rows(size, replacement=False), context, replacement=False
  )
  for context, changes in kinds.items():
    batch = (
      macaw.make(Problem(SPEC, 7), inputs.changed(**changes))
      .loop('offline')
      .stages[0]
      .batch
    )
    assert batch == distinct(5, context)
  disjoint = inputs.changed(
    train_inner_sampling='uniform', disjoint_batches=True
  )
  batch = macaw.make(Problem(SPEC, 7), disjoint).loop('offline').stages[0].batch
  assert batch == distinct(11, None)


@pytest.mark.parametrize(
  'changes, message',
  [
    (dict(layer='x'), 'layer'),
    (dict(adapt='x'), 'adapt'),
    (dict(bootstrap_terminal='x'), 'bootstrap_terminal'),
    (dict(train_inner_sampling='x'), 'train_inner_sampling'),
    (dict(outer_norm='x'), 'outer_norm'),
    (dict(task_loop='x'), 'task_loop'),
    (dict(adapt='latent_only', layer='dense'), 'no latent'),
    (dict(disjoint_batches=True), 'uniform'),
    (
      dict(
        disjoint_batches=True,
        train_inner_sampling='uniform',
        context_part='first',
      ),
      "context_part='all'",
    ),
    (dict(context_part='x'), 'context_part'),
    (dict(context_part='last', context_rows=1), 'context_rows=1 are fewer'),
  ],
)
def test_bad_settings_raise(changes, message):
  with pytest.raises(ValueError, match=message):
    macaw.make(Problem(SPEC, 7), inputs.changed(**changes))


def test_released_defaults():
  """Those of the release."""
  c = macaw.Config()
  assert (c.hidden, c.head_hidden, c.latent_size) == ((100,) * 3, 32, 100)
  assert (c.policy_lr, c.value_lr, c.step_size_lr) == (1e-4, 1e-5, 1e-3)
  assert (c.inner_policy_lr, c.inner_value_lr) == (1e-3, 1e-3)
  assert (c.advantage_coef, c.action_std, c.discount) == (0.01, 0.2, 0.99)
  assert (c.temperature, c.max_weight, c.adv_std_eps) == (1.0, 20.0, 0.0)
  assert c.target_rate == pytest.approx(1 - 0.9)
  assert (c.num_tasks, c.context_size, c.query_size) == (5, 256, 256)
  assert (c.stride, c.num_updates, c.layer) == (7, 1_000_000, 'wlinear')
  assert (c.adapt, c.bootstrap_terminal, c.outer_norm) == (
    'all',
    'release',
    'n_train',
  )
  assert c.train_inner_sampling == 'contiguous' and c.head_relu_on_action
  assert not c.mask_bootstrap_on_death and not c.disjoint_batches
  assert c.finetune == macaw.FinetuneConfig(1e-5, 100, 200, 256)
