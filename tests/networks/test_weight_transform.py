"""Layers with generated weights: their start, numpy, their gradient step."""

import functools
import re

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from offmeta import optim
from offmeta.networks import weight_transform

_KEY = jax.random.key(0)
_LAYERS = list(weight_transform.LAYERS)


def _count(tree):
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


# The standard deviation that weights start with.


@pytest.mark.parametrize(
  'inputs, outputs, std',
  [
    (20, 100, 0.058),
    (100, 100, 0.058),
    (100, 6, 0.111),
    (100, 8, 0.092),
    (106, 32, 0.061),
    (100, 1, 0.56),
    (32, 1, 0.59),
  ],
)
def test_wlinear_start(inputs, outputs, std):
  layer = weight_transform.wlinear(inputs, outputs, 100)
  # Of narrow layers |z| matters: its square has a spread of 14%.
  draws = 60 if outputs < 10 else 3
  params = jax.device_get(
    jax.jit(lambda key: jax.vmap(layer.init)(jax.random.split(key, draws)))(
      _KEY
    )
  )
  size = inputs * outputs + outputs
  assert {k: v.shape for k, v in params.items()} == {
    'latent': (draws, 100),
    'kernel': (draws, 100, size),
    'bias': (draws, size),
  }
  np.testing.assert_allclose(np.std(params['latent']), 1 / outputs, rtol=0.1)
  for name in ('kernel', 'bias'):
    assert 0.099 < np.max(np.abs(params[name])) <= 0.1
    np.testing.assert_allclose(
      np.std(params[name]), 0.1 / np.sqrt(3), rtol=0.05
    )
  weights = jax.device_get(jax.jit(jax.vmap(layer.generate))(params))
  assert weights['kernel'].shape == (draws, inputs, outputs)
  assert weights['bias'].shape == (draws, outputs)
  np.testing.assert_allclose(np.std(weights['kernel']), std, rtol=0.06)


def test_wlinear_latent_size_sets_the_bound():
  params = jax.device_get(
    jax.jit(weight_transform.wlinear(5, 4, 25).init)(_KEY)
  )
  assert params['latent'].shape == (25,)
  for name in ('kernel', 'bias'):
    assert 0.18 < np.abs(params[name]).max() <= 0.2


def test_bias_linear_start():
  params = jax.device_get(
    jax.jit(weight_transform.bias_linear(50, 40).init)(_KEY)
  )
  assert {k: v.shape for k, v in params.items()} == {
    'kernel': (50, 40),
    'bias': (40,),
    'latent': (40,),
    'transform': (40, 40),
  }
  bound = 50**-0.5
  for name in ('kernel', 'bias'):
    assert 0.85 * bound < np.abs(params[name]).max() <= bound
  np.testing.assert_allclose(np.std(params['kernel']), bound / 3**0.5, 0.05)
  # Xavier normal: variance 2 / (40 + 40), which is not cut off anywhere.
  np.testing.assert_allclose(np.std(params['transform']), 40**-0.5, 0.05)
  assert np.abs(params['transform']).max() > 2.5 * 40**-0.5
  latents = jax.jit(jax.vmap(weight_transform.bias_linear(2, 4).init))(
    jax.random.split(_KEY, 500)
  )['latent']
  np.testing.assert_allclose(np.std(latents), 1 / 4, 0.05)


@pytest.mark.parametrize(
  'family, sizes, policy, value, generated',
  [
    ('cheetah', (20, 6), 2_663_263, 2_262_901, (26_363, 22_401)),
    ('ant', (27, 8), 2_760_829, 2_333_601, None),
    ('walker', (17, 6), 2_632_963, 2_232_601, None),
  ],
)
def test_parameter_counts(family, sizes, policy, value, generated):
  """Those of the release."""
  observation, action = sizes
  networks = (
    weight_transform.policy_network(observation, action, (100,) * 3, 32),
    weight_transform.value_network(observation, (100,) * 3),
  )
  params = [jax.eval_shape(network.init, _KEY) for network in networks]
  assert tuple(map(_count, params)) == (policy, value), family
  # One step size per tensor: three per layer.
  assert [len(jax.tree.leaves(p)) for p in params] == [18, 12]
  if generated:
    assert (
      tuple(
        _count(jax.eval_shape(network.generate, p))
        for network, p in zip(networks, params)
      )
      == generated
    )


