"""MACAW's losses and meta-gradients in plain numpy.

Float64, the parameters of a network as one vector, all derivatives by
differences, those of the inner steps included.
"""

import jax
import numpy as np


def vector(tree):
  """All entries of a tree, [n]."""
  return np.concatenate(
    [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)]
  )


def _unvector(vector, like):
  """Leaves [..., *shape] of vectors [..., n]."""
  leaves, tree = jax.tree.flatten(like)
  ends = np.cumsum([leaf.size for leaf in leaves])
  parts = np.split(vector, ends[:-1], axis=-1)
  return jax.tree.unflatten(
    tree,
    [
      part.reshape(part.shape[:-1] + leaf.shape)
      for part, leaf in zip(parts, leaves)
    ],
  )


def _derivative(fn, x, eps=1e-5):
  """Central differences of fn: [K, n] -> [K], at x [n]."""
  moved = x + eps * np.concatenate([np.eye(x.size), -np.eye(x.size)])
  plus, minus = np.split(fn(moved), 2)
  return (plus - minus) / (2 * eps)


def _stack(layers, x, sizes):
  """Output [..., B, O] and the last hidden layer before its ReLU.

  `layers` have leaves [..., *shape], x is [B, I] or [..., B, I].
  """
  for layer, i, o in zip(layers, sizes, sizes[1:]):
    if 'transform' in layer:
      kernel = layer['kernel']
      bias = layer['bias'] + np.einsum(
        '...i,...io->...o', layer['latent'], layer['transform']
      )
    elif 'latent' in layer:
      flat = layer['bias'] + np.einsum(
        '...z,...zp->...p', layer['latent'], layer['kernel']
      )
      kernel = flat[..., : i * o].reshape(flat.shape[:-1] + (i, o))
      bias = flat[..., i * o :]
    else:
      kernel, bias = layer['kernel'], layer['bias']
    y = x @ kernel + bias[..., None, :]
    if layer is not layers[-1]:
      hidden, x = y, np.maximum(y, 0.0)
  return y, hidden


def _softplus(x):
  return np.logaddexp(0.0, x)


class Macaw:
  """One task: the networks of `macaw_inputs.CONFIG`, [3, 4, 3, 2 or 1].

  Parameters are vectors [..., n]: phi of the value, theta of the policy.
  """

  def __init__(self, params, config):
    self.config, self.params = config, params

  def value(self, phi, s):
    layers = _unvector(phi, self.params['value'])
    return _stack(layers, s, (3, 4, 3, 1))[0][..., 0]

  def policy(self, theta, s, a):
    layers = _unvector(theta, self.params['policy'])
    mean, hidden = _stack(layers['trunk'], s, (3, 4, 3, 2))
    if 'head' not in layers:
      return np.tanh(mean), 0.0
    a = np.maximum(a, 0) if self.config.head_relu_on_action else a
    a = np.broadcast_to(a, hidden.shape[:-1] + a.shape[-1:])
    read = np.concatenate([np.maximum(hidden, 0), a], axis=-1)
    return np.tanh(mean), _stack(layers['head'], read, (5, 3, 1))[0][..., 0]

  def bootstrapped(self, phi, rows):
    if self.config.bootstrap_terminal == 'none':
      return rows['return_to_go']
    power = rows['bootstrap']
    if self.config.mask_bootstrap_on_death:
      power = power * rows['last_discount']
    return rows['return_to_go'] + power * self.value(
      phi, rows['last_observation']
    )

  def awr_and_advantage_loss(self, theta, phi, rows):
    c = self.config
    advantage = self.bootstrapped(phi, rows) - self.value(phi, rows['s'])
    scaled = (
      (advantage - advantage.mean())
      / (advantage.std(ddof=1) + c.adv_std_eps)
      / c.temperature
    )
    weight = np.exp(np.minimum(scaled, np.log(c.max_weight)))
    mean, predicted = self.policy(theta, rows['s'], rows['a'])
    log_prob = np.sum(
      -0.5 * ((rows['a'] - mean) / c.action_std) ** 2
      - np.log(c.action_std)
      - 0.5 * np.log(2 * np.pi),
      axis=-1,
    )
    error = np.mean((predicted - advantage) ** 2, axis=-1)
    return -np.mean(weight * log_prob, axis=-1), error

  def steps(self, rho, name):
    """Step size of every parameter."""
    parts = []
    for alpha, (path, leaf) in zip(
      _softplus(rho), jax.tree.leaves_with_path(self.params[name])
    ):
      adapts = self.config.adapt == 'all' or path[-1].key == 'latent'
      parts.append(np.full(leaf.size, alpha * adapts))
    return np.concatenate(parts)

  def adapted_value(self, phi, rho, rows, rate=1.0):
    loss = lambda phi: np.mean(
      (self.value(phi, rows['s']) - rows['return_to_go']) ** 2, axis=-1
    )
    return phi - rate * self.steps(rho, 'value') * _derivative(loss, phi)

  def adapted_policy(self, theta, rho, c, phi, rows):
    def loss(theta):
      awr, error = self.awr_and_advantage_loss(theta, phi, rows)
      return awr + (0 if c is None else _softplus(c) * error)

    return theta - self.steps(rho, 'policy') * _derivative(loss, theta)

  def outer_value(self, phi, rho, target, inner, outer):
    adapted = self.adapted_value(phi, rho, inner)
    return np.mean((self.value(adapted, outer['s']) - target) ** 2)

  def outer_policy(self, theta, rho, c, phi, inner, outer):
    adapted = self.adapted_policy(theta, rho, c, phi, inner)
    return self.awr_and_advantage_loss(adapted, phi, outer)[0]


