"""SAC: soft actor-critic on one task, with an automatic temperature.

Haarnoja, Zhou, Hartikainen, Tucker, Ha, Tan, Kumar, Zhu, Gupta, Abbeel, Levine:
"Soft Actor-Critic Algorithms and Applications", 2018, arXiv 1812.05905. Online,
with true rewards. It knows nothing of other tasks: contexts are ignored, and
one learner per task gives the single-task reference and
the data of one specialist per task.

Deviations: the three gradients of an update are taken at the same parameters,
as in SMAC, and networks start as everywhere here (rlkit's initialisers).
`hidden_bias` and `tanh_correction` are for BOReL, whose release has others.
"""

from collections.abc import Callable
import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from offmeta import limits, optim, parallel
from offmeta.algorithms import latent
from offmeta.losses import policy as policy_losses, td
from offmeta.networks import actors, critics
from offmeta.networks.distributions import task_noise
from offmeta.types import (
  Algorithm,
  Array,
  BatchSpec,
  EnvSpec,
  Key,
  LearnerState,
  Loop,
  Network,
  Params,
  Policy,
  Problem,
  Rows,
  Stage,
  Transition,
)

# Settings whose defaults are not the release's: (here, released, why).
# Released: table 1 of the paper.
DIFFERENCES = {}


@dataclasses.dataclass(frozen=True)
class Config:
  """Hyper-parameters; defaults are table 1 of the paper."""

  critic_hidden: limits.Widths = (256, 256)
  actor_hidden: limits.Widths = (256, 256)
  hidden_bias: limits.Number = 0.0  # initial, of all networks
  # Log-std of the policy is clipped to [-20, this].
  max_log_std: limits.Number = 2.0
  # Of log pi: 'shifted' adds 1e-6, as released.
  tanh_correction: Literal['exact', 'shifted'] = 'exact'
  critic_lr: limits.Weight = 3e-4
  actor_lr: limits.Weight = 3e-4
  temperature_lr: limits.Weight = 3e-4
  discount: limits.Share = 0.99
  target_rate: limits.PositiveShare = 0.005  # polyak step of the target critics
  # Multiplies the reward in the TD target only.
  reward_scale: limits.Positive = 1.0
  # Alpha at the start; the release starts at 1.
  temperature: limits.Positive = 1.0
  learn_temperature: bool = True  # False: alpha stays fixed (first SAC)
  target_entropy_per_action: limits.Number = -1.0  # times A: the target entropy
  # Per online iteration; published: 1 per step.
  num_updates: limits.Count = 1000
  batch_size: limits.Count = 256  # transitions per update


class Networks(NamedTuple):
  """The two networks."""

  critic: Network  # (s, a) -> [2, ...]
  actor: Network  # s -> TanhNormal


def make_networks(spec: EnvSpec, config: Config) -> Networks:
  """Twin critics and a tanh-Gaussian actor."""
  o, a = spec.observation_size, spec.action_size
  return Networks(
    critic=critics.q_ensemble(
      (o, a), config.critic_hidden, 2, config.hidden_bias
    ),
    actor=actors.tanh_gaussian_actor(
      (o,),
      a,
      config.actor_hidden,
      config.hidden_bias,
      max_log_std=config.max_log_std,
      tanh_correction=config.tanh_correction,
    ),
  )


def losses(
  params: dict[str, Params],
  target_critic: Params,
  query: Transition,
  noise: tuple[Array, Array],
  networks: Networks,
  config: Config,
) -> tuple[dict[str, Array], dict[str, Array]]:
  """All loss terms of one update, and what to log (paper, section 5 and 6).

  Gradient routing: each term reaches the group of its own name only.

  Args:
    params: groups 'critic', 'actor', 'temperature' (log alpha, []).
    target_critic: parameters of the target critics.
    query: leaves [M, B, ...].
    noise: of the action at s and at s', each [M, B, A], standard normal.
    networks: see `make_networks`.
    config: hyper-parameters.

  Returns:
    Scalar terms {'critic', 'actor', 'temperature'} whose sum is minimised,
    and scalars to log.
  """
  stop = jax.lax.stop_gradient
  own_noise, next_noise = noise
  alpha = jnp.exp(params['temperature'])

  def value(critic, observation, action):
    return jnp.min(networks.critic.apply(critic, observation, action), axis=0)

  next_action, next_log_prob = networks.actor.apply(
    params['actor'], query.next_observation
  ).sample(next_noise)
  target = td.td_target(
    query.reward,
    query.discount,
    policy_losses.soft_value_target(
      next_log_prob,
      value(target_critic, query.next_observation, next_action),
      alpha,
    ),
    config.discount,
    config.reward_scale,
  )
  q = networks.critic.apply(params['critic'], query.observation, query.action)
  action, log_prob = networks.actor.apply(
    params['actor'], query.observation
  ).sample(own_noise)
  own_q = value(stop(params['critic']), query.observation, action)
  target_entropy = config.target_entropy_per_action * action.shape[-1]
  terms = {
    'critic': jnp.mean(td.ensemble_squared_error(q, target)),
    'actor': jnp.mean(policy_losses.soft_policy(log_prob, own_q, stop(alpha))),
    'temperature': jnp.mean(
      policy_losses.temperature_loss(alpha, log_prob, target_entropy)
    ),
  }
  logs = {
    'critic/loss': terms['critic'],
    'critic/q': jnp.mean(q),
    'actor/loss': terms['actor'],
    'actor/entropy': -jnp.mean(log_prob),
    'temperature/alpha': alpha,
  }
  return terms, logs