def test_parameter_count_of_the_wide_ablation():
  network = weight_transform.policy_network(
    20, 6, (725,) * 3, 32, 'bias_linear'
  )
  assert _count(jax.eval_shape(network.init, _KEY)) == 2_675_888


# Forward passes, in numpy.


def _weights(params, inputs, outputs):
  """(kernel, bias) of one layer, from the paper's definitions."""
  p = {k: np.asarray(v, np.float64) for k, v in params.items()}
  if 'transform' in p:
    return p['kernel'], p['bias'] + p['latent'] @ p['transform']
  if 'latent' not in p:
    return p['kernel'], p['bias']
  flat = p['bias'].copy()
  for weight, column in zip(p['latent'], p['kernel']):
    flat += weight * column
  kernel = np.array(
    [[flat[i * outputs + o] for o in range(outputs)] for i in range(inputs)]
  )
  return kernel, flat[inputs * outputs :]


def _layer_by_layer(params, sizes, x):
  """Output of a stack, and its last hidden layer before the ReLU."""
  *hidden_layers, last = range(len(params))
  for i in hidden_layers:
    kernel, bias = _weights(params[i], sizes[i], sizes[i + 1])
    hidden = x @ kernel + bias
    x = np.maximum(hidden, 0.0)
  kernel, bias = _weights(params[last], sizes[last], sizes[last + 1])
  return x @ kernel + bias, hidden


@functools.cache
def _policy(layer='wlinear', head=3, **options):
  network = weight_transform.policy_network(
    4, 2, (6, 5), head, layer, 3, **options
  )
  return network, helpers.shaken(jax.jit(network.init)(_KEY), scale=0.4)


def _inputs(seed=1, shape=(9,)):
  rng = np.random.default_rng(seed)
  return (
    rng.normal(size=shape + (4,)).astype(np.float32),
    rng.uniform(-1, 1, shape + (2,)).astype(np.float32),
  )


