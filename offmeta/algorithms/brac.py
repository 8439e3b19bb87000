"""Offline control given a latent: what FOCAL, CSRO and UNICORN share.

Soft actor-critic that stays near the logged actions, by a divergence that a
dual critic estimates (BRAC, Wu, Tucker, Nachum 2019, arXiv 1911.11361). The
latent z [M, B, Z] is a constant in all losses, and each term reaches the group
of parameters of its own name only.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from offmeta import limits, optim
from offmeta.losses import (
  divergence as divergence_losses,
  policy as policy_losses,
  td,
)
from offmeta.networks import actors, critics
from offmeta.types import (
  Array,
  EnvSpec,
  LearnerState,
  Network,
  Params,
  Transition,
)

Terms = dict[str, Array]  # scalars whose sum is minimised
Learner = tuple[dict[str, Params], dict[str, Any]]  # params, opt_state


@dataclasses.dataclass(frozen=True)
class Config:
  """Hyper-parameters of control (defaults: FOCAL's later code)."""

  critic_hidden: limits.Widths = (256, 256)
  actor_hidden: limits.Widths = (256, 256)
  hidden_bias: limits.Number = 0.1  # initial hidden biases, of all networks
  # Log-std is clipped to [-20, this]; 0 in FOCAL's first release and CSRO's.
  max_log_std: limits.Number = 2.0
  # Of log pi: 'shifted' adds 1e-6, as released.
  tanh_correction: Literal['exact', 'shifted'] = 'shifted'
  critic_lr: limits.Weight = 3e-4
  actor_lr: limits.Weight = 3e-4
  discount: limits.Share = 0.99
  # Polyak step of the target, every update.
  target_rate: limits.PositiveShare = 0.005
  # Multiplies the reward in the TD target only.
  reward_scale: limits.Positive = 1.0
  value_network: bool = False  # V and target V, else two target Qs
  value_hidden: limits.Widths = (256, 256)
  value_lr: limits.Weight = 3e-4
  entropy_weight: limits.Weight = 1.0  # on log pi in the policy loss
  entropy_in_target: bool = False  # and in the target of Q, or of V
  # On the squared policy means before the tanh.
  mean_weight: limits.Weight = 0.0
  log_std_weight: limits.Weight = 0.0  # on the squared policy log-std
  # Alpha, at the start; 0 and not learned: off.
  divergence_weight: limits.Weight = 0.2
  learn_divergence_weight: bool = False  # dual ascent on alpha
  divergence_weight_rate: limits.Weight = 1.0  # its step size
  target_divergence: limits.Weight = 0.05  # where alpha stays
  # Alpha is used clipped to [0, this].
  max_divergence_weight: limits.PositiveOrInf = 2000.0
  value_penalty: bool = True  # -alpha Dhat in the target of Q
  policy_penalty: bool = True  # alpha Dhat in the policy loss
  divergence_hidden: limits.Widths = (256, 256)
  divergence_lr: limits.Weight = 1e-4
  divergence_steps: limits.Count = 3  # of the dual critic, per update
  # Slope dc/da; 'value': c itself (released).
  gradient_penalty: Literal['action', 'value'] = 'action'
  gradient_penalty_weight: limits.Weight = 5.0

  @property
  def regularised(self) -> bool:
    """Whether there is a divergence at all."""
    return self.learn_divergence_weight or self.divergence_weight > 0


class Networks(NamedTuple):
  """One group of parameters each; None where it is not used."""

  critic: Network  # (s, a, z) -> [2, ...]
  actor: Network  # (s, z) -> TanhNormal
  value: Network | None  # (s, z) -> [...]
  divergence: Network | None  # (s, a, z) -> [...]


def make_networks(spec: EnvSpec, latent_size: int, config: Config) -> Networks:
  """All networks."""
  o, a, z = spec.observation_size, spec.action_size, latent_size
  bias = config.hidden_bias
  value = divergence = None
  if config.value_network:
    value = critics.scalar((o, z), config.value_hidden, bias)
  if config.regularised:
    divergence = critics.scalar((o, a, z), config.divergence_hidden, bias)
  return Networks(
    critic=critics.q_ensemble((o, a, z), config.critic_hidden, 2, bias),
    actor=actors.tanh_gaussian_actor(
      (o, z),
      a,
      config.actor_hidden,
      bias,
      max_log_std=config.max_log_std,
      tanh_correction=config.tanh_correction,
    ),
    value=value,
    divergence=divergence,
  )


def make_optimizers(
  networks: Networks, config: Config
) -> dict[str, optax.GradientTransformation]:
  """Adam for each group."""
  return {
    name: optax.adam(getattr(config, f'{name}_lr'))
    for name, network in networks._asdict().items()
    if network is not None
  }


def _estimate(
  critic: Params,
  query: Transition,
  action: Array,
  z: Array,
  networks: Networks,
) -> Array:
  """Dhat [M, B], with gradients into critic and own action."""
  logged, own = [
    networks.divergence.apply(critic, query.observation, a, z)
    for a in (query.action, action)
  ]
  return divergence_losses.dual_kl(logged, own)


def _soft_value(log_prob: Array, q: Array, config: Config) -> Array:
  """The smaller of q [2, M, B] with entropy, if that is set; detached."""
  return policy_losses.soft_value_target(
    log_prob,
    jnp.min(q, axis=0),
    config.entropy_weight if config.entropy_in_target else 0.0,
  )


def divergence_terms(
  params: Mapping[str, Params],
  query: Transition,
  z: Array,
  noise: Array,
  mix: Array,
  networks: Networks,
  config: Config,
) -> Terms:
  """What the dual critic descends: -Dhat, and its slope.

  Args:
    params: groups 'divergence', 'actor'.
    query: leaves [M, B, ...].
    z: [M, B, Z].
    noise: [M, B, A], standard normal.
    mix: [M, B], in [0, 1]: the share of the logged action where the slope is
      taken; the rest is the policy's.
    networks: see `make_networks`.
    config: hyper-parameters.
  """
  action, _ = networks.actor.apply(
    params['actor'], query.observation, z
  ).sample(noise)
  action = jax.lax.stop_gradient(action)

  def c(a):
    return networks.divergence.apply(
      params['divergence'], query.observation, a, z
    )

  mixed = action + mix[..., None] * (query.action - action)
  if limits.chosen(config, 'gradient_penalty', 'action'):
    slope = jax.grad(lambda a: jnp.sum(c(a)))(mixed)
  else:
    slope = c(mixed)[..., None]
  penalty = jnp.mean(divergence_losses.slope_penalty(slope))
  return {
    'divergence/loss': -jnp.mean(
      _estimate(params['divergence'], query, action, z, networks)
    ),
    'divergence/penalty': config.gradient_penalty_weight * penalty,
  }


def critic_terms(
  params: Mapping[str, Params],
  target: Params,
  weight: Array,
  query: Transition,
  z: Array,
  noise: Mapping[str, Array],
  networks: Networks,
  config: Config,
) -> Terms:
  """TD error; its divergence is that of (s, a), not of s'.

  Args:
    params: groups 'critic', 'actor', 'divergence'.
    target: parameters of the target: V, or two Qs.
    weight: alpha, [].
    query: leaves [M, B, ...].
    z: [M, B, Z].
    noise: 'own' and 'next' [M, B, A], standard normal.
    networks: see `make_networks`.
    config: hyper-parameters.
  """
  if config.value_network:
    next_value = networks.value.apply(target, query.next_observation, z)
  else:
    action, log_prob = networks.actor.apply(
      params['actor'], query.next_observation, z
    ).sample(noise['next'])
    next_value = _soft_value(
      log_prob,
      networks.critic.apply(target, query.next_observation, action, z),
      config,
    )
  if config.regularised and config.value_penalty:
    own, _ = networks.actor.apply(params['actor'], query.observation, z).sample(
      noise['own']
    )
    next_value -= weight * _estimate(
      params['divergence'], query, own, z, networks
    )
  y = td.td_target(  # detached
    query.reward,
    query.discount,
    next_value,
    config.discount,
    config.reward_scale,
  )
  q = networks.critic.apply(
    params['critic'], query.observation, query.action, z
  )
  return {'critic/loss': jnp.mean(td.ensemble_squared_error(q, y))}


def actor_terms(
  params: Mapping[str, Params],
  weight: Array,
  query: Transition,
  z: Array,
  noise: Array,
  networks: Networks,
  config: Config,
) -> tuple[Terms, dict[str, Array]]:
  """What the policy and, if there is one, the value network descend.

  Args:
    params: all groups; the critics after their update.
    weight: alpha, [].
    query: leaves [M, B, ...].
    z: [M, B, Z].
    noise: [M, B, A], standard normal.
    networks: see `make_networks`.
    config: hyper-parameters.

  Returns:
    Terms, and scalars to log.
  """
  stop = jax.lax.stop_gradient
  distribution = networks.actor.apply(params['actor'], query.observation, z)
  action, log_prob = distribution.sample(noise)
  q = networks.critic.apply(
    stop(params['critic']), query.observation, action, z
  )
  terms = {
    'actor/loss': jnp.mean(
      policy_losses.soft_policy(
        log_prob, jnp.min(q, axis=0), config.entropy_weight
      )
    ),
    'actor/regulariser': (
      config.mean_weight * jnp.mean(jnp.square(distribution.mean))
      + config.log_std_weight * jnp.mean(jnp.square(distribution.log_std))
    ),
  }
  logs = {'critic/q': jnp.mean(q), 'actor/entropy': -jnp.mean(log_prob)}
  if config.value_network:
    value = networks.value.apply(params['value'], query.observation, z)
    terms['value/loss'] = jnp.mean(
      td.squared_error(value, _soft_value(log_prob, q, config))
    )
  if config.regularised:
    estimate = jnp.mean(
      _estimate(stop(params['divergence']), query, action, z, networks)
    )
    logs |= {'divergence/estimate': estimate, 'divergence/weight': weight}
    if config.policy_penalty:
      terms['actor/divergence'] = weight * estimate
  return terms, logs


def update(
  state: LearnerState,
  learner: Learner,
  query: Transition,
  z: Array,
  noise: Mapping[str, Array],
  networks: Networks,
  config: Config,
  step: Callable[..., tuple[Learner, dict[str, Array]]],
) -> tuple[LearnerState, dict[str, Array]]:
  """The dual critic's steps, one of the Qs, one of the policy (and V).

  Args:
    state: its target_params and extras are used and moved on.
    learner: its params and opt_state, perhaps with other groups moved on.
    query: leaves [M, B, ...].
    z: [M, B, Z], detached.
    noise: 'own' and 'next' [M, B, A], and of each step of the dual critic
      'dual' [M, steps, B, A], standard normal, and 'mix' [M, steps, B].
    networks: see `make_networks`.
    config: hyper-parameters.
    step: (learner, groups, loss) -> (learner, logs): descends, in some
      groups, the terms of loss: params -> (Terms, scalars to log).

  Returns:
    The state of the next update, and scalars to log.
  """
  logs = {}
  alpha = state.extras['divergence_weight']
  weight = jnp.clip(alpha, 0.0, config.max_divergence_weight)
  for i in range(config.divergence_steps if config.regularised else 0):
    learner, new = step(
      learner,
      ('divergence',),
      lambda params: (
        divergence_terms(
          params,
          query,
          z,
          noise['dual'][:, i],
          noise['mix'][:, i],
          networks,
          config,
        ),
        {},
      ),
    )
    logs |= new
  learner, new = step(
    learner,
    ('critic',),
    lambda params: (
      critic_terms(
        params, state.target_params, weight, query, z, noise, networks, config
      ),
      {},
    ),
  )
  logs |= new
  groups = ('actor', 'value') if config.value_network else ('actor',)
  learner, new = step(
    learner,
    groups,
    lambda params: actor_terms(
      params, weight, query, z, noise['own'], networks, config
    ),
  )
  logs |= new
  if config.learn_divergence_weight:
    alpha = divergence_losses.next_weight(
      alpha,
      logs['divergence/estimate'],
      config.target_divergence,
      config.divergence_weight_rate,
    )
  params, opt_state = learner
  target = optim.polyak(
    state.target_params,
    params['value' if config.value_network else 'critic'],
    config.target_rate,
  )
  return state.replace(
    step=state.step + 1,
    params=params,
    target_params=target,
    opt_state=opt_state,
    extras={'divergence_weight': alpha},
  ), logs
