"""MT+FT: one advantage-weighted policy for all tasks, then fine-tuned.

The baseline "offline multi-task with fine-tuning" of Mitchell, Rafailov, Peng,
Levine, Finn: "Offline Meta-Reinforcement Learning with Advantage Weighting",
ICML 2021, arXiv 2008.06043 (a baseline there). Policy and value see the one-hot
number of the training task beside the observation; there is no meta-learning.
At meta-test that number is 0 everywhere, and adaptation is some steps of Adam
on the whole context, the value's before the policy's each time.

Deviations: losses are means over the meta-batch (the release divides by the
number of training tasks, which Adam undoes), and both gradients of an update
are taken at the same parameters. Losses and networks are MACAW's.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from offmeta import limits, optim, parallel
from offmeta.algorithms import macaw_losses, maml
from offmeta.algorithms.macaw_config import Config as MacawConfig
from offmeta.algorithms.macaw_losses import Networks, PolicyLoss
from offmeta.losses import returns
from offmeta.types import (
  Algorithm,
  Array,
  BatchSpec,
  DataSpec,
  Loop,
  Params,
  Problem,
  Rows,
  Stage,
  Transition,
)

# Settings whose defaults are not the release's: (here, released, why).
DIFFERENCES = {}


@dataclasses.dataclass(frozen=True)
class Config:
  """Hyper-parameters (defaults: MACAW's)."""

  hidden: limits.Widths = (100, 100, 100)  # of policy and value
  # Of weight_transform.LAYERS.
  layer: Literal['wlinear', 'bias_linear', 'dense'] = 'bias_linear'
  latent_size: limits.Width = 100  # of 'wlinear' layers
  action_std: limits.Positive = 0.2  # of the policy, fixed
  discount: limits.Share = 0.99
  policy_lr: limits.Weight = 1e-4
  value_lr: limits.Weight = 1e-5
  temperature: limits.Positive = 1.0  # of standardised advantages
  max_weight: limits.PositiveOrInf = 20.0
  finetune_steps: limits.CountOrZero = 20  # of Adam at meta-test
  finetune_policy_lr: limits.Weight = 1e-3
  finetune_value_lr: limits.Weight = 1e-5
  stride: limits.Count = 7  # every so-manieth logged step is used
  num_updates: limits.Count = 1_000_000
  num_tasks: limits.Count = 5  # meta-batch
  query_size: limits.Count = 256


def _macaw(config: Config) -> MacawConfig:
  """What MACAW's parts read; no advantage head."""
  return MacawConfig(
    hidden=config.hidden,
    layer=config.layer,
    latent_size=config.latent_size,
    action_std=config.action_std,
    temperature=config.temperature,
    max_weight=config.max_weight,
    advantage_coef=0.0,
  )


def make_networks(problem: Problem, config: Config) -> Networks:
  """Policy and value of (observation, one-hot task)."""
  spec = problem.spec
  wide = spec._replace(
    observation_shape=(spec.observation_size + problem.num_tasks,)
  )
  return macaw_losses.make_networks(wide, _macaw(config))


def with_task(rows: Transition, task: Array) -> Transition:
  """Annotated rows whose observations end with the code of their task.

  Args:
    rows: leaves [..., B, ...].
    task: [..., M], of the training tasks.
  """
  code = jnp.broadcast_to(
    task[..., None, :], rows.reward.shape + task.shape[-1:]
  )
  join = lambda x: jnp.concatenate([x, code], axis=-1)
  return rows._replace(
    observation=join(rows.observation),
    extras={
      **rows.extras,
      'last_observation': join(rows.extras['last_observation']),
    },
  )


def value_loss(
  networks: Networks, params: Params, rows: Transition, mask: Array
) -> Array:
  """Squared error [...] of the value, from the plain return.

  Args:
    networks: see `make_networks`.
    params: of the value.
    rows: of `with_task`, leaves [..., B, ...].
    mask: [..., B].
  """
  return macaw_losses.value_loss(
    networks.value,
    networks.value.generate(params),
    rows,
    rows.extras['return_to_go'],
    mask,
  )


def policy_loss(
  networks: Networks,
  params: Params,
  value: Params,
  rows: Transition,
  mask: Array,
  config: Config,
) -> PolicyLoss:
  """Advantage-weighted regression [...]; no gradient into the value.

  Advantages bootstrap at the episode's end.

  Args:
    networks: see `make_networks`.
    params: of the policy.
    value: parameters of the value.
    rows, mask: as for `value_loss`.
    config: hyper-parameters.
  """
  return macaw_losses.policy_loss(
    networks,
    networks.policy.generate(params),
    networks.value.generate(value),
    rows,
    mask,
    _macaw(config),
    head=False,
  )


def finetuned(
  params: dict[str, Params],
  rows: Transition,
  mask: Array,
  networks: Networks,
  config: Config,
) -> Params:
  """The policy's parameters after `finetune_steps` on one fixed batch.

  Args:
    params: 'policy' and 'value'.
    rows: of `with_task`, leaves [N, ...].
    mask: [N].
    networks: see `make_networks`.
    config: hyper-parameters.
  """
  optimizers = {
    'value': optax.adam(config.finetune_value_lr),
    'policy': optax.adam(config.finetune_policy_lr),
  }
  loss = {
    'value': lambda p, others: value_loss(networks, p, rows, mask),
    'policy': lambda p, others: (
      policy_loss(networks, p, others['value'], rows, mask, config).awr
    ),
  }

  def step(carry, _):
    params, opt_state = carry
    for group in optimizers:  # the policy sees the new value
      gradient = jax.grad(loss[group])(params[group], params)
      params, opt_state = optim.step_groups(
        {group: optimizers[group]}, {group: gradient}, opt_state, params
      )
    return (params, opt_state), None

  start = {name: params[name] for name in optimizers}
  (params, _), _ = jax.lax.scan(
    step,
    (start, optim.init_groups(optimizers, start)),
    None,
    length=config.finetune_steps,
  )
  return params['policy']


def make(
  problem: Problem, config: Config, axis_name: str | None = None
) -> Algorithm:
  """MT+FT for one family.

  Args:
    problem: what it is for.
    config: hyper-parameters.
    axis_name: device axis when the meta-batch is sharded.

  Raises:
    ValueError: there is no such layer.
  """
  networks = make_networks(problem, config)
  optimizers = {
    'policy': optax.adam(config.policy_lr),
    'value': optax.adam(config.value_lr),
  }

  def init(key):
    params = {
      name: network.init(jax.random.fold_in(key, i))
      for i, (name, network) in enumerate(networks._asdict().items())
    }
    return optim.first_state(
      jax.random.fold_in(key, len(networks)), params, optimizers
    )

  def update(state, batch):
    rows = with_task(
      batch.query, jax.nn.one_hot(batch.task_id, problem.num_tasks)
    )
    mask = jnp.ones_like(rows.reward)

    def total(params):
      value = jnp.mean(value_loss(networks, params['value'], rows, mask))
      policy = policy_loss(
        networks, params['policy'], params['value'], rows, mask, config
      )
      logs = {'value/loss': value, 'policy/loss': jnp.mean(policy.awr)}
      return sum(logs.values()), (logs, jnp.max(policy.max_weight))

    gradients, (logs, largest) = jax.grad(total, has_aux=True)(state.params)
    gradients, logs = parallel.pmean((gradients, logs), axis_name)
    params, opt_state = optim.step_groups(
      optimizers, gradients, state.opt_state, state.params
    )
    logs['policy/max_weight'] = parallel.pmax(largest, axis_name)
    return state.replace(
      step=state.step + 1, params=params, opt_state=opt_state
    ), logs

  unknown = jnp.zeros(problem.num_tasks)

  def adapt(params, context, valid):
    if 'return_to_go' not in context.extras:
      context = context._replace(
        extras=returns.annotate(context, valid, config.discount)
      )
    rows = with_task(maml.only_valid(context, valid), unknown)
    return networks.policy.generate(
      finetuned(params, rows, valid, networks, config)
    )

  # At meta-test observations come without a task.
  acting = networks.policy._replace(
    apply_generated=lambda weights, x: networks.policy.apply_generated(
      weights, jnp.concatenate([x, unknown])
    )
  )
  batch = BatchSpec(
    num_tasks=config.num_tasks,
    query=Rows(config.query_size, replacement=False),
    replacement=False,
  )
  return Algorithm(
    init=init,
    loops=(
      Loop('offline', (Stage('multitask', config.num_updates, batch, update),)),
    ),
    data=DataSpec(returns_discount=config.discount, stride=config.stride),
    **maml.acting(acting, adapt, config.action_std),
  )
