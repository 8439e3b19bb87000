"""A learner, a batch and its noise, for the tests of SMAC."""

import helpers
import jax
import jax.numpy as jnp

from offmeta.algorithms import latent, smac
from offmeta.networks.distributions import task_noise
from offmeta.testing import probes
from offmeta.types import Problem


def make_state():
  """A learner whose networks, targets and labellers all differ."""
  state = jax.jit(smac.make(Problem(helpers.SPEC), helpers.SMAC).init)(
    jax.random.key(0)
  )
  return state.replace(
    params=helpers.shaken(state.params),
    target_params=helpers.shaken(state.target_params, 1),
    extras=helpers.shaken(state.extras, 2),
  )


def make_batch():
  """Four tasks of three transitions each."""
  composition = (
    smac.make(Problem(helpers.SPEC), helpers.SMAC)
    .loop('online')
    .stages[0]
    .batch
  )
  batch = jax.jit(
    lambda key: probes.random_batch(key, helpers.SPEC, composition)
  )(jax.random.key(1))
  # An action on the edge, where the likelihood must stay finite.
  query = batch.query._replace(
    action=batch.query.action.at[0, 0].set(jnp.array([1.0, -1.0]))
  )
  return batch._replace(query=query)


def make_noise(state, batch):
  """The noise that `update` draws: stream i of every task slot."""
  shapes = {
    'latent': (2,),
    'next_latent': (2,),
    'action': (3, 2),
    'next_action': (3, 2),
  }
  return {
    name: task_noise(
      latent.slot_keys(state.key, state.step, batch.slot, i), shape
    )
    for i, (name, shape) in enumerate(shapes.items())
  }


def bind_losses(config, online):
  """`smac.losses` of the learner's parameters: -> (terms, logs)."""
  networks = smac.make_networks(helpers.SPEC, config)

  def terms(params, target, batch, noise):
    return smac.losses(
      params, target, batch, noise, networks, config, online, None
    )

  return terms