def task_rows(transitions, m, mask=None):
  """The rows of one task that count, by name."""
  pick = slice(None) if mask is None else np.flatnonzero(mask[m])
  t = transitions
  named = {'s': t.observation, 'a': t.action, **t.extras}
  return {k: np.asarray(v[m], np.float64)[pick] for k, v in named.items()}


def _inner_and_outer(batch, m, config):
  if not config.disjoint_batches:
    return (
      task_rows(batch.context, m, batch.context_mask),
      task_rows(batch.query, m),
    )
  rows = task_rows(batch.query, m)
  return (
    {k: v[: config.context_size] for k, v in rows.items()},
    {k: v[config.context_size :] for k, v in rows.items()},
  )


def terms_and_gradients(params, batch, config):
  """Terms, and their gradients: name -> group -> vector."""
  own = Macaw(params, config)
  x = {name: vector(params[name]) for name in params}
  theta, rho = x['policy'], x['policy_steps']
  phi, rho_v, c = x['value'], x['value_steps'], x.get('coefficient')
  scale = 2 if config.outer_norm == 'meta_batch' else 7
  terms = {'value': 0.0, 'policy': 0.0}
  gradients = {'value': {}, 'policy': {}}

  def add(name, **terms_of):
    for group, fn in terms_of.items():
      slope = _derivative(
        lambda moved: np.array([fn(row) for row in moved]), x[group], 1e-4
      )
      gradients[name][group] = gradients[name].get(group, 0) + slope / scale

  for m in range(batch.query.reward.shape[0]):
    inner, outer = _inner_and_outer(batch, m, config)
    adapted = own.adapted_value(phi, rho_v, inner)
    target = own.bootstrapped(
      own.adapted_value(phi, rho_v, inner, config.target_rate), outer
    )
    value = lambda a, b: own.outer_value(a, b, target, inner, outer)
    policy = lambda a, b, c: own.outer_policy(a, b, c, adapted, inner, outer)
    terms['value'] += value(phi, rho_v) / scale
    terms['policy'] += policy(theta, rho, c) / scale
    add(
      'value',
      value=lambda v: value(v, rho_v),
      value_steps=lambda v: value(phi, v),
    )
    add(
      'policy',
      policy=lambda v: policy(v, rho, c),
      policy_steps=lambda v: policy(theta, v, c),
    )
    if c is not None:
      add('policy', coefficient=lambda v: policy(theta, rho, v))
  return terms, gradients
