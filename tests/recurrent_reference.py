"""BOReL's networks in plain numpy, one step at a time, in float64.

Written from the paper and PyTorch's definition of a GRU.
"""

import numpy as np


def dense(layer, x):
  """A linear layer; without a bias where the layer has none."""
  kernel = np.asarray(layer['kernel'], np.float64)
  return np.asarray(x, np.float64) @ kernel + np.asarray(
    layer.get('bias', 0.0), np.float64
  )


def _relu(layer, x):
  return np.maximum(dense(layer, x), 0.0)


def _sigmoid(x):
  return 1.0 / (1.0 + np.exp(-x))


def gru_step(params, h, next_observation, action, reward):
  """The hidden state [H] after one step."""
  embed = params['embed']['params']
  x = np.concatenate(
    [
      _relu(embed[f'Dense_{i}'], value)
      for i, value in enumerate((next_observation, action, [reward]))
    ]
  )
  xr, xu, xn = np.split(dense(params['input']['params'], x), 3)
  hr, hu, hn = np.split(dense(params['recurrent']['params'], h), 3)
  r, u = _sigmoid(xr + hr), _sigmoid(xu + hu)
  n = np.tanh(xn + r * hn)
  return (1 - u) * n + u * h


def read(params, h):
  """(mean [Z], log-variance [Z])."""
  return np.split(dense(params['heads']['params'], h), 2)


def decode(params, z, s, a, s2, whole_step):
  """The reward of one step under one latent."""
  layers = [
    params['params'][f'Dense_{i}'] for i in range(len(params['params']))
  ]
  of_state, rest = layers[0], layers[1:]
  parts = [z, _relu(of_state, s2)]
  if whole_step:
    parts += [_relu(of_state, s), _relu(rest.pop(0), a)]
  # The first layer on (z, embeddings) is kept in two parts.
  of_latent, of_step, *hidden, last = rest
  first = {
    'kernel': np.concatenate([of_latent['kernel'], of_step['kernel']]),
    'bias': of_step['bias'],
  }
  x = np.concatenate(parts)
  for layer in (first, *hidden):
    x = _relu(layer, x)
  return dense(last, x)[0]
