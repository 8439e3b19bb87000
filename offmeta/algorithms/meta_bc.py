"""Meta-BC: behaviour cloning that one gradient step fits to a task.

The baseline of Mitchell, Rafailov, Peng, Levine, Finn: "Offline Meta-
Reinforcement Learning with Advantage Weighting", ICML 2021, arXiv 2008.06043.
MACAW with -log N(a; mu(s), 0.2^2) as inner and as outer loss: the same policy
network and learned step sizes, no value function. It is as good as its context:
it adapts to what was done there, not to what was rewarded.

Deviations: the advantage head, which nothing would train, is left out; the
outer loss is a mean over the meta-batch (the release divides by the number of
training tasks, which Adam undoes).
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from offmeta import limits, optim, parallel
from offmeta.algorithms import maml
from offmeta.losses import policy as policy_losses
from offmeta.networks import weight_transform
from offmeta.networks.distributions import Normal
from offmeta.networks.weight_transform import AdaptableNetwork, Weights
from offmeta.types import (
  Algorithm,
  Array,
  BatchSpec,
  DataSpec,
  EnvSpec,
  Loop,
  MetaBatch,
  Params,
  Problem,
  Rows,
  Slice,
  Stage,
  Transition,
)

# Settings whose defaults are not the release's: (here, released, why).
DIFFERENCES = {}


@dataclasses.dataclass(frozen=True)
class Config:
  """Hyper-parameters: MACAW's."""

  hidden: limits.Widths = (100, 100, 100)
  # Of weight_transform.LAYERS.
  layer: Literal['wlinear', 'bias_linear', 'dense'] = 'wlinear'
  latent_size: limits.Width = 100  # of the weight-transform layers
  action_std: limits.Positive = 0.2  # of the policy, fixed
  policy_lr: limits.Weight = 1e-4
  step_size_lr: limits.Weight = 1e-3
  inner_policy_lr: limits.Weight = 1e-3  # at the start
  # 'uniform': as at meta-test.
  train_inner_sampling: Literal['contiguous', 'uniform'] = 'contiguous'
  stride: limits.Count = 7  # every so-manieth logged step is used
  num_updates: limits.Count = 1_000_000
  num_tasks: limits.Count = 5  # meta-batch
  context_size: limits.Count = 256  # of the inner batch
  query_size: limits.Count = 256  # of the outer batch
  # 'scan': one task after the other.
  task_loop: Literal['scan', 'vmap'] = 'scan'


def validate(config: Config):
  """Checks the values of switches.

  Raises:
    ValueError: names the switch and what it takes.
  """
  limits.check(config, 'meta_bc')


def make_network(spec: EnvSpec, config: Config) -> AdaptableNetwork:
  """s -> mean action."""
  return weight_transform.policy_network(
    spec.observation_size,
    spec.action_size,
    config.hidden,
    layer=config.layer,
    latent_size=config.latent_size,
  )


def cloning_loss(
  network: AdaptableNetwork,
  weights: Weights,
  rows: Transition,
  mask: Array,
  action_std: float,
) -> Array:
  """Mean of -log N(a; mu(s), std^2) over the rows that count, [].

  Args:
    network: see `make_network`.
    weights: of the network.
    rows: of one task, leaves [B, ...].
    mask: [B].
    action_std: of every action.
  """
  mean = network.apply_generated(weights, rows.observation)
  log_prob = Normal(mean, action_std).log_prob(rows.action)
  return policy_losses.masked_mean(-log_prob, mask)


def inner_loop(
  params: dict[str, Params],
  context: Transition,
  mask: Array,
  network: AdaptableNetwork,
  config: Config,
) -> tuple[Weights, Array]:
  """One step per task on its context, leaves [M, N, ...].

  Returns:
    Adapted weights, leaves [M, ...], and the losses [M] before the step.
  """

  def loss(weights, rows, mask):
    value = cloning_loss(network, weights, rows, mask, config.action_std)
    return value, value

  weights, _, losses_ = maml.inner_step(
    network,
    params['policy'],
    optim.step_sizes(params['policy_steps']),
    loss,
    config.task_loop,
    maml.only_valid(context, mask),
    mask,
  )
  return weights, losses_


def losses(
  params: dict[str, Params],
  batch: MetaBatch,
  network: AdaptableNetwork,
  config: Config,
) -> tuple[Array, dict[str, Array]]:
  """The loss after adaptation, and what to log.

  It reaches both groups, 'policy' and 'policy_steps', second order included.

  Args:
    params: policy and step sizes.
    batch: leaves [M, N, ...] and [M, B, ...].
    network: see `make_network`.
    config: hyper-parameters.
  """
  weights, inner = inner_loop(
    params, batch.context, batch.context_mask, network, config
  )
  outer = maml.over_tasks(config.task_loop)(
    lambda weights, rows: cloning_loss(
      network, weights, rows, jnp.ones_like(rows.reward), config.action_std
    )
  )(weights, batch.query)
  total = jnp.mean(outer)
  return total, {
    'policy/inner_loss': jnp.mean(inner),
    'policy/outer_loss': total,
  }


def make(
  problem: Problem, config: Config, axis_name: str | None = None
) -> Algorithm:
  """Meta-BC for one family.

  Args:
    problem: what it is for.
    config: hyper-parameters.
    axis_name: device axis when the meta-batch is sharded.

  Raises:
    ValueError: a switch has an unknown value.
  """
  validate(config)
  network = make_network(problem.spec, config)
  optimizers = {
    'policy': optax.adam(config.policy_lr),
    'policy_steps': optax.adam(config.step_size_lr),
  }

  def init(key):
    policy = network.init(jax.random.fold_in(key, 0))
    params = {
      'policy': policy,
      'policy_steps': optim.init_step_sizes(policy, config.inner_policy_lr),
    }
    return optim.first_state(jax.random.fold_in(key, 1), params, optimizers)

  def update(state, batch):
    gradients, logs = parallel.pmean(
      jax.grad(losses, has_aux=True)(state.params, batch, network, config),
      axis_name,
    )
    params, opt_state = optim.step_groups(
      optimizers, gradients, state.opt_state, state.params
    )
    return state.replace(
      step=state.step + 1, params=params, opt_state=opt_state
    ), logs

  def adapt(params, context, valid):
    one = jax.tree.map(lambda x: x[None], (context, valid))
    weights, _ = inner_loop(params, *one, network, config)
    return jax.tree.map(lambda x: x[0], weights)

  uniform = limits.chosen(config, 'train_inner_sampling', 'uniform')
  batch = BatchSpec(
    num_tasks=config.num_tasks,
    query=Rows(config.query_size, replacement=False),
    context=Rows(config.context_size, replacement=False)
    if uniform
    else Slice(config.context_size),
    replacement=False,
  )
  return Algorithm(
    init=init,
    loops=(
      Loop('offline', (Stage('meta', config.num_updates, batch, update),)),
    ),
    data=DataSpec(stride=config.stride, shared=True),
    **maml.acting(network, adapt, config.action_std),
  )
