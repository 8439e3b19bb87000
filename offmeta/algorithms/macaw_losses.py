"""MACAW's networks, their losses and the inner loop."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from offmeta import limits, optim
from offmeta.algorithms import maml
from offmeta.algorithms.macaw_config import Config
from offmeta.losses import policy as policy_losses, returns, td
from offmeta.networks import weight_transform
from offmeta.networks.distributions import Normal
from offmeta.networks.weight_transform import AdaptableNetwork, Weights
from offmeta.types import Array, EnvSpec, Params, Transition


class Networks(NamedTuple):
  """The two networks."""

  policy: AdaptableNetwork  # s -> mean; (s, a) -> (mean, advantage)
  value: AdaptableNetwork  # s -> [...]


def make_networks(spec: EnvSpec, config: Config) -> Networks:
  """All networks; without a coefficient there is no head."""
  head = config.head_hidden if config.advantage_coef else 0
  return Networks(
    policy=weight_transform.policy_network(
      spec.observation_size,
      spec.action_size,
      config.hidden,
      head,
      config.layer,
      config.latent_size,
      config.head_relu_on_action,
    ),
    value=weight_transform.value_network(
      spec.observation_size, config.hidden, config.layer, config.latent_size
    ),
  )


# Losses of one task or of several, leaves [..., B, ...].


def value_loss(
  network: AdaptableNetwork,
  weights: Weights,
  rows: Transition,
  target: Array,
  mask: Array,
) -> Array:
  """Mean squared error [...] of the value, from a target [..., B]."""
  value = network.apply_generated(weights, rows.observation)
  return policy_losses.masked_mean(td.squared_error(value, target), mask)


def bootstrapped_return(
  network: AdaptableNetwork,
  weights: Weights,
  rows: Transition,
  config: Config,
) -> Array:
  """mc + Gamma V(s_T) [..., B] as the switches have it, no gradient.

  The release adds V at every episode's end, even where the body fell (spec
  macaw 9.1).
  """
  extras = rows.extras
  if limits.chosen(config, 'bootstrap_terminal', 'none'):
    return extras['return_to_go']
  power = extras['bootstrap']
  if config.mask_bootstrap_on_death:
    power = power * extras['last_discount']
  last = network.apply_generated(weights, extras['last_observation'])
  return returns.bootstrapped(extras['return_to_go'], power, last)


class PolicyLoss(NamedTuple):
  """Terms of the policy's loss, each [...].

  Attributes:
    awr: advantage-weighted regression.
    advantage: squared error of the head; 0 where there is none.
    max_weight: the largest weight.
  """

  awr: Array
  advantage: Array
  max_weight: Array


def policy_loss(
  networks: Networks,
  weights: Weights,
  value: Weights,
  rows: Transition,
  mask: Array,
  config: Config,
  head: bool,
) -> PolicyLoss:
  """The inner policy loss; gradients flow into the policy's `weights` only.

  The head's target is the raw advantage; the standardised one makes weights.
  """
  advantage = jax.lax.stop_gradient(
    bootstrapped_return(networks.value, value, rows, config)
    - networks.value.apply_generated(value, rows.observation)
  )
  weight = policy_losses.exponential_advantage_weights(
    advantage, mask, config.max_weight, config.temperature, config.adv_std_eps
  )
  error = jnp.zeros_like(advantage)
  if head:
    mean, predicted = networks.policy.apply_generated(
      weights, rows.observation, rows.action
    )
    error = td.squared_error(predicted, advantage)
  else:
    mean = networks.policy.apply_generated(weights, rows.observation)
  awr = policy_losses.weighted_log_likelihood(
    Normal(mean, config.action_std).log_prob(rows.action), weight
  )
  return PolicyLoss(
    awr=policy_losses.masked_mean(awr, mask),
    advantage=policy_losses.masked_mean(error, mask),
    max_weight=jnp.max(mask * weight, axis=-1),
  )


class Inner(NamedTuple):
  """Both inner steps of M tasks; leaves [M, ...].

  Attributes:
    policy, value: adapted weights.
    target: weights of the value in the outer value target, no gradient.
    gradients: by group, 'policy' and 'value', in the weights.
    value_loss, policy_loss: before the steps.
  """

  policy: Weights
  value: Weights
  target: Weights
  gradients: dict[str, Weights]
  value_loss: Array
  policy_loss: PolicyLoss


def inner_loop(
  params: dict[str, Params],
  context: Transition,
  mask: Array,
  networks: Networks,
  config: Config,
) -> Inner:
  """A value step on plain returns, then a policy step.

  Args:
    params: groups of `init_params`.
    context: annotated, leaves [M, N, ...].
    mask: [M, N]; nothing else of the context has an influence.
    networks: see `make_networks`.
    config: hyper-parameters.
  """
  steps = step_sizes(params, config)
  rows = maml.only_valid(context, mask)
  head = 'coefficient' in params

  def of_value(weights, rows, mask):
    loss = value_loss(
      networks.value, weights, rows, rows.extras['return_to_go'], mask
    )
    return loss, loss

  def of_policy(weights, value, rows, mask):
    terms = policy_loss(networks, weights, value, rows, mask, config, head)
    if not head:
      return terms.awr, terms
    coefficient = jax.nn.softplus(params['coefficient'])
    return terms.awr + coefficient * terms.advantage, terms

  value, value_gradients, value_losses = maml.inner_step(
    networks.value,
    params['value'],
    steps['value'],
    of_value,
    config.task_loop,
    rows,
    mask,
  )
  # (1 - rate) phi + rate phi' is a shorter step.
  shorter = jax.tree.map(lambda a: config.target_rate * a, steps['value'])
  target = jax.vmap(networks.value.step, (None, 0, None))(
    params['value'], value_gradients, shorter
  )
  # The losses stop these gradients, too; here it spares loops their zeros.
  value_fixed, target = jax.lax.stop_gradient((value, target))
  policy, policy_gradients, policy_terms = maml.inner_step(
    networks.policy,
    params['policy'],
    steps['policy'],
    of_policy,
    config.task_loop,
    value_fixed,
    rows,
    mask,
  )
  return Inner(
    policy=policy,
    value=value,
    target=target,
    gradients={'policy': policy_gradients, 'value': value_gradients},
    value_loss=value_losses,
    policy_loss=policy_terms,
  )


def step_sizes(params: dict[str, Params], config: Config) -> dict[str, Params]:
  """Inner step sizes of 'policy' and 'value'."""
  steps = {
    name: optim.step_sizes(params[f'{name}_steps'])
    for name in ('policy', 'value')
  }
  if limits.chosen(config, 'adapt', 'latent_only'):
    return {k: weight_transform.only_latent(v) for k, v in steps.items()}
  return steps
