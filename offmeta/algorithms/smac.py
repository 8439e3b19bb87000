"""SMAC: semi-supervised meta actor-critic.

Pong, Nair, Smith, Huang, Levine: "Offline Meta-Reinforcement Learning with
Online Self-Supervision", ICML 2022, arXiv 2107.03974. Written against the
authors' released configuration; where paper and release differ, the release
is the default. Switches that leave it:

* `train_context_online` (release: False): the encoder and decoder keep
  training in the online phase on self-labelled data. Labels then come from a
  copy taken at the phase switch (`label_with='snapshot'`), so the decoder
  never learns from its own drift.
* `OnlineConfig.context='episodes'` (release: 'transitions'): encoder contexts
  are composed like the ones at meta-test.
* `backprop_q_into_encoder` (release: False; paper App. B1 tries it).
* `kl_over_tasks='sum'` (release: 'mean').
* `independent_next_latent` (release: True): the next action is drawn under a
  second sample of the posterior.
* Targets start as a copy of the critics; the release draws them anew.
* All gradients are taken at the same parameters; the release takes the
  actor's after the critic's step.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from offmeta import optim, parallel
from offmeta.algorithms import latent
from offmeta.losses import latent as latent_losses
from offmeta.losses import policy as policy_losses
from offmeta.losses import td
from offmeta.networks import actors, context, critics
from offmeta.networks.distributions import task_noise
from offmeta.types import (
    Algorithm,
    Array,
    BatchSpec,
    EnvSpec,
    Key,
    LearnerState,
    MetaBatch,
    Network,
    Params,
    Stage,
)


@dataclasses.dataclass(frozen=True)
class OfflineConfig:
  """The meta-training stage on fixed data."""

  num_updates: int = 50_000  # gradient steps in all
  num_tasks: int = 4  # meta-batch
  query_size: int = 128  # RL transitions per task
  context_size: int = 64  # encoder transitions per task


@dataclasses.dataclass(frozen=True)
class OnlineConfig:
  """The self-supervised stage."""

  num_updates: int = 16_000  # gradient steps per iteration (4000 x 4)
  num_tasks: int = 4  # meta-batch
  query_size: int = 256  # RL transitions per task
  context_size: int = 64  # encoder transitions per task
  task_repeat: int = 4  # consecutive updates on the same tasks
  context: str = 'transitions'  # or 'episodes', 'offline' (types.BatchSpec)
  sequence_size: int = 400  # 'episodes': longest exploration sequence
  offline_share: float = 0.3  # 'episodes': tasks with an offline context


@dataclasses.dataclass(frozen=True)
class Config:
  """Hyper-parameters (spec smac 3.1: release defaults)."""

  latent_size: int = 5  # dimensions of z
  encoder_hidden: tuple[int, ...] = (200, 200, 200)
  decoder_hidden: tuple[int, ...] = (64, 64)
  critic_hidden: tuple[int, ...] = (300, 300, 300)
  actor_hidden: tuple[int, ...] = (300, 300, 300)
  context_lr: float = 3e-4  # encoder and decoder, one Adam
  critic_lr: float = 3e-4
  actor_lr: float = 3e-4
  discount: float = 0.99
  target_rate: float = 0.005  # polyak step, every update
  reward_scale: float = 5.0  # multiplies the reward in the TD target only
  kl_weight: float = 0.1  # on the posterior's KL to the prior
  kl_over_tasks: str = 'mean'  # 'mean' (SMAC) or 'sum' (their PEARL)
  awac_temperature: float = 100.0  # beta, in units of the scaled Q
  awac_weight: float = 1.0  # on the AWAC term, both phases
  online_q_weight: float = 1.0  # on -min Q(s, pi(s)), online phase only
  backprop_q_into_encoder: bool = False  # TD gradient into z
  independent_next_latent: bool = True  # own z sample for the next action
  use_next_observation: bool = False  # in the context (dynamics families)
  latent_resample_period: int = 1  # steps per z while acting; 0: episode
  train_context_online: bool = False  # encoder and decoder after the switch
  label_with: str = 'snapshot'  # 'snapshot' at the switch, or 'current'
  offline: OfflineConfig = OfflineConfig()
  online: OnlineConfig = OnlineConfig()


class Networks(NamedTuple):
  """The four networks."""

  encoder: Network  # (context, mask) -> Gaussian [Z]
  decoder: Network  # (s, a, z) -> reward
  critic: Network  # (s, a, z) -> [K, ...]
  actor: Network  # (s, z) -> TanhNormal


def make_networks(spec: EnvSpec, config: Config) -> Networks:
  """Networks of spec smac 2.1."""
  o, a, z = spec.observation_size, spec.action_size, config.latent_size
  return Networks(
      encoder=context.set_encoder(
          o, a, z, config.encoder_hidden, config.use_next_observation),
      decoder=critics.scalar((o, a, z), config.decoder_hidden),
      critic=critics.q_ensemble((o, a, z), config.critic_hidden),
      actor=actors.tanh_gaussian_actor((o, z), a, config.actor_hidden),
  )


def losses(
    params: dict[str, Params],
    target_critic: Params,
    batch: MetaBatch,
    noise: dict[str, Array],
    networks: Networks,
    config: Config,
    q_weight: float,
    axis_name: str | None,
) -> tuple[dict[str, Array], dict[str, Array]]:
  """All loss terms of one update, and what to log (spec smac 2.3 to 2.6).

  Gradient routing: 'reward' and 'kl' reach encoder and decoder; 'critic'
  reaches the critics (and the encoder by switch); 'actor' the actor alone.

  Args:
    params: groups 'context', 'critic', 'actor'.
    target_critic: parameters of the target critics.
    batch: leaves [M, N, ...] and [M, B, ...].
    noise: 'latent' and 'next_latent' [M, Z], 'action' and 'next_action'
      [M, B, A], standard normal.
    networks: see `make_networks`.
    config: hyper-parameters.
    q_weight: weight of -min Q(s, pi(s)); 0 in the offline phase.
    axis_name: device axis over which tasks are sharded.

  Returns:
    Scalar terms {'reward', 'kl', 'critic', 'actor'} whose sum is minimised,
    and scalars to log.
  """
  stop = jax.lax.stop_gradient
  query = batch.query
  posterior = networks.encoder.apply(
      params['context']['encoder'], batch.context, batch.context_mask)

  def repeat(z):  # one z per task, for each of its B transitions
    return jnp.broadcast_to(
        z[:, None], query.reward.shape + (config.latent_size,))

  z = repeat(posterior.sample(noise['latent']))
  next_noise = noise[
      'next_latent' if config.independent_next_latent else 'latent']
  next_z = repeat(stop(posterior.sample(next_noise)))
  z_fixed = stop(z)

  # Reward decoder and encoder.
  decoded = networks.decoder.apply(
      params['context']['decoder'], query.observation, query.action, z)
  reward_loss = jnp.mean(td.squared_error(decoded, query.reward))
  kl = latent_losses.kl_to_standard_normal(
      posterior.mean, posterior.variance)
  kl_loss = jnp.mean(kl)
  if config.kl_over_tasks == 'sum':  # pmean over devices is applied later
    kl_loss = jnp.sum(kl) * parallel.axis_size(axis_name)

  # Critics.
  next_action, _ = networks.actor.apply(
      stop(params['actor']), query.next_observation, next_z,
  ).sample(noise['next_action'])
  next_q = networks.critic.apply(
      target_critic, query.next_observation, next_action, z_fixed)
  target = td.td_target(
      query.reward, query.discount, jnp.min(next_q, axis=0),
      config.discount, config.reward_scale)
  q = networks.critic.apply(
      params['critic'], query.observation, query.action,
      z if config.backprop_q_into_encoder else z_fixed)
  critic_loss = jnp.mean(td.ensemble_squared_error(q, target))

  # Actor: AWAC, and the critic's value of its own action.
  distribution = networks.actor.apply(
      params['actor'], query.observation, z_fixed)
  own_action, _ = distribution.sample(noise['action'])
  if not q_weight:
    own_action = stop(own_action)
  own_q = jnp.min(
      networks.critic.apply(
          stop(params['critic']), query.observation, own_action, z_fixed),
      axis=0)
  advantage = stop(jnp.min(q, axis=0) - own_q)
  weight = policy_losses.softmax_advantage_weights(
      advantage, config.awac_temperature, axis_name)
  log_prob = distribution.log_prob(query.action)
  awac_loss = jnp.mean(
      policy_losses.weighted_log_likelihood(log_prob, weight))
  actor_loss = config.awac_weight * awac_loss
  if q_weight:
    actor_loss += q_weight * jnp.mean(-own_q)

  terms = {
      'reward': reward_loss,
      'kl': config.kl_weight * kl_loss,
      'critic': critic_loss,
      'actor': actor_loss,
  }
  logs = {
      'decoder/loss': reward_loss,
      'encoder/kl': jnp.mean(kl),
      'critic/loss': critic_loss,
      'critic/q': jnp.mean(q),
      'actor/awac_loss': awac_loss,
      'actor/log_prob': jnp.mean(log_prob),
      'actor/own_q': jnp.mean(own_q),
      'actor/log_std': jnp.mean(distribution.log_std),
      'actor/max_weight': parallel.pmax(stop(jnp.max(weight)), axis_name),
  }
  return terms, logs


def validate(config: Config):
  """Checks the values of switches.

  Raises:
    ValueError: names the switch and what it takes.
  """
  known = {
      'kl_over_tasks': ('mean', 'sum'),
      'label_with': ('snapshot', 'current'),
  }
  for name, values in known.items():
    if getattr(config, name) not in values:
      raise ValueError(
          f'smac: {name}={getattr(config, name)!r}; choose one of {values}')
  if config.train_context_online and config.label_with == 'current':
    raise ValueError(
        'smac: train_context_online with label_with="current" would train the'
        ' decoder on its own drifting labels; use label_with="snapshot"')


def init_state(
    key: Key, networks: Networks, optimizers: Mapping
) -> LearnerState:
  """An untrained learner; targets and labellers are copies."""
  names = ('encoder', 'decoder', 'critic', 'actor')
  p = {
      name: getattr(networks, name).init(jax.random.fold_in(key, i))
      for i, name in enumerate(names)
  }
  params = {
      'context': {'encoder': p['encoder'], 'decoder': p['decoder']},
      'critic': p['critic'],
      'actor': p['actor'],
  }
  return LearnerState(
      step=jnp.zeros((), jnp.int32),
      key=jax.random.fold_in(key, len(names)),
      params=params,
      target_params=jax.tree.map(jnp.copy, params['critic']),
      opt_state=optim.init_groups(optimizers, params),
      extras=jax.tree.map(jnp.copy, params['context']),
  )


def make_stages(config: Config, update: Callable) -> tuple[Stage, Stage]:
  """The offline and the online stage.

  Args:
    config: hyper-parameters.
    update: (state, batch, online) -> (state, metrics).
  """
  offline, online = config.offline, config.online
  return Stage(
      'offline', offline.num_updates,
      BatchSpec(
          num_tasks=offline.num_tasks, context_size=offline.context_size,
          query_size=offline.query_size),
      lambda state, batch: update(state, batch, online=False),
  ), Stage(
      'online', online.num_updates,
      BatchSpec(
          num_tasks=online.num_tasks, context_size=online.context_size,
          query_size=online.query_size, task_repeat=online.task_repeat,
          context=online.context, sequence_size=online.sequence_size,
          offline_share=online.offline_share),
      lambda state, batch: update(state, batch, online=True))


def make(
    spec: EnvSpec, config: Config, axis_name: str | None = None
) -> Algorithm:
  """SMAC for one family.

  Args:
    spec: sizes of the family.
    config: hyper-parameters.
    axis_name: device axis when the meta-batch is sharded.

  Returns:
    An Algorithm.

  Raises:
    ValueError: a switch has an unknown value.
  """
  validate(config)
  networks = make_networks(spec, config)
  optimizers = {
      'context': optax.adam(config.context_lr),
      'critic': optax.adam(config.critic_lr),
      'actor': optax.adam(config.actor_lr),
  }

  def draw_noise(state, batch):
    query_shape = (batch.query.reward.shape[1], spec.action_size)
    shapes = {
        'latent': (config.latent_size,),
        'next_latent': (config.latent_size,),
        'action': query_shape,
        'next_action': query_shape,
    }
    return {
        name: task_noise(
            latent.slot_keys(state.key, state.step, batch.slot, i), shape)
        for i, (name, shape) in enumerate(shapes.items())
    }

  def update(state, batch, online):
    noise = draw_noise(state, batch)
    q_weight = config.online_q_weight if online else 0.0

    def total(params):
      terms, logs = losses(
          params, state.target_params, batch, noise, networks, config,
          q_weight, axis_name)
      return sum(terms.values()), logs

    gradients, logs = jax.grad(total, has_aux=True)(state.params)
    gradients, logs = parallel.pmean((gradients, logs), axis_name)
    frozen = online and not config.train_context_online
    params, opt_state = optim.step_groups(
        optimizers, gradients, state.opt_state, state.params,
        frozen=('context',) if frozen else ())
    targets = optim.polyak(
        state.target_params, params['critic'], config.target_rate)
    return state.replace(
        step=state.step + 1, params=params, target_params=targets,
        opt_state=opt_state), logs

  def begin_online(state):
    snapshot = jax.tree.map(jnp.copy, state.params['context'])
    return state.replace(extras=snapshot)

  def relabel(state, context_, valid, data, key):
    current = config.label_with == 'current'
    labeller = state.params['context'] if current else state.extras
    posterior = networks.encoder.apply(
        labeller['encoder'], context_, valid)
    z = posterior.sample(jax.random.normal(key, (config.latent_size,)))
    z = jnp.broadcast_to(z, data.action.shape[:-1] + z.shape)
    return networks.decoder.apply(
        labeller['decoder'], data.observation, data.action, z)

  offline, online = make_stages(config, update)
  return Algorithm(
      init=lambda key: init_state(key, networks, optimizers),
      offline=(offline,),
      online=(online,),
      begin_online=begin_online,
      relabel=relabel,
      **latent.context_acting(
          networks.encoder, networks.actor, config.latent_size,
          config.latent_resample_period),
  )
