"""The recurrent encoder and the reward decoder, step by step in numpy."""

import helpers
import jax
from jax.extend import core as jax_core
import jax.numpy as jnp
import numpy as np
import pytest
import recurrent_reference as reference

from offmeta.networks import recurrent

_O, _A, _Z, _H = 3, 2, 2, 4
_EMBED = (5, 4, 3)  # s', a, r
_ENCODER = recurrent.belief_encoder(_O, _A, _Z, _H, _EMBED)
_BATCH, _T = 3, 5
_LENGTHS = (5, 3, 0)  # of the sequences in the batch


def _params(network, scale=0.3):
  return helpers.shaken(jax.jit(network.init)(jax.random.key(0)), scale=scale)


def _steps(seed=0):
  """s', a, r of a batch of sequences, and which steps count."""
  rng = np.random.default_rng(seed)
  draw = lambda *shape: np.float32(rng.normal(size=shape))
  mask = np.float32(np.arange(_T) < np.array(_LENGTHS)[:, None])
  return (draw(_BATCH, _T, _O), draw(_BATCH, _T, _A), draw(_BATCH, _T)), mask


def test_encoder_against_numpy():
  params = _params(_ENCODER)
  (observation, action, reward), mask = _steps()
  start = np.float32(0.3 * np.random.default_rng(1).normal(size=(_BATCH, _H)))

  @jax.jit
  def run(params):
    hidden = _ENCODER.advance(params, start, observation, action, reward, mask)
    return hidden, _ENCODER.read(params, hidden)

  hidden, read = jax.device_get(run(params))
  assert hidden.shape == (_BATCH, _T, _H) and read.shape == (3, _T, 2 * _Z)
  for i, length in enumerate(_LENGTHS):
    h = np.asarray(start[i], np.float64)
    for t in range(_T):
      if t < length:  # afterwards it stays
        h = reference.gru_step(
          params, h, observation[i, t], action[i, t], float(reward[i, t])
        )
      np.testing.assert_allclose(hidden[i, t], h, rtol=1e-5, atol=1e-6)
      np.testing.assert_allclose(
        read[i, t],
        reference.dense(params['heads']['params'], h),
        rtol=1e-5,
        atol=1e-6,
      )


def test_one_step_at_a_time():
  params = _params(_ENCODER)
  steps, _ = _steps()
  advance = jax.jit(_ENCODER.advance)
  start = np.zeros((_BATCH, _H), np.float32)
  ones = np.ones((_BATCH, _T), np.float32)
  whole = np.asarray(advance(params, start, *steps, ones))
  h = start
  for t in range(_T):
    h = advance(params, h, *[x[:, t : t + 1] for x in steps], ones[:, :1])
    h = np.asarray(h)[:, 0]
    helpers.assert_close(h, whole[:, t], rtol=1e-5, atol=1e-6)
  single = advance(params, start[0], *[x[0] for x in steps], ones[0])
  helpers.assert_close(single, whole[0], rtol=1e-5, atol=1e-6)


def test_what_does_not_count_changes_nothing():
  params = _params(_ENCODER)
  steps, mask = _steps()
  other, _ = _steps(1)
  mixed = [
    np.where(mask.reshape(mask.shape + (1,) * (x.ndim - 2)) > 0, x, 1e3 * y)
    for x, y in zip(steps, other)
  ]

  def loss(params, steps):
    hidden = _ENCODER.advance(params, jnp.zeros((_BATCH, _H)), *steps, mask)
    return jnp.sum(jnp.square(_ENCODER.read(params, hidden) - 1.0))

  run = jax.jit(jax.value_and_grad(loss))
  helpers.assert_close(run(params, mixed), run(params, steps), 1e-6)
  value, gradient = run(params, steps)
  assert float(value) > 0 and all(
    helpers.largest(part) > 1e-4 for part in gradient.values()
  )


def test_encoder_starts_as_published():
  encoder = recurrent.belief_encoder(30, 20, 5, 64, (32, 16, 16))
  params = jax.device_get(jax.jit(encoder.init)(jax.random.key(0)))
  for name, inputs in (('input', 64), ('recurrent', 64)):
    layer = params[name]['params']
    kernel = layer['kernel']
    assert kernel.shape == (inputs, 3 * 64)
    # As a whole, as PyTorch's orthogonal_ sees it.
    np.testing.assert_allclose(kernel @ kernel.T, np.eye(inputs), atol=1e-5)
    assert helpers.largest(layer['bias']) == 0.0
  embed = params['embed']['params']
  layers = [(embed[f'Dense_{i}'], n) for i, n in enumerate((30, 20, 1))]
  for layer, inputs in layers + [(params['heads']['params'], 64)]:
    for leaf in layer.values():
      assert 0.7 < helpers.largest(leaf) * np.sqrt(inputs) <= 1.0
  # The prior is what the heads make of a hidden state of zeros.
  np.testing.assert_array_equal(
    jax.jit(encoder.read)(params, np.zeros(64, np.float32)),
    params['heads']['params']['bias'],
  )


