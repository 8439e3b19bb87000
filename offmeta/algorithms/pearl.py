"""PEARL: off-policy meta-RL with a probabilistic context encoder.

Rakelly, Zhou, Quillen, Finn, Levine: "Efficient Off-Policy Meta-Reinforcement
Learning via Probabilistic Context Variables", ICML 2019, arXiv 1903.08254.
Soft actor-critic with a value network (its first form), online, with true
rewards. Two published settings differ and are switches:

* the behaviour policy of SMAC (the defaults here, but for
  `DIFFERENCES`): the encoder also trains on the reward error of a decoder, the
  latent is drawn anew at every step, hidden and last biases start at 0, value
  learning rate 1e-3, the tanh correction of log pi is exact, the penalty on
  means is on tanh(mean)^2;
* the first release (`FIRST_RELEASE`): no decoder, a latent
  per episode, hidden biases of 0.1 and last ones in U(+-3e-3), value learning
  rate 3e-4, log(1 - a^2 + 1e-6) as tanh correction (at a mean of 8 log pi is
  1.2 less and its gradient 0.62 instead of 2), the penalty before the tanh.

In both the KL is a *sum* over tasks, so the meta-batch size scales it.
"""

from collections.abc import Mapping
import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from offmeta import limits, optim, parallel
from offmeta.algorithms import latent
from offmeta.losses import latent as latent_losses, policy as policy_losses, td
from offmeta.networks import actors, context, critics
from offmeta.networks.distributions import task_noise
from offmeta.types import (
  Algorithm,
  Array,
  BatchSpec,
  EnvSpec,
  Key,
  LearnerState,
  Loop,
  MetaBatch,
  Network,
  Params,
  Problem,
  Rows,
  Stage,
)

# Settings whose defaults are not the release's: (here, released, why).
# Released: SMAC's behaviour policy. `tests/algorithms/test_differences.py`
# holds that nothing is missing, here and in the other files.
DIFFERENCES = {
  'zero_last_bias': (
    False,
    True,
    'as in the first release; published results of this'
    ' package were measured so',
  ),
  'mean_penalised': ('before_tanh', 'after_tanh', 'the same'),
}
# All settings but sizes that the first release has otherwise than the defaults.
FIRST_RELEASE = {
  'hidden_bias': 0.1,
  'tanh_correction': 'shifted',
  'value_lr': 3e-4,
  'train_decoder': False,
  'latent_resample_period': 0,
}


@dataclasses.dataclass(frozen=True)
class OnlineConfig:
  """Updates of one online iteration."""

  num_updates: limits.Count = 16_000  # gradient steps per iteration (4000 x 4)
  num_tasks: limits.Count = 4  # meta-batch
  query_size: limits.Count = 256  # query transitions per task
  context_size: limits.Count = 64  # encoder transitions per task
  task_repeat: limits.Count = 4  # consecutive updates on the same tasks


@dataclasses.dataclass(frozen=True)
class Config:
  """Hyper-parameters (defaults: SMAC's data generator)."""

  latent_size: limits.Width = 5  # dimensions of z
  encoder_hidden: limits.Widths = (200, 200, 200)
  decoder_hidden: limits.Widths = (64, 64)
  critic_hidden: limits.Widths = (300, 300, 300)
  value_hidden: limits.Widths = (300, 300, 300)
  actor_hidden: limits.Widths = (300, 300, 300)
  # Initial hidden biases; 0.1 in the first release.
  hidden_bias: limits.Number = 0.0
  # Else U(+-3e-3), of a policy's mean U(+-1e-3).
  zero_last_bias: bool = False
  # Of log pi: 'shifted' adds 1e-6, as released.
  tanh_correction: Literal['exact', 'shifted'] = 'exact'
  context_lr: limits.Weight = 3e-4  # encoder and decoder
  critic_lr: limits.Weight = 3e-4
  value_lr: limits.Weight = 1e-3  # 3e-4 in the first release
  actor_lr: limits.Weight = 3e-4
  discount: limits.Share = 0.99
  # Polyak step of the target value, every update.
  target_rate: limits.PositiveShare = 0.005
  # Sets the temperature: entropy weight is 1.
  reward_scale: limits.Positive = 5.0
  kl_weight: limits.Weight = 0.1  # on the KL summed over tasks and dimensions
  train_decoder: bool = True  # reward error as a further encoder loss
  backprop_q_into_encoder: bool = True  # TD gradient into z
  # On the squared policy means.
  mean_weight: limits.Weight = 1e-3
  mean_penalised: Literal['before_tanh', 'after_tanh'] = 'before_tanh'
  log_std_weight: limits.Weight = 1e-3  # on the squared policy log-std
  use_next_observation: bool = False  # in the context (dynamics families)
  # Steps per z while acting; 0: episode.
  latent_resample_period: limits.CountOrZero = 1
  online: OnlineConfig = OnlineConfig()


