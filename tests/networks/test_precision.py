"""Products in bfloat16: against numpy, of any order, and in whole updates."""

import functools

from flax import linen as nn
import helpers
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from offmeta.algorithms import pearl, sac, smac
from offmeta.networks import base
from offmeta.types import Problem

_BFLOAT16 = functools.partial(jax.default_matmul_precision, 'bfloat16')
_DENSE = ((1,), (0,)), ((), ())  # dimension numbers of nn.Dense, one batch axis


def _rounded(x):
  return np.asarray(x, np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)


def _random(*shapes):
  rng = np.random.default_rng(0)
  return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def _assert_close(actual, desired, rtol=1e-6):
  """Relative to the largest entry; float32 unless told."""
  assert actual.dtype == np.float32
  np.testing.assert_allclose(
    actual, desired, rtol=0, atol=rtol * np.abs(desired).max()
  )


def _dots(jaxpr):
  """Every dot_general of a jaxpr and of those inside it."""
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'dot_general':
      yield equation
    for value in jax.tree.leaves(
      list(equation.params.values()), is_leaf=lambda x: hasattr(x, 'eqns')
    ):
      if hasattr(value, 'eqns'):
        yield from _dots(getattr(value, 'jaxpr', value))


def _operand_dtypes(fn, *args):
  """(left, right, result) dtypes of each product that `fn` runs."""
  return [
    tuple(v.aval.dtype.name for v in (*dot.invars, *dot.outvars))
    for dot in _dots(jax.make_jaxpr(fn)(*args).jaxpr)
  ]


@functools.cache
def _network():
  """A perceptron with two heads, its parameters, and inputs [9, 3], [9, 2]."""
  network = base.mlp((3, 2), (7, 6), ((2, 0.1), (1, 0.1)))
  params = helpers.shaken(jax.jit(network.init)(jax.random.key(0)))
  return network, params, _random((9, 3), (9, 2))


def _loss(apply, params, inputs):
  return sum(jnp.sum(jnp.square(y - 1.0)) for y in apply(params, *inputs))


def _second_order(apply, params, inputs):
  """A loss after a gradient step, as meta-learners have it."""
  gradient = jax.grad(_loss, argnums=1)(apply, params, inputs)
  stepped = jax.tree.map(lambda p, g: p - 0.01 * g, params, gradient)
  return _loss(apply, stepped, inputs)


# One product.


@pytest.mark.parametrize('shape', [(5,), (4, 5), (2, 3, 5), (0, 5)], ids=str)
def test_forward_and_gradients_against_numpy(shape):
  x, kernel, weight = _random(shape, (5, 6), shape[:-1] + (6,))
  layer = base.dense(6, use_bias=False)

  def loss(x, kernel):
    y = layer.apply({'params': {'kernel': kernel}}, x)
    return jnp.sum(y * weight), y

  with _BFLOAT16():
    (dx, dkernel), y = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(
      x, kernel
    )
  rows = lambda x: _rounded(x).reshape(-1, x.shape[-1])
  expected = {
    'y': (y, _rounded(x) @ _rounded(kernel), x @ kernel),
    'dx': (dx, _rounded(weight) @ _rounded(kernel).T, weight @ kernel.T),
    'dkernel': (
      dkernel,
      rows(x).T @ rows(weight),
      x.reshape(-1, 5).T @ weight.reshape(-1, 6),
    ),
  }
  for name, (actual, desired, unrounded) in expected.items():
    assert actual.shape == desired.shape, name
    if not desired.size or not np.any(desired):
      continue
    _assert_close(actual, desired)
    # Rounding is what the agreement is about: it shows.
    assert np.abs(desired - unrounded).max() > 1e-4, name


def test_second_order_against_numpy():
  x, kernel, target, v = _random((8, 5), (5, 6), (8, 6), (5, 6))

  def loss(kernel):
    error = base.product(x, kernel, _DENSE) - target
    return 0.5 * jnp.sum(jnp.square(error))

  with _BFLOAT16():
    actual = jax.jit(jax.grad(lambda k: jnp.vdot(jax.grad(loss)(k), v)))(kernel)
  # The gradient is x' e with e = x k - t; along v: x' (x v).
  along = _rounded(x) @ _rounded(v)
  desired = _rounded(x).T @ _rounded(along)
  _assert_close(actual, desired)
  assert np.abs(desired - x.T @ (x @ v)).max() > 1e-2


