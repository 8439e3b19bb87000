"""MACAW: meta-actor-critic with advantage weighting.

Mitchell, Rafailov, Peng, Levine, Finn: "Offline Meta-Reinforcement Learning
with Advantage Weighting", ICML 2021, arXiv 2008.06043. Written against the
released code, whose settings are the defaults, all of them (`DIFFERENCES` is
empty). Per task, one step of gradient descent on the value
network, then one on the policy; the losses of what comes out are descended
through these steps, second order included.

Switches that leave it are in `macaw_config.py`. Other differences:

* One inner step only, which is what all published runs take.
* Advantages without any spread (one row, say) give weights of 1; the release
  divides by their standard deviation, which is 0.
* No clipping of gradients: the release's limit is 1e9.
* Targets are not put on a logarithmic scale, as the release does for ML45.
"""

import jax
import jax.numpy as jnp
import optax

from offmeta import limits, optim, parallel
from offmeta.algorithms import macaw_losses, maml
from offmeta.algorithms.macaw_config import (
  DIFFERENCES as DIFFERENCES,
  Config,
  FinetuneConfig as FinetuneConfig,
  validate,
)
from offmeta.algorithms.macaw_losses import Networks, make_networks
from offmeta.losses import returns
from offmeta.types import (
  Algorithm,
  Array,
  BatchSpec,
  DataSpec,
  Key,
  Loop,
  MetaBatch,
  Params,
  Problem,
  Rows,
  Slice,
  Stage,
  Transition,
)


def losses(
  params: dict[str, Params],
  batch: MetaBatch,
  networks: Networks,
  config: Config,
  num_tasks: int,
  axis_name: str | None,
) -> tuple[dict[str, Array], dict[str, Array]]:
  """Both losses after adaptation, and what to log.

  Gradient routing: 'value' reaches the groups 'value' and 'value_steps',
  'policy' reaches 'policy', 'policy_steps' and 'coefficient'.

  Args:
    params: groups of `init_params`.
    batch: annotated, leaves [M, N, ...] and [M, B, ...].
    networks: see `make_networks`.
    config: hyper-parameters.
    num_tasks: training tasks in all.
    axis_name: device axis over which tasks are sharded.

  Returns:
    Scalar terms {'value', 'policy'} whose sum is minimised, and scalars to
    log.
  """
  context, context_mask, query = _parts(batch, config)
  inner = macaw_losses.inner_loop(
    params, context, context_mask, networks, config
  )

  def outer(value, target, policy, rows):
    mask = jnp.ones_like(rows.reward)
    returns_ = macaw_losses.bootstrapped_return(
      networks.value, target, rows, config
    )
    loss = macaw_losses.value_loss(networks.value, value, rows, returns_, mask)
    terms = macaw_losses.policy_loss(
      networks, policy, value, rows, mask, config, head=False
    )
    return loss, terms

  value, policy = maml.over_tasks(config.task_loop)(outer)(
    inner.value, inner.target, inner.policy, query
  )
  scale = 1.0
  # A sum over the meta-batch, divided.
  if limits.chosen(config, 'outer_norm', 'n_train'):
    number = value.shape[0] * parallel.axis_size(axis_name)
    scale = number / num_tasks
  terms = {
    'value': scale * jnp.mean(value),
    'policy': scale * jnp.mean(policy.awr),
  }
  logs = {
    'value/inner_loss': jnp.mean(inner.value_loss),
    'value/outer_loss': jnp.mean(value),
    'policy/inner_loss': jnp.mean(inner.policy_loss.awr),
    'policy/advantage_loss': jnp.mean(inner.policy_loss.advantage),
    'policy/outer_loss': jnp.mean(policy.awr),
    'policy/max_weight': parallel.pmax(jnp.max(policy.max_weight), axis_name),
    'policy/step_size': _mean_step(params['policy_steps']),
    'value/step_size': _mean_step(params['value_steps']),
  }
  return terms, logs


def _mean_step(rho: Params) -> Array:
  """Mean over tensors of the learned step sizes."""
  return jnp.mean(jnp.stack(jax.tree.leaves(optim.step_sizes(rho))))


def _parts(
  batch: MetaBatch, config: Config
) -> tuple[Transition, Array, Transition]:
  """Context, its mask and query."""
  if not config.disjoint_batches:
    return batch.context, batch.context_mask, batch.query
  size = config.context_size
  first = jax.tree.map(lambda x: x[:, :size], batch.query)
  rest = jax.tree.map(lambda x: x[:, size:], batch.query)
  return first, jnp.ones_like(first.reward), rest


def init_params(
  key: Key, networks: Networks, config: Config
) -> dict[str, Params]:
  """Both networks, their step sizes and the coefficient of the head."""
  params = {
    name: network.init(jax.random.fold_in(key, i))
    for i, (name, network) in enumerate(networks._asdict().items())
  }
  params['policy_steps'] = optim.init_step_sizes(
    params['policy'], config.inner_policy_lr
  )
  params['value_steps'] = optim.init_step_sizes(
    params['value'], config.inner_value_lr
  )
  if config.advantage_coef:
    params['coefficient'] = jnp.log(jnp.float32(config.advantage_coef))
  return params


