"""Logs of the bandit probe, for learning from the lives of other policies."""

import helpers
import jax
import jax.numpy as jnp

from offmeta import evaluation
from offmeta.data import buffer as buffers
from offmeta.data.buffer import Buffer, Replay
from offmeta.losses import returns
from offmeta.testing import probes
from offmeta.training import updates
from offmeta.types import Problem, Transition

FAMILY = probes.BanditFamily()
NUM_TASKS, ROWS, DISCOUNT = 8, 240, 0.9
PROBLEM = Problem(FAMILY.spec, NUM_TASKS)
HELD_OUT = 0.4  # angle by which these lie beyond the training tasks


def tasks(offset):
  """Directions spread evenly over the circle."""
  angle = offset + jnp.arange(NUM_TASKS) * (2 * jnp.pi / NUM_TASKS)
  return {'direction': jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1)}


@jax.jit
def lives(offset, key) -> Buffer:
  """Logs that begin with random actions and end with fairly good ones."""
  direction = tasks(offset)['direction']
  quality = jnp.linspace(0.0, 0.8, ROWS)[:, None]
  noise = jax.random.uniform(key, (NUM_TASKS, ROWS, 2), minval=-1.0)
  action = (1 - quality) * noise + quality * direction[:, None]
  reward = jax.vmap(lambda a, d: FAMILY.reward(None, a, {'direction': d}))(
    action, direction
  )
  ones = jnp.ones((NUM_TASKS, ROWS, 1))
  length = FAMILY.spec.episode_length
  time = jnp.arange(ROWS) % float(length)
  log = Transition(
    ones,
    action,
    reward,
    ones[..., 0],
    ones,
    {'time': jnp.tile(time, (NUM_TASKS, 1))},
  )
  log = log._replace(
    extras=jax.vmap(
      lambda log: returns.annotate(log, jnp.ones(ROWS), DISCOUNT)
    )(log)
  )
  return buffers.make(log, jnp.full(NUM_TASKS, ROWS), ROWS)


def train(make, config):
  """What the policies take as params, after the offline phase."""
  keys = jax.random.split(jax.random.key(1), 1)
  algorithm = make(PROBLEM, config)
  update = updates.make_update(
    lambda axis: make(PROBLEM, config, axis).loop('offline').stages[0],
    helpers.seeds(keys),
    config.num_updates,
    shared_replay=True,
  )
  state, _ = update(
    jax.jit(jax.vmap(algorithm.init))(keys),
    Replay(lives(0.0, jax.random.key(0)), None),
    {},
  )
  first = jax.jit(lambda state: jax.tree.map(lambda x: x[0], state))
  return algorithm.actor_params(first(state))


def contexts(size):
  """Draws from logs of held-out tasks, leaves [M, 2, size, ...]."""
  return jax.jit(
    lambda logs: evaluation.offline_contexts(
      logs, jnp.arange(NUM_TASKS), jax.random.key(3), 2, size
    )
  )(lives(HELD_OUT, jax.random.key(2)))


def scorer(algorithm):
  """(params, contexts) -> mean return [M] in the held-out tasks, of at most 4
  times the direction's sum of magnitudes (4 to 5.7)."""
  return jax.jit(
    lambda params, contexts: jnp.mean(
      evaluation.meta_test_given_context(
        FAMILY,
        algorithm.evaluate_given_context,
        params,
        tasks(HELD_OUT),
        contexts,
        jax.random.key(4),
        4,
      ),
      axis=(1, 2),
    )
  )


def nothing(contexts):
  """The same with no row that counts."""
  return contexts._replace(mask=0 * contexts.mask)
