"""SMAC's and PEARL's losses in plain numpy, transition by transition.

Written from the papers and the releases, in float64, with loops
where the package has arrays.
"""

import numpy as np


def layers(params):
  """[(kernel, bias)] of a perceptron, in float64."""
  tree = params['params']
  return [
    (
      np.asarray(tree[f'Dense_{i}']['kernel'], np.float64),
      np.asarray(tree[f'Dense_{i}']['bias'], np.float64),
    )
    for i in range(len(tree))
  ]


def mlp(params, *inputs, heads=1):
  """ReLU layers, then `heads` linear ones."""
  x = np.concatenate([np.asarray(i, np.float64) for i in inputs])
  stack = layers(params)
  for kernel, bias in stack[:-heads]:
    x = np.maximum(x @ kernel + bias, 0.0)
  out = [x @ kernel + bias for kernel, bias in stack[-heads:]]
  return out[0] if heads == 1 else out


def softplus(x):
  return np.logaddexp(0.0, x)


def posterior(encoder, context, mask):
  """Product of Gaussians of one task: (mean [Z], variance [Z])."""
  precision = weighted = 0.0
  for i in np.flatnonzero(np.asarray(mask)):
    out = mlp(
      encoder, context.observation[i], context.action[i], [context.reward[i]]
    )
    mean, raw = np.split(out, 2)
    variance = np.maximum(softplus(raw), 1e-7)
    precision = precision + 1 / variance
    weighted = weighted + mean / variance
  return weighted / precision, 1 / precision


def kl_to_prior(mean, variance):
  return 0.5 * np.sum(variance + mean**2 - 1 - np.log(variance))


def min_q(critics, s, a, z):
  return min(mlp(c, s, a, z)[0] for c in critics)


def normal_tanh(actor, s, z, max_log_std=2.0):
  """(mean, log_std) before the tanh."""
  mean, log_std = mlp(actor, s, z, heads=2)
  return mean, np.clip(log_std, -20, max_log_std)


def tanh_log_prob(x, mean, log_std, correction='exact'):
  """log density of tanh(x); 'shifted': with 1e-6 added under the log."""
  std = np.exp(log_std)
  normal = -0.5 * ((x - mean) / std) ** 2 - log_std - 0.5 * np.log(2 * np.pi)
  if correction == 'shifted':
    return np.sum(normal - np.log(1 - np.tanh(x) ** 2 + 1e-6))
  return np.sum(normal - 2 * (np.log(2) - x - softplus(-2 * x)))


def rows(batch):
  """(task, row, s, a, r, discount, s') of every query transition."""
  q = batch.query
  for m in range(q.reward.shape[0]):
    for b in range(q.reward.shape[1]):
      yield (
        m,
        b,
        q.observation[m, b],
        q.action[m, b],
        float(q.reward[m, b]),
        float(q.discount[m, b]),
        q.next_observation[m, b],
      )


def task_posteriors(encoder, batch):
  c = batch.context
  take = lambda m: type(c)(*[x[m] for x in c[:-1]])
  return [
    posterior(encoder, take(m), batch.context_mask[m])
    for m in range(batch.context_mask.shape[0])
  ]


def smac(params, target, batch, noise, config, online):
  """The four terms, and what an optimiser test needs.

  Returns:
    (terms, z [M][Z], targets y of every row in order).
  """
  encoder, decoder = (params['context'][k] for k in ('encoder', 'decoder'))
  critics, actor = params['critic'], params['actor']
  beliefs = task_posteriors(encoder, batch)
  noise = {k: np.asarray(v, np.float64) for k, v in noise.items()}
  z1 = [mu + np.sqrt(v) * e for (mu, v), e in zip(beliefs, noise['latent'])]
  second = 'next_latent' if config.independent_next_latent else 'latent'
  z2 = [mu + np.sqrt(v) * e for (mu, v), e in zip(beliefs, noise[second])]

  reward_errors, td_errors, targets = [], [], []
  advantages, log_probs, own_values = [], [], []
  for m, b, s, a, r, discount, s2 in rows(batch):
    reward_errors.append((mlp(decoder, s, a, z1[m])[0] - r) ** 2)
    # The next action under the second sample, at the next state.
    mean, log_std = normal_tanh(actor, s2, z2[m])
    a2 = np.tanh(mean + np.exp(log_std) * noise['next_action'][m, b])
    y = config.reward_scale * r + config.discount * discount * min_q(
      target, s2, a2, z1[m]
    )
    targets.append(y)
    td_errors.append(sum((mlp(c, s, a, z1[m])[0] - y) ** 2 for c in critics))
    mean, log_std = normal_tanh(actor, s, z1[m])
    own = np.tanh(mean + np.exp(log_std) * noise['action'][m, b])
    own_values.append(min_q(critics, s, own, z1[m]))
    advantages.append(min_q(critics, s, a, z1[m]) - own_values[-1])
    edge = np.float64(np.float32(0.999999))
    x = np.arctanh(np.clip(np.asarray(a, np.float64), -edge, edge))
    log_probs.append(tanh_log_prob(x, mean, log_std))

  score = np.exp(np.array(advantages) / config.awac_temperature)
  weights = score / score.sum()  # over all tasks together
  actor_loss = config.awac_weight * -np.sum(weights * np.array(log_probs))
  if online:
    actor_loss += config.online_q_weight * -np.mean(own_values)
  kls = [kl_to_prior(mu, v) for mu, v in beliefs]
  over_tasks = np.sum if config.kl_over_tasks == 'sum' else np.mean
  terms = {
    'reward': np.mean(reward_errors),
    'kl': config.kl_weight * over_tasks(kls),
    'critic': np.mean(td_errors),
    'actor': actor_loss,
  }
  return terms, z1, np.array(targets)


