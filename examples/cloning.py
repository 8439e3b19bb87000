"""An algorithm of your own in one file: behaviour cloning given a context.

  python -m experiments.run --config=examples/cloning.py --profile=smoke

An encoder reads a few logged transitions of a task, a policy imitates the
task's data given what the encoder says. Everything an algorithm is made of is
below: settings, networks, the loss, one update, and how it acts.
`tests/test_examples.py` runs this file.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from experiments.configs import base
from offmeta import algorithms, optim, parallel
from offmeta.algorithms import latent
from offmeta.losses import latent as latent_losses
from offmeta.networks import actors, context
from offmeta.networks.distributions import task_noise
from offmeta.types import (
  Algorithm,
  BatchSpec,
  Loop,
  Problem,
  Rows,
  Stage,
)


@dataclasses.dataclass(frozen=True)
class Config:
  """Every setting has a default and says what it is."""

  latent_size: int = 5  # dimensions of z
  hidden: tuple[int, ...] = (64, 64)  # of both networks
  lr: float = 1e-3
  kl_weight: float = 0.003  # on the posterior's KL to the prior
  num_updates: int = 3000
  num_tasks: int = 8  # meta-batch
  query_size: int = 32  # imitated transitions per task
  context_size: int = 64  # transitions per task that the encoder reads


def make(
  problem: Problem, config: Config, axis_name: str | None = None
) -> Algorithm:
  """Cloning for one family.

  Args:
    problem: what it is for.
    config: hyper-parameters.
    axis_name: device axis when the meta-batch is sharded.
  """
  spec = problem.spec
  o, a, z = spec.observation_size, spec.action_size, config.latent_size
  encoder = context.set_encoder(o, a, z, config.hidden)
  actor = actors.tanh_gaussian_actor((o, z), a, config.hidden)
  optimizers = {
    'context': optax.adam(config.lr),
    'actor': optax.adam(config.lr),
  }

  def init(key):
    k_encoder, k_actor, k_updates = jax.random.split(key, 3)
    params = {
      'context': {'encoder': encoder.init(k_encoder)},
      'actor': actor.init(k_actor),
    }
    return optim.first_state(k_updates, params, optimizers)

  def loss(params, batch, noise):
    posterior = encoder.apply(
      params['context']['encoder'], batch.context, batch.context_mask
    )
    task_latent = posterior.sample(noise)[:, None]  # [M, 1, Z]
    query = batch.query
    task_latent = jnp.broadcast_to(task_latent, query.reward.shape + (z,))
    imitated = actor.apply(params['actor'], query.observation, task_latent)
    log_prob = jnp.mean(imitated.log_prob(query.action))
    kl = jnp.mean(
      latent_losses.kl_to_standard_normal(posterior.mean, posterior.variance)
    )
    return config.kl_weight * kl - log_prob, {
      'actor/log_prob': log_prob,
      'encoder/kl': kl,
    }

  def update(state, batch):
    # Random numbers by task slot and gradients averaged over devices: the
    # update is the same on one device and on many.
    noise = task_noise(
      latent.slot_keys(state.key, state.step, batch.slot, 0), (z,)
    )
    gradients, logs = parallel.pmean(
      jax.grad(loss, has_aux=True)(state.params, batch, noise), axis_name
    )
    params, opt_state = optim.step_groups(
      optimizers, gradients, state.opt_state, state.params
    )
    return state.replace(
      step=state.step + 1, params=params, opt_state=opt_state
    ), logs

  batch = BatchSpec(
    config.num_tasks, Rows(config.query_size), Rows(config.context_size)
  )
  return Algorithm(
    init=init,
    loops=(
      Loop('offline', (Stage('clone', config.num_updates, batch, update),)),
    ),  # nothing after the fixed data
    **latent.context_acting(encoder, actor, z, resample_period=0),
  )


def get_config(family: str = 'point_robot'):
  """On any family that has data and sizes."""
  algorithms.register('cloning', Config, make)
  sizes = {'smoke': {'cloning': {'num_updates': 20}}}
  return base.config_of('cloning', sizes)(family)