@pytest.mark.parametrize('axis_a', [0, 1])
@pytest.mark.parametrize('axis_b', [0, 1])
def test_every_orientation_up_to_third_order(axis_a, axis_b):
  # Small integers are exact in bfloat16, and so are their products: all
  # derivatives equal those of jnp's product. Third order because the backward
  # pass of each orientation uses others.
  integers = lambda shape, seed: np.float32(
    np.random.default_rng(seed).integers(-2, 3, shape)
  )
  a = integers((2, 3) if axis_a else (3, 2), 0)
  b = integers((4, 3) if axis_b else (3, 4), 1)
  ours = lambda a, b: base._bfloat16_product(a, b, axis_a, axis_b)
  plain = lambda a, b: (a if axis_a else a.T) @ (b.T if axis_b else b)

  def derivatives(fn, a, b):
    values = [fn(a, b)]
    scalar = lambda a, b: jnp.sum(jnp.square(fn(a, b)))
    for order in range(1, 4):
      gradient = jax.grad(scalar, argnums=(0, 1))
      values.append(gradient(a, b))
      scalar = lambda a, b, gradient=gradient, order=order: sum(
        jnp.vdot(g, integers(g.shape, order)) for g in gradient(a, b)
      )
    return values

  # Second and third order hold numbers above 256, which bfloat16 rounds.
  found, exact = jax.jit(
    lambda a, b: (derivatives(ours, a, b), derivatives(plain, a, b))
  )(a, b)
  helpers.assert_same(found[:2], exact[:2])
  helpers.assert_close(found, exact, rtol=0.0, leaf_rtol=2e-2)


def test_refuses_what_it_cannot_round():
  x, kernel = _random((4, 5), (6, 5))
  across = ((1,), (1,)), ((), ())
  assert base.product(x, kernel, across).shape == (4, 6)
  with _BFLOAT16(), pytest.raises(ValueError, match=r'\(\(1,\), \(1,\)\)'):
    base.product(x, kernel, across)


def test_a_precision_of_its_own_overrides_the_setting():
  x, kernel = _random((4, 5), (5, 6))
  with _BFLOAT16():
    y = base.product(x, kernel, _DENSE, precision='float32')
  _assert_close(y, x @ kernel)


# Networks.


class _Plain(nn.Module):
  """The layers of `_network` by nn.Dense alone."""

  @nn.compact
  def __call__(self, *inputs):
    x = jnp.concatenate(inputs, axis=-1)
    for width in (7, 6):
      x = nn.relu(nn.Dense(width)(x))
    return nn.Dense(2)(x), nn.Dense(1)(x)


@pytest.mark.parametrize('precision', [None, 'float32', 'tensorfloat32'])
def test_other_settings_are_those_of_plain_layers(precision):
  network, params, inputs = _network()

  def run(apply):
    fn = lambda p: (
      apply(p, *inputs),
      jax.grad(_loss, argnums=1)(apply, p, inputs),
    )
    with jax.default_matmul_precision(precision):
      dots = [dot.params for dot in _dots(jax.make_jaxpr(fn)(params).jaxpr)]
      return jax.jit(fn)(params), dots

  ours, our_dots = run(network.apply)
  plain, plain_dots = run(_Plain().apply)
  helpers.assert_same(ours, plain)
  # A CPU ignores the precision, so that equal numbers do not show it.
  assert our_dots == plain_dots and our_dots


@pytest.mark.parametrize('fn', [_loss, _second_order])
def test_all_products_take_bfloat16_and_give_float32(fn):
  network, params, inputs = _network()
  scanned = lambda p: jax.lax.scan(
    lambda p, x: (
      jax.tree.map(
        jnp.subtract, p, jax.grad(fn, argnums=1)(network.apply, p, x)
      ),
      None,
    ),
    p,
    inputs,
  )[0]
  inputs = [np.stack([x, x]) for x in inputs]
  over_seeds = jax.vmap(scanned)
  seeds = jax.tree.map(lambda x: np.stack([x, x, x]), params)
  plain = _operand_dtypes(over_seeds, seeds)
  with _BFLOAT16():
    rounded = _operand_dtypes(over_seeds, seeds)
  assert len(rounded) >= 11  # 4 layers: forward, to kernels, to 3 inputs
  assert set(plain) == {('float32',) * 3}
  assert set(rounded) == {('bfloat16', 'bfloat16', 'float32')}


def test_meta_gradient_is_close_to_float32():
  network, params, inputs = _network()
  gradient = jax.jit(
    jax.grad(lambda p: _second_order(network.apply, p, inputs))
  )
  exact = gradient(params)
  with _BFLOAT16():
    rounded = gradient(params)
  for (path, e), r in zip(
    jax.tree.leaves_with_path(exact), jax.tree.leaves(rounded)
  ):
    assert r.dtype == jnp.float32
    share = np.linalg.norm(np.subtract(r, e)) / np.linalg.norm(e)
    # Eight bits of mantissa: 0.004 per product, and some thirty of them.
    assert 1e-5 < share < 0.05, (jax.tree_util.keystr(path), share)


