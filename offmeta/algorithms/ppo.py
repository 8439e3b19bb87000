"""PPO: proximal policy optimisation from rollouts alone.

Schulman, Wolski, Dhariwal, Radford, Klimov: "Proximal Policy Optimization
Algorithms", 2017, arXiv 1707.06347. On-policy, with true rewards and without
logged data. It knows nothing of tasks: of several it learns one policy for all.

The policy is a Gaussian whose samples are clipped to [-1, 1] on the way into
the environment, rather than a tanh of one: its entropy has a closed form, and
log-probabilities are those of the samples themselves, which the data hold
(atanh of an action near 1 has lost its digits).
Networks have ReLU layers and start as everywhere here (the paper's: tanh). Not
in the paper: clipped gradients, an epsilon of 1e-5 in Adam, and advantages that
are standardised.
Minibatches hold equally many steps of every environment, so that an update is
the same on one device and on several.
"""

from collections.abc import Callable
import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from offmeta import limits, optim, parallel
from offmeta.algorithms import latent
from offmeta.losses import advantages, policy as policy_losses, td
from offmeta.networks import actors, critics
from offmeta.types import (
  Algorithm,
  Array,
  BatchSpec,
  EnvSpec,
  LearnerState,
  Loop,
  MetaBatch,
  Network,
  Params,
  Policy,
  Problem,
  Rollout,
  Rollouts,
  Stage,
  Transition,
)

# Settings whose defaults are not the paper's: (here, there, why).
DIFFERENCES = {}


@dataclasses.dataclass(frozen=True)
class Config:
  """Hyper-parameters; defaults are table 3 of the paper (MuJoCo, 1M steps)."""

  actor_hidden: limits.Widths = (64, 64)
  value_hidden: limits.Widths = (64, 64)
  initial_std: limits.Positive = 1.0  # of actions, before they are clipped
  actor_lr: limits.Weight = 3e-4
  value_lr: limits.Weight = 3e-4
  adam_eps: limits.Positive = 1e-5
  max_grad_norm: limits.PositiveOrInf = 0.5  # of each network's gradient
  discount: limits.Share = 0.99
  gae_lambda: limits.Share = 0.95
  clip: limits.PositiveOrInf = 0.2  # of the ratio
  clip_value: bool = False  # by the same number, in units of scaled returns
  entropy_weight: limits.Weight = 0.0
  # Over what advantages are standardised.
  standardise: Literal['minibatch', 'batch', 'none'] = 'minibatch'
  reward_scale: limits.Positive = 1.0  # multiplies rewards in the losses only
  num_envs: limits.Count = 1  # spread evenly over the training tasks
  num_steps: limits.Count = 2048  # of each, per iteration
  num_epochs: limits.Count = 10  # passes over the data of an iteration
  num_minibatches: limits.Count = 32  # per pass


VARIANT_FIXED = ('actor_hidden', 'value_hidden')


def validate(config: Config):
  """What types cannot say.

  Raises:
    ValueError: names the setting and what would be accepted.
  """
  limits.check(config, 'ppo')
  if config.num_steps % config.num_minibatches:
    raise ValueError(
      f'ppo.num_minibatches: {config.num_minibatches} does not divide the'
      f' num_steps={config.num_steps} of an environment; choose a divisor'
    )


class Networks(NamedTuple):
  """The two networks."""

  actor: Network  # s -> Normal
  value: Network  # s -> [...]


class Steps(NamedTuple):
  """What the losses are taken on, leaves [E, T, ...]; no gradient."""

  observation: Array
  sample: Array  # [E, T, A], drawn by the policy, before it was clipped
  log_prob: Array  # of the sample, when it was drawn
  value: Array  # V(s) before the update
  advantage: Array


def make_networks(spec: EnvSpec, config: Config) -> Networks:
  """A Gaussian actor and a value function, which share nothing."""
  o, a = spec.observation_size, spec.action_size
  return Networks(
    actor=actors.gaussian_actor(
      (o,), a, config.actor_hidden, config.initial_std
    ),
    value=critics.scalar((o,), config.value_hidden),
  )


def make_optimizers(config: Config) -> dict[str, optax.GradientTransformation]:
  """One Adam per network, behind a bound on the gradient's norm."""

  def make(rate):
    return optax.chain(
      optax.clip_by_global_norm(config.max_grad_norm),
      optax.adam(rate, eps=config.adam_eps),
    )

  return {'actor': make(config.actor_lr), 'value': make(config.value_lr)}


def prepare(
  params: dict[str, Params],
  rollout: Transition,
  networks: Networks,
  config: Config,
) -> Steps:
  """Values and advantages of fresh rollouts, under the present parameters.

  Args:
    params: groups 'actor' and 'value'.
    rollout: leaves [E, T, ...]; extras hold 'truncated' and what `act` says.
    networks, config: see `losses`.
  """
  value = networks.value.apply(params['value'], rollout.observation)
  truncated = rollout.extras['truncated']
  advantage = advantages.generalized(
    config.reward_scale * rollout.reward,
    rollout.discount,
    jnp.maximum(truncated, 1.0 - rollout.discount),
    value,
    networks.value.apply(params['value'], rollout.next_observation),
    config.discount,
    config.gae_lambda,
  )
  return Steps(
    rollout.observation,
    rollout.extras['sample'],
    rollout.extras['log_prob'],
    value,
    advantage,
  )


