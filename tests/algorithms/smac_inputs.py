"""A learner, a batch and its noise, for the tests of SMAC."""

import helpers
import jax

from offmeta.algorithms import latent, smac
from offmeta.networks.distributions import task_noise
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
  batch = helpers.random_batch(1, helpers.SPEC, composition)
  # An action on the edge, where the likelihood must stay finite.
  action = batch.query.action.copy()
  action[0, 0] = [1.0, -1.0]
  return batch._replace(query=batch.query._replace(action=action))


def make_noise(state, batch):
  """The noise that `update` draws: stream i of every task slot."""
  return jax.device_get(_draw(state.key, state.step, batch.slot))


@jax.jit
def _draw(key, step, slots):
  shapes = {
    'latent': (2,),
    'next_latent': (2,),
    'action': (3, 2),
    'next_action': (3, 2),
  }
  return {
    name: task_noise(latent.slot_keys(key, step, slots, i), shape)
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