def test_one_jitted_function_serves_both_settings():
  network, params, inputs = _network()
  run = jax.jit(network.apply)
  before = run(params, *inputs)
  with _BFLOAT16():
    rounded = run(params, *inputs)
  helpers.assert_same(run(params, *inputs), before)
  assert all(np.all(np.not_equal(r, b)) for r, b in zip(rounded, before))


def test_vmap_scan_and_pmap_give_what_single_calls_give():
  network, params, inputs = _network()
  seeds = jax.tree.map(
    lambda *leaves: np.stack(leaves),
    params,
    helpers.shaken(params, 1),
    helpers.shaken(params, 2),
  )
  gradient = lambda p: jax.grad(_loss, argnums=1)(network.apply, p, inputs)
  one, side_by_side = jax.jit(gradient), jax.jit(jax.vmap(gradient))
  with _BFLOAT16():
    single = [one(jax.tree.map(lambda x, s=s: x[s], seeds)) for s in range(3)]
    expected = jax.tree.map(lambda *leaves: np.stack(leaves), *single)
    results = {
      'vmap': side_by_side(seeds),
      'scan': jax.jit(
        lambda seeds: jax.lax.scan(
          lambda _, p: (None, gradient(p)), None, seeds
        )[1]
      )(seeds),
      'pmap': jax.pmap(gradient, devices=jax.local_devices()[:3])(seeds),
    }
  for result in results.values():
    helpers.assert_close(result, expected, rtol=1e-6, leaf_rtol=1e-6)
  wrong = side_by_side(seeds)  # in float32
  with pytest.raises(AssertionError):
    helpers.assert_close(wrong, expected, rtol=1e-6, leaf_rtol=1e-6)


# Whole updates.

_SAC = sac.Config(critic_hidden=(7,), actor_hidden=(6,))
_ALGORITHMS = {
  'smac': (smac, helpers.SMAC),
  'pearl': (pearl, helpers.PEARL),
  'sac': (sac, _SAC),
}


def _update(name):
  """The update of an algorithm's first stage, a state, and a batch."""
  module, config = _ALGORITHMS[name]
  algorithm = module.make(Problem(helpers.SPEC), config)
  state = jax.jit(algorithm.init)(jax.random.key(0))
  state = state.replace(
    params=helpers.shaken(state.params),
    target_params=helpers.shaken(state.target_params, 1),
  )
  stage = algorithm.loops[0].stages[0]
  batch = helpers.random_batch(1, helpers.SPEC, stage.batch)
  return stage.update, state, batch


@pytest.mark.parametrize('name', list(_ALGORITHMS))
def test_an_update_has_no_other_products(name):
  update, state, batch = _update(name)
  with _BFLOAT16():
    dtypes = _operand_dtypes(update, state, batch)
  assert set(dtypes) == {('bfloat16', 'bfloat16', 'float32')}


def _first_moments(state):
  """Adam's, as one vector: after the first update a tenth of the gradient."""
  return np.concatenate(
    [
      np.ravel(leaf)
      for path, leaf in jax.tree.leaves_with_path(state.opt_state)
      if '.mu' in jax.tree_util.keystr(path)
    ]
  )


@pytest.mark.parametrize(
  'name, highest_rate', [('smac', 0.02), ('pearl', 0.03)]
)
def test_an_update_changes_little(name, highest_rate):
  update, before, batch = _update(name)
  states, logs = {}, {}
  for precision in ('float32', 'bfloat16'):
    with jax.default_matmul_precision(precision):
      states[precision], logs[precision] = jax.jit(update)(before, batch)
  exact, rounded = states['float32'], states['bfloat16']
  dtypes = lambda tree: jax.tree.map(lambda x: x.dtype, tree)
  assert dtypes(rounded) == dtypes(before)
  assert not any(
    x.dtype == jnp.bfloat16 for x in jax.tree.leaves((rounded, logs))
  )
  moments = _first_moments(exact)
  share = np.linalg.norm(_first_moments(rounded) - moments) / np.linalg.norm(
    moments
  )
  assert 1e-5 < share < 0.02
  # Adam's first step is the learning rate times the sign of the gradient: a
  # gradient near 0 may turn, hence twice the rate, but few do.
  change = np.concatenate(
    [
      np.ravel(np.subtract(a, b))
      for a, b in zip(
        jax.tree.leaves(rounded.params), jax.tree.leaves(exact.params)
      )
    ]
  )
  assert 0 < np.abs(change).max() <= 2.001 * highest_rate
  assert np.mean(np.abs(change) > 1e-3 * highest_rate) < 0.02
  for key, value in logs['float32'].items():
    np.testing.assert_allclose(
      logs['bfloat16'][key], value, rtol=0.02, err_msg=key
    )