class Networks(NamedTuple):
  """The five networks."""

  encoder: Network  # (context, mask) -> Gaussian [Z]
  decoder: Network  # (s, a, z) -> reward
  critic: Network  # (s, a, z) -> [2, ...]
  value: Network  # (s, z) -> [...]
  actor: Network  # (s, z) -> TanhNormal


def make_networks(spec: EnvSpec, config: Config) -> Networks:
  """All networks."""
  o, a, z = spec.observation_size, spec.action_size, config.latent_size
  start = (config.hidden_bias, config.zero_last_bias)
  return Networks(
    encoder=context.set_encoder(
      o, a, z, config.encoder_hidden, config.use_next_observation, *start
    ),
    decoder=critics.scalar((o, a, z), config.decoder_hidden, *start),
    critic=critics.q_ensemble((o, a, z), config.critic_hidden, 2, *start),
    value=critics.scalar((o, z), config.value_hidden, *start),
    actor=actors.tanh_gaussian_actor(
      (o, z),
      a,
      config.actor_hidden,
      *start,
      tanh_correction=config.tanh_correction,
    ),
  )


def validate(config: Config):
  """Checks the values of settings.

  Raises:
    ValueError: names the switch and what it takes.
  """
  limits.check(config, 'pearl')


def _repeat(z: Array, batch_size: int) -> Array:
  """One latent per task [M, Z] for each of its transitions [M, B, Z]."""
  return jnp.broadcast_to(z[:, None], (z.shape[0], batch_size, z.shape[1]))


def critic_losses(
  params: dict[str, Params],
  target_value: Params,
  batch: MetaBatch,
  noise: Array,
  networks: Networks,
  config: Config,
  axis_name: str | None,
) -> tuple[dict[str, Array], Array]:
  """Terms that train critics, encoder and decoder.

  Args:
    params: groups 'context', 'critic'.
    target_value: parameters of the target value network.
    batch: leaves [M, N, ...] and [M, B, ...].
    noise: [M, Z], standard normal.
    networks: see `make_networks`.
    config: hyper-parameters.
    axis_name: device axis over which tasks are sharded.

  Returns:
    Scalar terms {'critic', 'kl', 'reward'} and z [M, B, Z], detached.
  """
  stop = jax.lax.stop_gradient
  query = batch.query
  posterior = networks.encoder.apply(
    params['context']['encoder'], batch.context, batch.context_mask
  )
  z = _repeat(posterior.sample(noise), query.reward.shape[1])
  target = td.td_target(
    query.reward,
    query.discount,
    networks.value.apply(target_value, query.next_observation, stop(z)),
    config.discount,
    config.reward_scale,
  )
  q = networks.critic.apply(
    params['critic'],
    query.observation,
    query.action,
    z if config.backprop_q_into_encoder else stop(z),
  )
  kl = latent_losses.kl_to_standard_normal(posterior.mean, posterior.variance)
  # A sum over all tasks: gradients are averaged over devices afterwards.
  kl_loss = jnp.sum(kl) * parallel.axis_size(axis_name)
  terms = {
    'critic': jnp.mean(td.ensemble_squared_error(q, target)),
    'kl': config.kl_weight * kl_loss,
  }
  if config.train_decoder:
    decoded = networks.decoder.apply(
      params['context']['decoder'], query.observation, query.action, z
    )
    terms['reward'] = jnp.mean(td.squared_error(decoded, query.reward))
  return terms, stop(z)