def _operands_of(primitive, jaxpr):
  """Shapes of the first operands of a primitive, nested programs included."""
  for equation in jaxpr.eqns:
    if equation.primitive.name == primitive:
      yield equation.invars[0].aval.shape
    for inner in jax_core.jaxprs_in_params(equation.params):
      yield from _operands_of(primitive, inner)


def test_learners_side_by_side_never_decompose_a_batch():
  """A batched QR decomposition can stop all threads of a CPU for good."""
  encoder = recurrent.belief_encoder(4, 2, 3, 8, (4, 4, 4))
  keys = jax.random.split(jax.random.key(0), 3)
  side_by_side = jax.vmap(encoder.init)
  shapes = list(_operands_of('qr', jax.make_jaxpr(side_by_side)(keys).jaxpr))
  assert shapes and all(len(shape) == 2 for shape in shapes)
  one_by_one = jax.tree.map(
    lambda *leaves: np.stack(leaves), *map(jax.jit(encoder.init), keys)
  )
  helpers.assert_close(jax.jit(side_by_side)(keys), one_by_one, 1e-6)


@pytest.mark.parametrize('whole_step', [True, False])
def test_decoder_against_numpy(whole_step):
  decoder = recurrent.reward_decoder(_O, _A, _Z, (6, 5), _EMBED[:2], whole_step)
  params = _params(decoder)
  rng = np.random.default_rng(2)
  z, s, a, s2 = [
    np.float32(rng.normal(size=(2,) + shape))
    for shape in ((4, _Z), (_T, _O), (_T, _A), (_T, _O))
  ]
  rewards = np.asarray(jax.jit(decoder.apply)(params, z, s, a, s2))
  assert rewards.shape == (2, 4, _T)
  for i in range(2):
    for d in range(4):
      for t in range(_T):
        step = (s[i, t], a[i, t], s2[i, t])
        np.testing.assert_allclose(
          rewards[i, d, t],
          reference.decode(params, z[i, d], *step, whole_step),
          rtol=1e-4,
          atol=1e-5,
        )


def test_decoder_starts_as_published():
  decoder = recurrent.reward_decoder(30, 20, 5, (32, 32), (32, 16), True)
  params = jax.device_get(jax.jit(decoder.init)(jax.random.key(0)))
  layers = params['params']
  # s and s' share an embedding; both parts of the first layer have the bound
  # of the whole, 5 + 32 + 32 + 16 = 85 inputs.
  for i, inputs in enumerate((30, 20, 85, 85, 32, 32)):
    for leaf in layers[f'Dense_{i}'].values():
      # The last bias is a single number, and may be small.
      floor = 0.7 if leaf.size > 4 else 0.0
      assert floor <= helpers.largest(leaf) * np.sqrt(inputs) <= 1.0
  assert 'bias' not in layers['Dense_2'] and len(layers) == 6


def _operand_dtypes(jaxpr):
  """dtypes of every product of a jaxpr and of those inside it."""
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'dot_general':
      yield tuple(
        v.aval.dtype.name for v in (*equation.invars, *equation.outvars)
      )
    for value in jax.tree.leaves(
      list(equation.params.values()), is_leaf=lambda x: hasattr(x, 'eqns')
    ):
      if hasattr(value, 'eqns'):
        yield from _operand_dtypes(getattr(value, 'jaxpr', value))


def test_all_products_follow_the_precision():
  """Those inside the scan and of derivatives of second order too."""
  decoder = recurrent.reward_decoder(_O, _A, _Z, (6, 5), _EMBED[:2], True)
  params = {'encoder': _params(_ENCODER), 'decoder': _params(decoder)}
  (s2, a, r), mask = _steps()

  def loss(params):
    hidden = _ENCODER.advance(
      params['encoder'], jnp.zeros((_BATCH, _H)), s2, a, r, mask
    )
    mean, _ = jnp.split(_ENCODER.read(params['encoder'], hidden), 2, axis=-1)
    return jnp.sum(
      jnp.square(decoder.apply(params['decoder'], mean, s2, a, s2) - r[:, None])
    )

  def second_order(params):
    return loss(
      jax.tree.map(lambda p, g: p - 0.01 * g, params, jax.grad(loss)(params))
    )

  found = lambda: set(
    _operand_dtypes(jax.make_jaxpr(jax.grad(second_order))(params).jaxpr)
  )
  plain = found()
  with jax.default_matmul_precision('bfloat16'):
    rounded = found()
  assert plain == {('float32',) * 3}
  assert rounded == {('bfloat16', 'bfloat16', 'float32')}
