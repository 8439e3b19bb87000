"""SMAC: semi-supervised meta actor-critic.

Pong, Nair, Smith, Huang, Levine: "Offline Meta-Reinforcement Learning with
Online Self-Supervision", ICML 2022, arXiv 2107.03974. Written against the
authors' released configuration; where paper and release differ, the release
is the default, but for `DIFFERENCES` (`smac_config.py`). Switches that leave
it (there, too):

* `train_context_online` (release: False): the encoder and decoder keep
  training in the online phase on self-labelled data. Labels then come from a
  copy taken at the phase switch (`label_with='snapshot'`), so the decoder
  never learns from its own drift.
* `OnlineConfig.context='episodes'` (release: 'transitions'): encoder contexts
  are composed like the ones at meta-test.
* `OnlineConfig.online_share` (release: -1, the share grows; paper App. B4).
* `encoder_loss` (release: 'reward'; paper App. B1 tries 'q' and 'both'): what
  trains the encoder beside the KL. With 'q' the decoder, which labels, trains
  on detached latents.
* `actor='sac'` (paper: the actor ablation): PEARL's actor in both phases. It
  has no network for V here, so its value is the target critics' at one next
  action, and the entropy that PEARL's V holds is subtracted in the target
  (`sac.entropy_in_target`).
* `awac_temperature=inf` (paper: meta behaviour cloning): all weights are 1.
* `kl_over_tasks='sum'` (release: 'mean').
* `independent_next_latent` (release: True): the next action is drawn under a
  second sample of the posterior.
* `zero_last_bias` (release: True): last layers' biases, those of log-std
  aside, start at 0, else as the weights in U(+-3e-3), the policy's U(+-1e-3).
* Targets start as a copy of the critics; the release draws them anew.
* All gradients are taken at the same parameters; the release takes the
  actor's after the critic's step.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from offmeta import limits, optim, parallel
from offmeta.algorithms import latent, smac_losses
from offmeta.algorithms.smac_config import (
  DIFFERENCES as DIFFERENCES,
  VARIANT_FIXED as VARIANT_FIXED,
  Config,
  OfflineConfig as OfflineConfig,
  OnlineConfig as OnlineConfig,
  SacActorConfig as SacActorConfig,
  validate,
)
from offmeta.losses.latent import kl_to_standard_normal
from offmeta.networks import actors, context, critics
from offmeta.networks.distributions import Gaussian, task_noise
from offmeta.types import (
  Algorithm,
  Array,
  BatchSpec,
  EnvSpec,
  Evidence,
  Exploration,
  Key,
  LearnerState,
  Loop,
  MetaBatch,
  Network,
  Params,
  Problem,
  Rows,
  Stage,
  Transition,
)


class Networks(NamedTuple):
  """The four networks."""

  encoder: Network  # (context, mask) -> Gaussian [Z]
  decoder: Network  # (s, a, z) -> reward
  critic: Network  # (s, a, z) -> [K, ...]
  actor: Network  # (s, z) -> TanhNormal


def make_networks(spec: EnvSpec, config: Config) -> Networks:
  """All networks."""
  o, a, z = spec.observation_size, spec.action_size, config.latent_size
  start = (0.0, config.zero_last_bias)  # of hidden and of last biases
  return Networks(
    encoder=context.set_encoder(
      o, a, z, config.encoder_hidden, config.use_next_observation, *start
    ),
    decoder=critics.scalar((o, a, z), config.decoder_hidden, *start),
    critic=critics.q_ensemble((o, a, z), config.critic_hidden, 2, *start),
    actor=actors.tanh_gaussian_actor((o, z), a, config.actor_hidden, *start),
  )


def losses(
  params: dict[str, Params],
  target_critic: Params,
  batch: MetaBatch,
  noise: dict[str, Array],
  networks: Networks,
  config: Config,
  online: bool,
  axis_name: str | None,
) -> tuple[dict[str, Array], dict[str, Array]]:
  """All loss terms of one update, and what to log.

  Every network meets its loss here, and gradients are routed here alone:
  'reward' reaches the decoder and 'critic' the critics, both the encoder if
  `config.encoder_loss` says so; 'kl' the encoder; 'actor' the actor.

  Args:
    params: groups 'context', 'critic', 'actor'.
    target_critic: parameters of the target critics.
    batch: leaves [M, N, ...] and [M, B, ...].
    noise: 'latent' and 'next_latent' [M, Z], 'action' and 'next_action'
      [M, B, A], standard normal.
    networks: see `make_networks`.
    config: hyper-parameters.
    online: whether the AWAC actor has its term of Q.
    axis_name: device axis over which tasks are sharded.

  Returns:
    Scalar terms {'reward', 'kl', 'critic', 'actor'} whose sum is minimised,
    and scalars to log.
  """
  stop = jax.lax.stop_gradient
  query = batch.query
  posterior = networks.encoder.apply(
    params['context']['encoder'], batch.context, batch.context_mask
  )
  z, next_z = _draw_latents(posterior, noise, query, config)

  decoded = networks.decoder.apply(
    params['context']['decoder'],
    query.observation,
    query.action,
    stop(z) if limits.chosen(config, 'encoder_loss', 'q') else z,
  )
  terms, logs = smac_losses.context_terms(
    posterior, decoded, query, config, axis_name
  )

  next_action, next_log_prob = networks.actor.apply(
    stop(params['actor']),
    query.next_observation,
    stop(next_z),
  ).sample(noise['next_action'])
  next_q = networks.critic.apply(
    target_critic, query.next_observation, next_action, stop(z)
  )
  q = networks.critic.apply(
    params['critic'],
    query.observation,
    query.action,
    stop(z) if limits.chosen(config, 'encoder_loss', 'reward') else z,
  )
  terms['critic'] = smac_losses.critic_term(
    q, next_q, next_log_prob, query, config
  )

  distribution = networks.actor.apply(
    params['actor'], query.observation, stop(z)
  )
  own_action, own_log_prob = distribution.sample(noise['action'])
  q_weight = config.online_q_weight if online else 0.0
  if limits.chosen(config, 'actor', 'awac') and not q_weight:
    own_action = stop(own_action)
  own_q = jnp.min(
    networks.critic.apply(
      stop(params['critic']), query.observation, own_action, stop(z)
    ),
    axis=0,
  )
  if limits.chosen(config, 'actor', 'sac'):
    terms['actor'], actor_logs = smac_losses.sac_term(
      distribution, own_log_prob, own_q, config
    )
  else:
    terms['actor'], actor_logs = smac_losses.awac_term(
      distribution,
      query.action,
      jnp.min(q, axis=0),
      own_q,
      q_weight,
      config,
      axis_name,
    )
  logs |= actor_logs | {
    'critic/loss': terms['critic'],
    'critic/q': jnp.mean(q),
    'actor/own_q': jnp.mean(own_q),
    'actor/log_std': jnp.mean(distribution.log_std),
  }
  return terms, logs


def _draw_latents(
  posterior: Gaussian,
  noise: dict[str, Array],
  query: Transition,
  config: Config,
) -> tuple[Array, Array]:
  """z, and the one of the next action [M, B, Z]: one per task."""

  def repeat(z):
    return jnp.broadcast_to(
      z[:, None], query.reward.shape + (config.latent_size,)
    )

  next_noise = 'next_latent' if config.independent_next_latent else 'latent'
  return (
    repeat(posterior.sample(noise['latent'])),
    repeat(posterior.sample(noise[next_noise])),
  )


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
  return optim.first_state(
    jax.random.fold_in(key, len(names)),
    params,
    optimizers,
    params['critic'],
    extras=params['context'],
  )


def make_stages(config: Config, update: Callable) -> tuple[Stage, Stage]:
  """The offline and the online phase.

  Args:
    config: hyper-parameters.
    update: (state, batch, online) -> (state, metrics).
  """
  offline, online = config.offline, config.online
  context = {
    'transitions': Rows(online.context_size),
    'offline': Rows(online.context_size, 'offline'),
    'episodes': Exploration(
      online.context_size, online.sequence_size, online.offline_share
    ),
  }[online.context]
  return Stage(
    'offline',
    offline.num_updates,
    BatchSpec(
      num_tasks=offline.num_tasks,
      query=Rows(offline.query_size),
      context=Rows(offline.context_size),
    ),
    lambda state, batch: update(state, batch, online=False),
  ), Stage(
    'online',
    online.num_updates,
    BatchSpec(
      num_tasks=online.num_tasks,
      query=Rows(online.query_size, online_share=online.online_share),
      context=context,
      task_repeat=online.task_repeat,
    ),
    lambda state, batch: update(state, batch, online=True),
  )


def predicted_reward(
  labeller: Params,
  networks: Networks,
  context_: Transition,
  valid: Array,
  data: Transition,
  noise: Array,
) -> Array:
  """Rewards [...] by the decoder, given one latent for all of `data`.

  Args:
    labeller: parameters of 'encoder' and 'decoder'.
    networks: see `make_networks`.
    context_, valid: what the latent is inferred from, leaves [C, ...] and [C].
    data: leaves [..., ...].
    noise: [Z], standard normal, of the latent.
  """
  posterior = networks.encoder.apply(labeller['encoder'], context_, valid)
  z = posterior.sample(noise)
  z = jnp.broadcast_to(z, data.action.shape[:-1] + z.shape)
  return networks.decoder.apply(
    labeller['decoder'], data.observation, data.action, z
  )


def diagnose(
  state: LearnerState, evidence: Evidence, networks: Networks
) -> dict[str, Array]:
  """How much a context tells, by how many of its transitions are given.

  Contexts are from the logs, or what the policy collected itself. KL to the
  prior is in nats. The error of the decoder is absolute, in units of reward, on
  logged transitions and under one latent per context. All are means over tasks.

  Args:
    state: of one seed.
    evidence: on M tasks.
    networks: see `make_networks`.

  Returns:
    See `types.Algorithm.diagnose`.
  """
  params, rows = state.params['context'], evidence.rows

  def measure(size, context_, mask, rows, rows_mask, key):
    valid = mask * (jnp.cumsum(mask) <= size)
    posterior = networks.encoder.apply(params['encoder'], context_, valid)
    noise = jax.random.normal(key, posterior.mean.shape)
    reward = predicted_reward(params, networks, context_, valid, rows, noise)
    error = jnp.sum(jnp.abs(reward - rows.reward) * rows_mask)
    return {
      'kl_to_prior': kl_to_standard_normal(posterior.mean, posterior.variance),
      'reward_error': error / jnp.maximum(jnp.sum(rows_mask), 1),
    }

  keys = jax.random.split(evidence.key, rows.reward.shape[0])
  found = {}
  for kind in ('logged', 'own'):
    context_, mask = getattr(evidence, kind), getattr(evidence, f'{kind}_mask')
    longest = mask.shape[1]
    sizes = [2**i for i in range(longest.bit_length()) if 2**i < longest]
    sizes = jnp.array([*sizes, longest])
    x = f'{kind}_transitions'
    found[x] = sizes
    per_task = jax.vmap(measure, (None, 0, 0, 0, 0, 0))
    inputs = (context_, mask, rows, evidence.rows_mask, keys)
    # One after the other, so that it takes no more memory than an update.
    values = jax.lax.map(lambda size: per_task(size, *inputs), sizes)  # pylint: disable=cell-var-from-loop
    found |= {
      f'{name}_by_{x}': jnp.mean(value, axis=1)
      for name, value in values.items()
    }
  return found


def make(
  problem: Problem, config: Config, axis_name: str | None = None
) -> Algorithm:
  """SMAC for one family.

  Args:
    problem: what it is for.
    config: hyper-parameters.
    axis_name: device axis when the meta-batch is sharded.

  Returns:
    An Algorithm.

  Raises:
    ValueError: a switch has an unknown value.
  """
  validate(config)
  networks = make_networks(problem.spec, config)
  optimizers = {
    'context': optax.adam(config.context_lr),
    'critic': optax.adam(config.critic_lr),
    'actor': optax.adam(config.actor_lr),
  }

  def draw_noise(state, batch):
    query_shape = (batch.query.reward.shape[1], problem.spec.action_size)
    shapes = {
      'latent': (config.latent_size,),
      'next_latent': (config.latent_size,),
      'action': query_shape,
      'next_action': query_shape,
    }
    return {
      name: task_noise(
        latent.slot_keys(state.key, state.step, batch.slot, i), shape
      )
      for i, (name, shape) in enumerate(shapes.items())
    }

  def update(state, batch, online):
    noise = draw_noise(state, batch)

    def total(params):
      terms, logs = losses(
        params,
        state.target_params,
        batch,
        noise,
        networks,
        config,
        online,
        axis_name,
      )
      return sum(terms.values()), logs

    gradients, logs = jax.grad(total, has_aux=True)(state.params)
    gradients, logs = parallel.pmean((gradients, logs), axis_name)
    frozen = online and not config.train_context_online
    params, opt_state = optim.step_groups(
      optimizers,
      gradients,
      state.opt_state,
      state.params,
      frozen=('context',) if frozen else (),
    )
    targets = optim.polyak(
      state.target_params, params['critic'], config.target_rate
    )
    return state.replace(
      step=state.step + 1,
      params=params,
      target_params=targets,
      opt_state=opt_state,
    ), logs

  def begin_online(state):
    snapshot = jax.tree.map(jnp.copy, state.params['context'])
    return state.replace(extras=snapshot)

  def relabel(state, context_, valid, data, key):
    current = limits.chosen(config, 'label_with', 'current')
    return predicted_reward(
      state.params['context'] if current else state.extras,
      networks,
      context_,
      valid,
      data,
      jax.random.normal(key, (config.latent_size,)),
    )

  offline, online = make_stages(config, update)
  return Algorithm(
    init=lambda key: init_state(key, networks, optimizers),
    loops=(
      Loop('offline', (offline,)),
      Loop('online', (online,), iterations=None, begin=begin_online),
    ),
    relabel=relabel,
    diagnose=lambda state, evidence: diagnose(state, evidence, networks),
    **latent.context_acting(
      networks.encoder,
      networks.actor,
      config.latent_size,
      config.latent_resample_period,
    ),
  )