def actor_losses(
  params: dict[str, Params],
  critic: Params,
  batch: MetaBatch,
  z: Array,
  noise: Array,
  networks: Networks,
  config: Config,
) -> tuple[dict[str, Array], dict[str, Array]]:
  """Terms that train value and actor.

  Args:
    params: groups 'value', 'actor'.
    critic: the critics after their update; held fixed.
    batch: leaves [M, B, ...] in `query`.
    z: [M, B, Z], detached.
    noise: [M, B, A], standard normal.
    networks: see `make_networks`.
    config: hyper-parameters.

  Returns:
    Scalar terms {'value', 'actor', 'regulariser'} and scalars to log.
  """
  observation = batch.query.observation
  distribution = networks.actor.apply(params['actor'], observation, z)
  action, log_prob = distribution.sample(noise)
  q = jnp.min(networks.critic.apply(critic, observation, action, z), axis=0)
  value = networks.value.apply(params['value'], observation, z)
  terms = {
    'value': jnp.mean(
      td.squared_error(value, policy_losses.soft_value_target(log_prob, q))
    ),
    'actor': jnp.mean(policy_losses.soft_policy(log_prob, q)),
    'regulariser': policy_losses.output_penalty(
      distribution.mode()
      if config.mean_penalised == 'after_tanh'
      else distribution.mean,
      distribution.log_std,
      config.mean_weight,
      config.log_std_weight,
    ),
  }
  logs = {
    'value/loss': terms['value'],
    'actor/loss': terms['actor'],
    'actor/entropy': -jnp.mean(log_prob),
    'critic/q': jnp.mean(q),
  }
  return terms, logs


def init_state(
  key: Key, networks: Networks, optimizers: Mapping
) -> LearnerState:
  """An untrained learner; the target value network is a copy."""
  p = {
    name: network.init(jax.random.fold_in(key, i))
    for i, (name, network) in enumerate(networks._asdict().items())
  }
  params = {
    'context': {'encoder': p['encoder'], 'decoder': p['decoder']},
    'critic': p['critic'],
    'value': p['value'],
    'actor': p['actor'],
  }
  return optim.first_state(
    jax.random.fold_in(key, len(networks)), params, optimizers, params['value']
  )


def make(
  problem: Problem, config: Config, axis_name: str | None = None
) -> Algorithm:
  """PEARL for one family; it has no offline phase.

  Args:
    problem: what it is for.
    config: hyper-parameters.
    axis_name: device axis when the meta-batch is sharded.

  Raises:
    ValueError: a switch has an unknown value.
  """
  validate(config)
  networks = make_networks(problem.spec, config)
  optimizers = {
    'context': optax.adam(config.context_lr),
    'critic': optax.adam(config.critic_lr),
    'value': optax.adam(config.value_lr),
    'actor': optax.adam(config.actor_lr),
  }

  def update(state, batch):
    keys = [
      latent.slot_keys(state.key, state.step, batch.slot, i) for i in range(2)
    ]
    latent_noise = task_noise(keys[0], (config.latent_size,))
    action_noise = task_noise(keys[1], batch.query.action.shape[1:])

    def first(params):
      terms, z = critic_losses(
        params,
        state.target_params,
        batch,
        latent_noise,
        networks,
        config,
        axis_name,
      )
      return sum(terms.values()), (terms, z)

    group = {k: state.params[k] for k in ('context', 'critic')}
    gradients, (terms, z) = jax.grad(first, has_aux=True)(group)
    params, opt_state = optim.step_groups(
      optimizers,
      parallel.pmean(gradients, axis_name),
      state.opt_state,
      state.params,
      frozen=('value', 'actor'),
    )

    def second(group):
      terms, logs = actor_losses(
        group, params['critic'], batch, z, action_noise, networks, config
      )
      return sum(terms.values()), logs

    group = {k: state.params[k] for k in ('value', 'actor')}
    gradients, logs = jax.grad(second, has_aux=True)(group)
    params, opt_state = optim.step_groups(
      optimizers,
      parallel.pmean(gradients, axis_name),
      opt_state,
      params,
      frozen=('context', 'critic'),
    )
    logs.update(
      {'critic/loss': terms['critic'], 'encoder/kl_loss': terms['kl']}
    )
    if config.train_decoder:
      logs['decoder/loss'] = terms['reward']
    targets = optim.polyak(
      state.target_params, params['value'], config.target_rate
    )
    return state.replace(
      step=state.step + 1,
      params=params,
      target_params=targets,
      opt_state=opt_state,
    ), parallel.pmean(logs, axis_name)

  online = config.online
  batch = BatchSpec(
    num_tasks=online.num_tasks,
    query=Rows(online.query_size),
    context=Rows(online.context_size),
    task_repeat=online.task_repeat,
  )
  return Algorithm(
    init=lambda key: init_state(key, networks, optimizers),
    loops=(
      Loop(
        'online',
        (Stage('online', online.num_updates, batch, update),),
        iterations=None,
      ),
    ),
    **latent.context_acting(
      networks.encoder,
      networks.actor,
      config.latent_size,
      config.latent_resample_period,
    ),
  )