def losses(
  params: dict[str, Params],
  steps: Steps,
  advantage: Array,
  networks: Networks,
  config: Config,
) -> tuple[dict[str, Array], dict[str, Array]]:
  """All loss terms of one minibatch, and what to log.

  Args:
    params: groups 'actor' and 'value'.
    steps: leaves [E, B, ...].
    advantage: [E, B], standardised or not.
    networks, config: see there.

  Returns:
    Terms {'actor', 'value'} whose sum is minimised, and what to log, scalars.
  """
  distribution = networks.actor.apply(params['actor'], steps.observation)
  log_prob = distribution.log_prob(steps.sample)
  entropy = jnp.mean(distribution.entropy())
  surrogate = jnp.mean(
    policy_losses.clipped_surrogate(
      log_prob, steps.log_prob, advantage, config.clip
    )
  )
  value = networks.value.apply(params['value'], steps.observation)
  target = jax.lax.stop_gradient(steps.value + steps.advantage)
  if config.clip_value:
    error = td.clipped_squared_error(value, steps.value, target, config.clip)
  else:
    error = td.squared_error(value, target)
  terms = {
    'actor': surrogate - config.entropy_weight * entropy,
    'value': jnp.mean(error),
  }
  change = log_prob - steps.log_prob
  outside = jnp.abs(jnp.exp(change) - 1.0) > config.clip
  return terms, {
    'actor/loss': surrogate,
    'actor/entropy': entropy,
    'actor/kl': jnp.mean(jnp.exp(change) - 1.0 - change),
    'actor/clipped': jnp.mean(outside.astype(jnp.float32)),
    'value/loss': terms['value'],
    'value/target': jnp.mean(target),
  }


def update(
  state: LearnerState,
  batch: MetaBatch,
  networks: Networks,
  config: Config,
  axis_name: str | None,
) -> tuple[LearnerState, dict[str, Array]]:
  """All epochs over the rollouts of an iteration.

  Args:
    state: groups 'actor' and 'value'.
    batch: fresh rollouts, query leaves [E, T, ...].
    networks, config: see `losses`.
    axis_name: device axis over which the environments are sharded.

  Returns:
    The next state, and means over all minibatches.
  """
  optimizers = make_optimizers(config)
  query = batch.query
  steps = prepare(state.params, query, networks, config)
  scaled = steps.advantage
  if limits.chosen(config, 'standardise', 'batch'):
    scaled = advantages.standardise(scaled, axis_name)
  keys = latent.slot_keys(state.key, state.step, batch.slot, 0)
  num_envs, num_steps = query.reward.shape

  def minibatch(carry, rows):
    params, opt_state = carry
    part, advantage = jax.tree.map(
      lambda x: jax.vmap(lambda row, at: row[at])(x, rows), (steps, scaled)
    )
    if limits.chosen(config, 'standardise', 'minibatch'):
      advantage = advantages.standardise(advantage, axis_name)

    def total(params):
      terms, logs = losses(params, part, advantage, networks, config)
      return sum(terms.values()), logs

    gradients, logs = parallel.pmean(
      jax.grad(total, has_aux=True)(params), axis_name
    )
    return optim.step_groups(optimizers, gradients, opt_state, params), logs

  def epoch(carry, number):
    order = jax.vmap(
      lambda key: jax.random.permutation(
        jax.random.fold_in(key, number), num_steps
      )
    )(keys)
    parts = order.reshape(num_envs, config.num_minibatches, -1)
    return jax.lax.scan(minibatch, carry, jnp.moveaxis(parts, 1, 0))

  (params, opt_state), logs = jax.lax.scan(
    epoch, (state.params, state.opt_state), jnp.arange(config.num_epochs)
  )
  reward = parallel.pmean(jnp.mean(query.reward), axis_name)
  return state.replace(
    step=state.step + 1, params=params, opt_state=opt_state
  ), {**jax.tree.map(jnp.mean, logs), 'rollout/reward': reward}


def explore(networks: Networks) -> Policy:
  """Samples, and says what and how likely it was; params are the actor's."""

  def act(params, state, observation, key):
    distribution = networks.actor.apply(params, observation)
    noise = jax.random.normal(key, distribution.mean.shape)
    sample = distribution.sample(noise)
    said = {'sample': sample, 'log_prob': distribution.log_prob(sample)}
    return jnp.clip(sample, -1.0, 1.0), state, said

  return _policy(act)


def evaluate(networks: Networks) -> Policy:
  """Acts with the mean."""

  def act(params, state, observation, key):
    del key
    return networks.actor.apply(params, observation).mean, state, {}

  return _policy(act)


def _policy(act: Callable) -> Policy:
  return Policy(
    init=lambda params, key: (),
    act=act,
    observe=lambda params, state, transition, key: state,
    adapt=lambda params, state, context, valid, key: state,
  )


def make(
  problem: Problem, config: Config, axis_name: str | None = None
) -> Algorithm:
  """PPO for the training tasks of a family.

  Args:
    problem: what it is for.
    config: hyper-parameters.
    axis_name: device axis when the environments are sharded.
  """
  networks = make_networks(problem.spec, config)

  def init(key):
    params = {
      'actor': networks.actor.init(jax.random.fold_in(key, 0)),
      'value': networks.value.init(jax.random.fold_in(key, 1)),
    }
    return optim.first_state(
      jax.random.fold_in(key, 2), params, make_optimizers(config)
    )

  stage = Stage(
    'ppo',
    1,
    BatchSpec(config.num_envs, Rollout()),
    lambda state, batch: update(state, batch, networks, config, axis_name),
  )
  return Algorithm(
    init=init,
    loops=(
      Loop(
        'online',
        (stage,),
        iterations=None,
        gather=Rollouts(config.num_envs, config.num_steps),
      ),
    ),
    explore=explore(networks),
    evaluate=evaluate(networks),
    evaluate_given_context=None,
    actor_params=lambda state: state.params['actor'],
    data=None,
  )