def pearl_critic(params, target_value, batch, noise, config):
  """Terms of critics, encoder and decoder, z and the targets y."""
  encoder, decoder = (params['context'][k] for k in ('encoder', 'decoder'))
  beliefs = task_posteriors(encoder, batch)
  noise = np.asarray(noise, np.float64)
  z = [mu + np.sqrt(v) * e for (mu, v), e in zip(beliefs, noise)]
  td_errors, reward_errors, targets = [], [], []
  for m, _, s, a, r, discount, s2 in rows(batch):
    y = (
      config.reward_scale * r
      + config.discount * discount * mlp(target_value, s2, z[m])[0]
    )
    targets.append(y)
    td_errors.append(
      sum((mlp(c, s, a, z[m])[0] - y) ** 2 for c in params['critic'])
    )
    reward_errors.append((mlp(decoder, s, a, z[m])[0] - r) ** 2)
  terms = {
    'critic': np.mean(td_errors),
    'kl': config.kl_weight * sum(kl_to_prior(mu, v) for mu, v in beliefs),
    'reward': np.mean(reward_errors),
  }
  return terms, z, np.array(targets)


def pearl_actor(params, critics, batch, z, noise, config):
  """Terms of value and actor, and the value targets."""
  noise = np.asarray(noise, np.float64)
  value_errors, losses, means, log_stds, targets = [], [], [], [], []
  for m, b, s, *_ in rows(batch):
    mean, log_std = normal_tanh(params['actor'], s, z[m])
    x = mean + np.exp(log_std) * noise[m, b]
    log_prob = tanh_log_prob(x, mean, log_std, config.tanh_correction)
    q = min_q(critics, s, np.tanh(x), z[m])
    targets.append(q - log_prob)
    value_errors.append((mlp(params['value'], s, z[m])[0] - targets[-1]) ** 2)
    losses.append(log_prob - q)
    after = config.mean_penalised == 'after_tanh'
    means.append(np.tanh(mean) if after else mean)
    log_stds.append(log_std)
  terms = {
    'value': np.mean(value_errors),
    'actor': np.mean(losses),
    'regulariser': config.mean_weight * np.mean(np.square(means))
    + config.log_std_weight * np.mean(np.square(log_stds)),
  }
  return terms, np.array(targets)


def mse_gradient(params, inputs, targets):
  """Gradient of mean_i (f(x_i) - y_i)^2, by backpropagation.

  Args:
    params: of a perceptron with one output.
    inputs: list of tuples of arrays, the inputs of each row.
    targets: one number per row.

  Returns:
    A tree like `params`.
  """
  stack = layers(params)
  gradients = [[np.zeros_like(k), np.zeros_like(b)] for k, b in stack]
  for given, y in zip(inputs, targets):
    x = np.concatenate([np.asarray(i, np.float64) for i in given])
    seen = []
    for i, (kernel, bias) in enumerate(stack):
      seen.append(x)
      x = x @ kernel + bias
      if i < len(stack) - 1:
        x = np.maximum(x, 0.0)
    delta = 2 * (x - y) / len(targets)
    for i in reversed(range(len(stack))):
      gradients[i][0] += np.outer(seen[i], delta)
      gradients[i][1] += delta
      delta = (stack[i][0] @ delta) * (seen[i] > 0)
  return {
    'params': {
      f'Dense_{i}': {'kernel': k, 'bias': b}
      for i, (k, b) in enumerate(gradients)
    }
  }


class Adam:
  """Kingma and Ba, one leaf at a time."""

  def __init__(self, rate):
    self.rate, self.count, self.mean, self.square = rate, 0, {}, {}

  def step(self, params, gradient, path=()):
    """New parameters of nested dictionaries and tuples of arrays."""
    if not path:
      self.count += 1
    if isinstance(params, dict):
      return {k: self.step(params[k], gradient[k], path + (k,)) for k in params}
    if isinstance(params, tuple):
      return tuple(
        self.step(p, g, path + (i,))
        for i, (p, g) in enumerate(zip(params, gradient))
      )
    m = self.mean[path] = 0.9 * self.mean.get(path, 0.0) + 0.1 * gradient
    v = self.square[path] = (
      0.999 * self.square.get(path, 0.0) + 0.001 * gradient**2
    )
    m, v = m / (1 - 0.9**self.count), v / (1 - 0.999**self.count)
    return np.asarray(params, np.float64) - self.rate * m / (np.sqrt(v) + 1e-8)
