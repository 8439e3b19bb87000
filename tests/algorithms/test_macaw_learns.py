"""A bandit whose reward reveals the task: one gradient step must read it."""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from offmeta import evaluation
from offmeta.algorithms import macaw
from offmeta.data import buffer as buffers
from offmeta.data.buffer import Replay
from offmeta.losses import returns
from offmeta.testing import probes
from offmeta.training import updates
from offmeta.types import Problem, Transition

_FAMILY = probes.BanditFamily()
_M, _ROWS = 8, 240
_CONFIG = macaw.Config(
  hidden=(16, 16),
  head_hidden=8,
  latent_size=16,
  discount=0.9,
  policy_lr=1e-3,
  value_lr=1e-3,
  step_size_lr=1e-2,
  inner_policy_lr=1e-2,
  inner_value_lr=1e-2,
  num_tasks=4,
  context_size=32,
  query_size=32,
  num_updates=300,
)


@jax.jit
def _directions(offset):
  angle = offset + jnp.arange(_M) * (2 * jnp.pi / _M)
  return {'direction': jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1)}


@jax.jit
def _lives(tasks, key):
  """Logs that begin with random actions and end with fairly good ones."""
  quality = jnp.linspace(0.0, 0.8, _ROWS)[:, None]
  noise = jax.random.uniform(key, (_M, _ROWS, 2), minval=-1.0)
  action = (1 - quality) * noise + quality * tasks['direction'][:, None]
  reward = jax.vmap(lambda a, t: _FAMILY.reward(None, a, t))(action, tasks)
  ones = jnp.ones((_M, _ROWS, 1))
  log = Transition(
    ones,
    action,
    reward,
    ones[..., 0],
    ones,
    {'time': jnp.tile(jnp.arange(_ROWS) % 4.0, (_M, 1))},
  )
  log = log._replace(
    extras=jax.vmap(lambda log: returns.annotate(log, jnp.ones(_ROWS), 0.9))(
      log
    )
  )
  return buffers.make(log, jnp.full(_M, _ROWS), _ROWS)


@pytest.fixture(name='trained', scope='module')
def _trained():
  """(algorithm, params, contexts) after training; held-out directions lie
  between those of the training tasks."""
  keys = jax.random.split(jax.random.key(1), 1)
  replay = Replay(_lives(_directions(0.0), jax.random.key(0)), None)
  algorithm = macaw.make(Problem(_FAMILY.spec, _M), _CONFIG)
  update = updates.make_update(
    lambda axis: (
      macaw.make(Problem(_FAMILY.spec, _M), _CONFIG, axis)
      .loop('offline')
      .stages[0]
    ),
    helpers.seeds(keys),
    _CONFIG.num_updates,
    shared_replay=True,
  )
  state, _ = update(jax.jit(jax.vmap(algorithm.init))(keys), replay)
  state = jax.jit(lambda state: jax.tree.map(lambda x: x[0], state))(state)
  contexts = jax.jit(
    lambda logs: evaluation.offline_contexts(
      logs, jnp.arange(_M), jax.random.key(3), 2, _CONFIG.context_size
    )
  )(_lives(_directions(0.4), jax.random.key(2)))
  return algorithm, algorithm.actor_params(state), contexts


def test_adaptation_to_held_out_directions(trained):
  algorithm, params, contexts = trained
  score = jax.jit(
    lambda params, contexts: jnp.mean(
      evaluation.meta_test_given_context(
        _FAMILY,
        algorithm.evaluate_given_context,
        params,
        _directions(0.4),
        contexts,
        jax.random.key(4),
        4,
      ),
      axis=(1, 2),
    )
  )
  contexts = jax.device_get(contexts)
  adapted = score(params, contexts)
  # One policy for all: opposite directions cancel.
  prior = score(params, contexts._replace(mask=0 * contexts.mask))
  np.testing.assert_allclose(np.mean(prior), 0.0, atol=1e-3)
  # Best: 4 |direction|_1, 4 to 5.7. Every direction, so both signs of both
  # actions. Three other seeds gave 1.5 to 2.7.
  assert np.min(adapted) > 1.0
  assert np.mean(adapted) > np.mean(prior) + 1.2
  # The mechanism: other contexts, other policies; no step, no adaptation.
  opposite = jax.tree.map(lambda x: np.roll(x, _M // 2, axis=0), contexts)
  assert np.max(score(params, opposite)) < -1.0
  still = {
    **params,
    'policy_steps': jax.tree.map(
      lambda x: np.full_like(x, -100.0), params['policy_steps']
    ),
  }
  np.testing.assert_allclose(score(still, contexts), prior, atol=1e-4)