def _policy(act: Callable) -> Policy:
  """A policy without a belief: (params, observation [O], key) -> action."""
  return Policy(
    init=lambda params, key: (),
    act=lambda params, state, observation, key: (
      act(params, observation, key),
      state,
      {},
    ),
    observe=lambda params, state, transition, key: state,
    adapt=lambda params, state, context, valid, key: state,
  )


def make_optimizers(
  config: Config,
) -> dict[str, optax.GradientTransformation]:
  """One Adam per parameter group."""
  return {
    'critic': optax.adam(config.critic_lr),
    'actor': optax.adam(config.actor_lr),
    'temperature': optax.adam(config.temperature_lr),
  }


def init_params(
  key: Key, networks: Networks, config: Config
) -> dict[str, Params]:
  """Groups 'critic', 'actor' and 'temperature' (log alpha, [])."""
  return {
    'critic': networks.critic.init(jax.random.fold_in(key, 0)),
    'actor': networks.actor.init(jax.random.fold_in(key, 1)),
    'temperature': jnp.log(jnp.float32(config.temperature)),
  }


def update(
  state: LearnerState,
  query: Transition,
  slots: Array,
  networks: Networks,
  config: Config,
  axis_name: str | None,
) -> tuple[LearnerState, dict[str, Array]]:
  """One step of critics, actor, temperature and targets.

  Args:
    state: with the groups of `init_params`, and the critics' targets. Other
      groups are neither read nor changed.
    query: leaves [M, B, ...].
    slots: [M], names of the tasks' random streams 0 and 1.
    networks: what has a critic and an actor for the query's observations.
    config: hyper-parameters.
    axis_name: device axis over which tasks are sharded.

  Returns:
    The next state, and scalars to log.
  """
  optimizers = make_optimizers(config)
  frozen = () if config.learn_temperature else ('temperature',)
  noise = tuple(
    task_noise(
      latent.slot_keys(state.key, state.step, slots, i), query.action.shape[1:]
    )
    for i in range(2)
  )

  def total(params):
    terms, logs = losses(
      params, state.target_params, query, noise, networks, config
    )
    return sum(terms.values()), logs

  own = {name: state.params[name] for name in optimizers}
  gradients, logs = parallel.pmean(
    jax.grad(total, has_aux=True)(own), axis_name
  )
  params, opt_state = optim.step_groups(
    optimizers, gradients, state.opt_state, state.params, frozen
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


def make(
  problem: Problem, config: Config, axis_name: str | None = None
) -> Algorithm:
  """SAC for one task of a family; it has no offline phase.

  Args:
    problem: what it is for.
    config: hyper-parameters.
    axis_name: device axis when the batch is sharded.
  """
  networks = make_networks(problem.spec, config)

  def init(key):
    params = init_params(key, networks, config)
    return optim.first_state(
      jax.random.fold_in(key, len(networks)),
      params,
      make_optimizers(config),
      params['critic'],
    )

  def explore(params, observation, key):
    distribution = networks.actor.apply(params, observation)
    noise = jax.random.normal(key, distribution.mean.shape)
    return distribution.sample(noise)[0]

  def evaluate(params, observation, key):
    del key
    return networks.actor.apply(params, observation).mode()

  batch = BatchSpec(num_tasks=1, query=Rows(config.batch_size))
  return Algorithm(
    init=init,
    loops=(
      Loop(
        'online',
        (
          Stage(
            'online',
            config.num_updates,
            batch,
            lambda state, batch: update(
              state, batch.query, batch.slot, networks, config, axis_name
            ),
          ),
        ),
        iterations=None,
      ),
    ),
    explore=_policy(explore),
    evaluate=_policy(evaluate),
    evaluate_given_context=_policy(evaluate),
    actor_params=lambda state: state.params['actor'],
  )