@pytest.mark.parametrize('relu_on_action', [True, False])
@pytest.mark.parametrize('layer', _LAYERS)
def test_policy_against_numpy(layer, relu_on_action):
  network, params = _policy(layer, relu_on_action=relu_on_action)
  x, action = _inputs()
  apply = jax.jit(network.apply)
  mean, advantage = apply(params, x, action)
  expected, hidden = _layer_by_layer(params['trunk'], (4, 6, 5, 2), x)
  np.testing.assert_allclose(mean, np.tanh(expected), rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(apply(params, x), mean)
  seen = np.maximum(action, 0) if relu_on_action else action
  head, _ = _layer_by_layer(
    params['head'],
    (7, 3, 1),
    np.concatenate([np.maximum(hidden, 0), seen], axis=1),
  )
  assert advantage.shape == (9,)
  np.testing.assert_allclose(advantage, head[:, 0], rtol=1e-4, atol=1e-5)
  # Negative actions matter or they do not.
  other = np.where(action < 0, 0.5 * action, action)
  same = np.array_equal(apply(params, x, other)[1], advantage)
  assert same == relu_on_action


@pytest.mark.parametrize('layer', _LAYERS)
def test_value_against_numpy(layer):
  network = weight_transform.value_network(4, (6, 5), layer, 3)
  params = helpers.shaken(jax.jit(network.init)(_KEY), scale=0.4)
  x, _ = _inputs(shape=(2, 5))
  expected, _ = _layer_by_layer(params, (4, 6, 5, 1), x)
  found, of_weights = jax.jit(
    lambda params: (
      network.apply(params, x),
      network.apply_generated(network.generate(params), x),
    )
  )(params)
  np.testing.assert_allclose(found, expected[..., 0], rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(of_weights, found)


def test_without_a_head():
  network, params = _policy(head=0)
  assert (
    set(params) == set(jax.eval_shape(network.generate, params)) == {'trunk'}
  )


def test_unknown_layers_raise():
  with pytest.raises(ValueError, match='wlinear'):
    weight_transform.value_network(2, (3,), 'linear')


# The gradient step.


def _loss(network, x, action, weights):
  mean, advantage = network.apply_generated(weights, x, action)
  return jnp.mean(jnp.square(mean - action)) + jnp.mean(
    jnp.square(advantage - 1.0)
  )


def _steps(params):
  """A different step size for every tensor."""
  leaves, tree = jax.tree.flatten(params)
  return jax.tree.unflatten(
    tree, [np.float32(0.02 * (i + 1)) for i in range(len(leaves))]
  )


def _fast(network, x, action, params, steps):
  """Weights after a step, without new parameters."""
  gradient = jax.grad(functools.partial(_loss, network, x, action))(
    network.generate(params)
  )
  return network.step(params, gradient, steps)


def _plain(network, x, action, params, steps):
  """Weights after a step on the parameters."""
  gradients = jax.grad(
    lambda p: _loss(network, x, action, network.generate(p))
  )(params)
  return network.generate(optim.inner_sgd(params, gradients, steps))


@pytest.mark.parametrize('layer', _LAYERS)
def test_step_is_a_step_on_the_parameters(layer):
  """Also in what a later loss has to say about parameters and step sizes."""
  network, params = _policy(layer)
  steps = _steps(params)
  before, after = _inputs(1), _inputs(2)

  def outer(step, params, steps):
    weights = step(network, *before, params, steps)
    return _loss(network, *after, weights), weights

  fast, plain = (
    jax.jit(jax.grad(functools.partial(outer, step), (0, 1), has_aux=True))(
      params, steps
    )
    for step in (_fast, _plain)
  )
  (gradients, weights), (expected, expected_weights) = fast, plain
  helpers.assert_close(weights, expected_weights, 1e-5, 1e-6, leaf_rtol=1e-6)
  helpers.assert_close(gradients, expected, 1e-4, 1e-6, leaf_rtol=1e-5)
  # The step is large enough to tell, and so is its second order.
  moved = jax.tree.map(np.subtract, weights, jax.jit(network.generate)(params))
  assert helpers.largest(moved) > 1e-2
  first_order = jax.jit(
    jax.grad(
      lambda p: _loss(
        network,
        *after,
        network.step(
          p,
          jax.lax.stop_gradient(
            jax.grad(functools.partial(_loss, network, *before))(
              network.generate(params)
            )
          ),
          steps,
        ),
      )
    )
  )(params)
  change = jax.tree.map(np.subtract, first_order, gradients[0])
  assert helpers.largest(change) > 1e-3


@pytest.mark.parametrize('layer', _LAYERS)
def test_tasks_side_by_side(layer):
  network, params = _policy(layer)
  steps = _steps(params)
  x, action = _inputs(shape=(3, 9))
  together = jax.device_get(
    jax.jit(jax.vmap(functools.partial(_fast, network), (0, 0, None, None)))(
      x, action, params, steps
    )
  )
  alone = jax.jit(functools.partial(_fast, network))
  for m in range(3):
    helpers.assert_close(
      jax.tree.map(lambda leaf: leaf[m], together),
      alone(x[m], action[m], params, steps),
      1e-5,
      1e-5,
    )


@pytest.mark.parametrize('layer', ['wlinear', 'bias_linear'])
def test_only_latent(layer):
  network, params = _policy(layer)
  gradients = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), params)
  steps = weight_transform.only_latent(_steps(params))
  moved = jax.tree.map(
    lambda a, b: float(np.max(np.abs(np.subtract(a, b)))),
    params,
    jax.jit(optim.inner_sgd)(params, gradients, steps),
  )
  for stack in ('trunk', 'head'):
    for part in moved[stack]:
      assert part.pop('latent') > 0
      assert not any(part.values())


def test_bfloat16_reaches_every_product():
  network, params = _policy()
  steps, before, after = _steps(params), _inputs(1), _inputs(2)

  def outer(params):
    return _loss(network, *after, _fast(network, *before, params, steps))

  with jax.default_matmul_precision('bfloat16'):
    text = jax.jit(jax.grad(outer)).lower(params).as_text()
  dots = [line for line in text.splitlines() if 'dot_general' in line]
  assert len(dots) > 30
  kinds = {tuple(re.findall(r'(bf16|f32)>', line)) for line in dots}
  assert kinds == {('bf16', 'bf16', 'f32')}
