"""SMAC's losses as functions of what its networks gave.

`smac.losses` feeds them and decides what gradients reach.
"""

import jax.numpy as jnp

from offmeta import limits, parallel
from offmeta.algorithms.smac_config import Config
from offmeta.losses import latent as latent_losses, policy as policy_losses, td
from offmeta.networks.distributions import Gaussian, TanhNormal
from offmeta.types import Array, Transition


def context_terms(
  posterior: Gaussian,
  decoded: Array,
  query: Transition,
  config: Config,
  axis_name: str | None,
) -> tuple[dict[str, Array], dict[str, Array]]:
  """Reward error [M, B] and KL [M]: terms, logs."""
  reward_loss = jnp.mean(td.squared_error(decoded, query.reward))
  kl = latent_losses.kl_to_standard_normal(posterior.mean, posterior.variance)
  kl_loss = jnp.mean(kl)
  # pmean over devices is applied later.
  if limits.chosen(config, 'kl_over_tasks', 'sum'):
    kl_loss = jnp.sum(kl) * parallel.axis_size(axis_name)
  terms = {'reward': reward_loss, 'kl': config.kl_weight * kl_loss}
  return terms, {'decoder/loss': reward_loss, 'encoder/kl': jnp.mean(kl)}


def critic_term(
  q: Array,
  next_q: Array,
  next_log_prob: Array,
  query: Transition,
  config: Config,
) -> Array:
  """TD error of all members q [K, M, B]; next_q [K, M, B] is fixed."""
  next_value = jnp.min(next_q, axis=0)
  if limits.chosen(config, 'actor', 'sac') and config.sac.entropy_in_target:
    next_value = policy_losses.soft_value_target(
      next_log_prob, next_value, config.sac.entropy_weight
    )
  target = td.td_target(
    query.reward,
    query.discount,
    next_value,
    config.discount,
    config.reward_scale,
  )
  return jnp.mean(td.ensemble_squared_error(q, target))


def awac_term(
  distribution: TanhNormal,
  action: Array,
  q: Array,
  own_q: Array,
  q_weight: float,
  config: Config,
  axis_name: str | None,
) -> tuple[Array, dict[str, Array]]:
  """Advantage-weighted likelihood, and -Q of own actions.

  Args:
    distribution: of the actor at the query's states.
    action: [M, B, A], the query's.
    q, own_q: [M, B], the smallest Q of the query's and of an own action.
    q_weight: weight of -own_q; 0 leaves it out.
    config: hyper-parameters.
    axis_name: device axis over which tasks are sharded.
  """
  weight = policy_losses.softmax_advantage_weights(
    q - own_q, config.awac_temperature, axis_name
  )
  log_prob = distribution.log_prob(action)
  awac_loss = jnp.mean(policy_losses.weighted_log_likelihood(log_prob, weight))
  loss = config.awac_weight * awac_loss
  if q_weight:
    loss += q_weight * jnp.mean(-own_q)
  return loss, {
    'actor/awac_loss': awac_loss,
    'actor/log_prob': jnp.mean(log_prob),
    'actor/max_weight': parallel.pmax(jnp.max(weight), axis_name),
  }


def sac_term(
  distribution: TanhNormal, log_prob: Array, own_q: Array, config: Config
) -> tuple[Array, dict[str, Array]]:
  """PEARL's policy loss and regularisers.

  Args:
    distribution: of the actor at the query's states.
    log_prob, own_q: [M, B], of one own action each.
    config: hyper-parameters.
  """
  sac = config.sac
  loss = jnp.mean(
    policy_losses.soft_policy(log_prob, own_q, sac.entropy_weight)
  )
  loss += policy_losses.output_penalty(
    distribution.mean, distribution.log_std, sac.mean_weight, sac.log_std_weight
  )
  return loss, {'actor/sac_loss': loss, 'actor/entropy': -jnp.mean(log_prob)}