def _batch_spec(config: Config) -> BatchSpec:
  """What a meta-update is fed."""
  context, query = config.context_size, config.query_size
  if config.disjoint_batches:  # one draw without replacement serves both
    drawn = None
    query += context
  elif limits.chosen(config, 'train_inner_sampling', 'uniform'):
    drawn = Rows(context, replacement=False)
  else:
    drawn = Slice(context)
  return BatchSpec(
    num_tasks=config.num_tasks,
    query=Rows(query, replacement=False),
    context=drawn,
    replacement=False,
  )


def adapt(
  params: dict[str, Params],
  context: Transition,
  valid: Array,
  networks: Networks,
  config: Config,
) -> macaw_losses.Inner:
  """Both inner steps on one task's context [N, ...], valid [N].

  A context without returns is a log in the order of its steps.
  """
  if 'return_to_go' not in context.extras:
    context = context._replace(
      extras=returns.annotate(context, valid, config.discount)
    )
  one = jax.tree.map(lambda x: x[None], (context, valid))
  inner = macaw_losses.inner_loop(params, *one, networks, config)
  return jax.tree.map(lambda x: x[0], inner)


def _adapted_params(
  params: dict[str, Params],
  context: Transition,
  valid: Array,
  networks: Networks,
  config: Config,
) -> dict[str, Params]:
  """The groups after the same steps, whose weights are those of `adapt`."""
  inner = adapt(params, context, valid, networks, config)
  steps = macaw_losses.step_sizes(params, config)
  params = dict(params)
  for name, network in networks._asdict().items():
    _, pull_back = jax.vjp(network.generate, params[name])
    (gradients,) = pull_back(inner.gradients[name])
    params[name] = optim.inner_sgd(params[name], gradients, steps[name])
  return params


def _finetune_stages(
  networks: Networks,
  optimizers: dict,
  config: Config,
  axis_name: str | None,
) -> tuple[Stage, Stage]:
  """Plain steps on one task's own data, as MACAW's release fine-tunes.

  The value's target is the plain return; the policy's advantages bootstrap
  with the current value, and the head is left alone.
  """

  def of_value(params, rows, mask):
    return macaw_losses.value_loss(
      networks.value,
      networks.value.generate(params['value']),
      rows,
      rows.extras['return_to_go'],
      mask,
    )

  def of_policy(params, rows, mask):
    value = networks.value.generate(params['value'])
    return macaw_losses.policy_loss(
      networks,
      networks.policy.generate(params['policy']),
      value,
      rows,
      mask,
      config,
      head=False,
    ).awr

  def stage(group, loss, num_steps):
    others = tuple(name for name in optimizers if name != group)

    def update(state, batch):
      mask = jnp.ones_like(batch.query.reward)

      def mean_loss(trained):
        params = {**state.params, group: trained}
        return jnp.mean(loss(params, batch.query, mask))

      value, gradient = parallel.pmean(
        jax.value_and_grad(mean_loss)(state.params[group]), axis_name
      )
      params, opt_state = optim.step_groups(
        optimizers, {group: gradient}, state.opt_state, state.params, others
      )
      return state.replace(
        step=state.step + 1, params=params, opt_state=opt_state
      ), {f'{group}/loss': value}

    return Stage(
      f'finetune_{group}',
      num_steps,
      BatchSpec(
        num_tasks=1,
        query=Rows(config.finetune.batch_size, replacement=False),
        replacement=False,
      ),
      update,
    )

  finetune = config.finetune
  return (
    stage('value', of_value, finetune.value_updates),
    stage('policy', of_policy, finetune.policy_updates),
  )


def make(
  problem: Problem, config: Config, axis_name: str | None = None
) -> Algorithm:
  """MACAW for one family.

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
    'policy': optax.adam(config.policy_lr),
    'value': optax.adam(config.value_lr),
    'policy_steps': optax.adam(config.step_size_lr),
    'value_steps': optax.adam(config.step_size_lr),
  }
  if config.advantage_coef:
    optimizers['coefficient'] = optax.adam(config.step_size_lr)
  finetune_optimizers = {
    name: optax.adam(config.finetune.lr) for name in ('value', 'policy')
  }

  def init(key):
    params = init_params(key, networks, config)
    return optim.first_state(
      jax.random.fold_in(key, len(networks)), params, optimizers
    )

  def update(state, batch):
    def total(params):
      terms, logs = losses(
        params, batch, networks, config, problem.num_tasks, axis_name
      )
      return sum(terms.values()), logs

    gradients, logs = parallel.pmean(
      jax.grad(total, has_aux=True)(state.params), axis_name
    )
    params, opt_state = optim.step_groups(
      optimizers, gradients, state.opt_state, state.params
    )
    return state.replace(
      step=state.step + 1, params=params, opt_state=opt_state
    ), logs

  def begin_finetune(state, context, valid):
    params = _adapted_params(state.params, context, valid, networks, config)
    return state.replace(
      step=jnp.zeros_like(state.step),
      params=params,
      opt_state=optim.init_groups(finetune_optimizers, params),
    )

  return Algorithm(
    init=init,
    loops=(
      Loop(
        'offline',
        (Stage('meta', config.num_updates, _batch_spec(config), update),),
      ),
      Loop(
        'finetune',
        _finetune_stages(networks, finetune_optimizers, config, axis_name),
        iterations=None,
        begin=begin_finetune,
      ),
    ),
    data=DataSpec(
      returns_discount=config.discount,
      stride=config.stride,
      context_part=config.context_part,
      context_rows=config.context_rows,
    ),
    **maml.acting(
      networks.policy,
      lambda *given: adapt(*given, networks, config).policy,
      config.action_std,
    ),
  )
