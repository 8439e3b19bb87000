"""FOCAL: offline meta-RL with a latent learned from distances between tasks.

Li, Yang, Luo: "FOCAL: Efficient Fully-Offline Meta-Reinforcement Learning via
Distance Metric Learning and Behavior Regularization", ICLR 2021, arXiv
2010.01112. A deterministic encoder is trained by a metric loss alone; control
(`brac`) sees its latent as a constant. CSRO and UNICORN are other
`Representation`s on the same parts.

Defaults are the authors' later code, but for `DIFFERENCES`. `FIRST_RELEASE` are
the switches that lead to their first release, for cheetah-vel. By family it has
other `divergence_weight`, `max_divergence_weight` and `value_penalty`
(`divergence_weight=0` and not learned: no divergence at all),
`use_next_observation` for dynamics families; its widths are (256, 256, 256),
the encoder's (200, 200, 200).

Left out: the later encoder has no tanh; the first release draws tasks without
replacement, so it never has a pair of one task; each step of the dual critic
has a new batch there and only new actions here; they estimate the divergence
before these steps, we after; terminals are true ones, not ends of episodes.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from offmeta import limits, optim, parallel
from offmeta.algorithms import brac, latent
from offmeta.algorithms.brac import Learner, Terms
from offmeta.losses import metric
from offmeta.networks import context
from offmeta.networks.distributions import task_noise
from offmeta.types import (
  Algorithm,
  Array,
  BatchSpec,
  DataSpec,
  EnvSpec,
  Key,
  LearnerState,
  Loop,
  MetaBatch,
  Network,
  Problem,
  Rows,
  Sequences,
  Stage,
)

# Settings whose defaults are not the release's: (here, released, why).
# Released: the later code.
DIFFERENCES = {
  'gradient_penalty': (
    'action',
    'value',
    'the slope of the dual critic in the action is'
    ' bounded; both releases bound its value',
  ),
  'policy_penalty': (
    True,
    False,
    'as in the first release; the later code computes this'
    ' divergence without a gradient, so that it does nothing',
  ),
  'context': (
    'transitions',
    'sequences',
    'as in the first release; any log will do',
  ),
}
# All settings but sizes that the first release has otherwise than the defaults
# (but for `gradient_penalty`, see above).
FIRST_RELEASE = {
  'latent_size': 20,
  'use_next_observation': False,
  'use_terminal': False,
  'metric_weight': 10.0,
  'value_network': True,
  'entropy_in_target': True,
  'reward_scale': 5.0,
  'mean_weight': 1e-3,
  'log_std_weight': 1e-3,
  'max_log_std': 0.0,
  'divergence_weight': 50.0,
  'learn_divergence_weight': True,
  'value_penalty': False,
}


@dataclasses.dataclass(frozen=True)
class Config(brac.Config):
  """Hyper-parameters (defaults: the later code's), with those of control."""

  latent_size: limits.Width = 5  # dimensions of z
  encoder_hidden: limits.Widths = (64, 64)
  use_next_observation: bool = True  # in the context
  use_terminal: bool = True  # in the context
  # On the distance metric loss; 10 in the first release and CSRO's.
  metric_weight: limits.Weight = 1.0
  context_lr: limits.Weight = 3e-4  # encoder, and other networks of its losses
  num_updates: limits.Count = 200_000  # gradient steps in all
  num_tasks: limits.Count = 16  # meta-batch
  query_size: limits.Count = 256  # query transitions per task
  # 'transitions': uniform; 'sequences': one whole trajectory.
  context: Literal['transitions', 'sequences'] = 'transitions'
  context_size: limits.Count = 200  # transitions per task; not for 'sequences'


class Representation(NamedTuple):
  """How the latent of a task is learned; RL has no part in it.

  Attributes:
    networks: group of parameters -> name -> network. 'context' holds
      'encoder': (transitions [..., N], noise [..., N, Z]) -> [..., N, Z].
    steps: gradient steps of an update, in this order: (group that learns,
      (params, batch, noise [M, N, Z], axis_name) -> Terms).
  """

  networks: Mapping[str, Mapping[str, Network]]
  steps: tuple[tuple[str, Callable[..., Terms]], ...]


def validate(config: Config):
  """Checks the values of switches.

  Raises:
    ValueError: names the switch and what it takes.
  """
  limits.check(config, 'focal')


def make_encoder(
  spec: EnvSpec, config: Config, stochastic: bool = False
) -> Network:
  """The encoder of single transitions (stochastic: UNICORN's)."""
  return context.transition_encoder(
    spec.observation_size,
    spec.action_size,
    config.latent_size,
    config.encoder_hidden,
    config.use_next_observation,
    config.use_terminal,
    stochastic,
    config.hidden_bias,
  )


def metric_terms(
  z: Array, batch: MetaBatch, config: Config, axis_name: str | None
) -> Terms:
  """The distance metric loss of latents [M, Z]."""
  same, other = metric.distance_metric(z, batch.task_id, axis_name)
  return {
    'encoder/same_task': config.metric_weight * same,
    'encoder/other_tasks': config.metric_weight * other,
  }


def representation(problem: Problem, config: Config) -> Representation:
  """FOCAL's: the metric loss and nothing else."""
  encoder = make_encoder(problem.spec, config)

  def encoder_terms(params, batch, noise, axis_name):
    points = encoder.apply(params['context']['encoder'], batch.context, noise)
    z = context.masked_mean(points, batch.context_mask)
    return metric_terms(z, batch, config, axis_name)

  return Representation(
    {'context': {'encoder': encoder}}, (('context', encoder_terms),)
  )


def init_state(
  key: Key, groups: Mapping[str, Any], optimizers: Mapping, config: Config
) -> LearnerState:
  """An untrained learner; the target is a copy.

  Args:
    key: root key.
    groups: name -> network, or a mapping of networks.
    optimizers: name -> optimiser.
    config: hyper-parameters.
  """
  networks, structure = jax.tree.flatten(
    groups, is_leaf=lambda x: isinstance(x, Network)
  )
  params = jax.tree.unflatten(
    structure,
    [
      network.init(jax.random.fold_in(key, i))
      for i, network in enumerate(networks)
    ],
  )
  target = params['value' if config.value_network else 'critic']
  return optim.first_state(
    jax.random.fold_in(key, len(networks)),
    params,
    optimizers,
    target,
    extras={'divergence_weight': jnp.float32(config.divergence_weight)},
  )


def draw_noise(
  state: LearnerState, batch: MetaBatch, config: Config
) -> dict[str, Array]:
  """The random numbers of one update, one key per task slot."""
  keys = [
    latent.slot_keys(state.key, state.step, batch.slot, i) for i in range(5)
  ]
  shape, steps = batch.query.action.shape[1:], config.divergence_steps
  mix = jax.vmap(lambda key: jax.random.uniform(key, (steps,) + shape[:1]))
  return {
    'points': task_noise(
      keys[0], batch.context_mask.shape[1:] + (config.latent_size,)
    ),
    'own': task_noise(keys[1], shape),
    'next': task_noise(keys[2], shape),
    'dual': task_noise(keys[3], (steps,) + shape),
    'mix': mix(keys[4]),
  }


def descend(
  learner: Learner,
  optimizers: Mapping,
  groups: tuple[str, ...],
  loss: Callable[..., tuple[Terms, dict[str, Array]]],
  axis_name: str | None,
) -> tuple[Learner, dict[str, Array]]:
  """One step of some groups down the sum of a loss's terms.

  Args:
    learner: params and opt_state of all groups.
    optimizers: of all groups.
    groups: those that learn.
    loss: (params of all groups) -> Terms and scalars to log.
    axis_name: device axis over which tasks are sharded.

  Returns:
    The learner after the step; terms and scalars, means over devices.
  """
  params, opt_state = learner

  def total(part):
    terms, logs = loss({**params, **part})
    return sum(terms.values()), {**terms, **logs}

  gradients, logs = parallel.pmean(
    jax.grad(total, has_aux=True)({name: params[name] for name in groups}),
    axis_name,
  )
  chosen = {name: optimizers[name] for name in groups}
  return optim.step_groups(chosen, gradients, opt_state, params), logs


def build(
  spec: EnvSpec,
  config: Config,
  learned: Representation,
  axis_name: str | None,
) -> Algorithm:
  """Control on a learned representation.

  Args:
    spec: sizes of the family.
    config: hyper-parameters.
    learned: the representation.
    axis_name: device axis when the meta-batch is sharded.

  Raises:
    ValueError: a switch has an unknown value.
  """
  validate(config)
  networks = brac.make_networks(spec, config.latent_size, config)
  used = {k: v for k, v in networks._asdict().items() if v is not None}
  groups = {**learned.networks, **used}
  optimizers = {
    **{name: optax.adam(config.context_lr) for name in learned.networks},
    **brac.make_optimizers(networks, config),
  }
  encoder = learned.networks['context']['encoder']

  def encode(params, transitions, mask, noise):
    return context.masked_mean(encoder.apply(params, transitions, noise), mask)

  def encode_with_key(params, transitions, valid, key):
    noise = jax.random.normal(key, valid.shape + (config.latent_size,))
    return encode(params, transitions, valid, noise)

  def update(state, batch):
    noise = draw_noise(state, batch, config)
    step = lambda learner, groups, loss: descend(
      learner, optimizers, groups, loss, axis_name
    )
    # Of the encoder before its step; what control learns, it learns of this.
    z = jax.lax.stop_gradient(
      encode(
        state.params['context']['encoder'],
        batch.context,
        batch.context_mask,
        noise['points'],
      )
    )
    z = jnp.broadcast_to(
      z[:, None], batch.query.reward.shape + (config.latent_size,)
    )
    learner, logs = (state.params, state.opt_state), {}
    for group, terms in learned.steps:
      learner, new = step(
        learner,
        (group,),
        lambda params: (terms(params, batch, noise['points'], axis_name), {}),
      )
      logs |= new
    state, new = brac.update(
      state, learner, batch.query, z, noise, networks, config, step
    )
    return state, logs | new

  whole = limits.chosen(config, 'context', 'sequences')
  batch = BatchSpec(
    num_tasks=config.num_tasks,
    query=Rows(config.query_size),
    context=Sequences(1, spec.episode_length)
    if whole
    else Rows(config.context_size),
  )
  return Algorithm(
    init=lambda key: init_state(key, groups, optimizers, config),
    loops=(
      Loop('offline', (Stage('offline', config.num_updates, batch, update),)),
    ),
    data=DataSpec(sequence_episodes=int(whole)),
    **latent.point_acting(encode_with_key, networks.actor, config.latent_size),
  )


def make(
  problem: Problem, config: Config, axis_name: str | None = None
) -> Algorithm:
  """FOCAL for one family; see `build`."""
  return build(problem.spec, config, representation(problem, config), axis_name)
