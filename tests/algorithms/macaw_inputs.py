"""A tiny MACAW, its states and what its updates are fed."""

import dataclasses

import helpers
import jax
import jax.numpy as jnp

from offmeta.algorithms import macaw
from offmeta.losses import returns
from offmeta.testing import probes
from offmeta.types import Problem

SPEC = helpers.SPEC  # O 3, A 2
CONFIG = macaw.Config(
  hidden=(4, 3),
  head_hidden=3,
  latent_size=2,
  inner_policy_lr=0.02,
  inner_value_lr=0.05,
  advantage_coef=0.3,
  num_tasks=2,
  context_size=6,
  query_size=5,
  policy_lr=1e-3,
  value_lr=2e-3,
  step_size_lr=3e-3,
  target_rate=0.4,
  num_updates=4,
  finetune=macaw.FinetuneConfig(
    lr=1e-3, value_updates=2, policy_updates=3, batch_size=5
  ),
)
VARIANTS = {
  'release': {},
  'no head': dict(
    advantage_coef=0.0,
    bootstrap_terminal='none',
    layer='bias_linear',
    outer_norm='meta_batch',
    task_loop='vmap',
  ),
  'latents': dict(
    adapt='latent_only',
    mask_bootstrap_on_death=True,
    adv_std_eps=0.3,
    head_relu_on_action=False,
    temperature=0.4,
    max_weight=1.5,
  ),
  'dense': dict(
    layer='dense', disjoint_batches=True, train_inner_sampling='uniform'
  ),
}


def changed(**changes):
  """`CONFIG` with changes."""
  return dataclasses.replace(CONFIG, **changes)


def make_state(config):
  """A learner whose tensors have step sizes of their own."""
  state = jax.jit(macaw.make(Problem(SPEC, 7), config).init)(jax.random.key(0))
  params = dict(state.params)
  for i, name in enumerate(('policy', 'value')):
    params[name] = helpers.shaken(params[name], i, 0.2)
    params[f'{name}_steps'] = helpers.shaken(params[f'{name}_steps'], i, 0.5)
  return state.replace(params=params)


def make_batch(config):
  """Annotated rows; of the contexts two do not count, and are not finite."""
  algorithm = macaw.make(Problem(SPEC, 7), config)
  batch = jax.jit(
    lambda key: probes.random_batch(
      key, SPEC, algorithm.loop('offline').stages[0].batch, algorithm.data
    )
  )(jax.random.key(1))

  def fallen(rows):
    died = jnp.zeros(rows.reward.shape).at[:, ::3].set(1.0)
    return rows._replace(extras={**rows.extras, 'last_discount': 1.0 - died})

  if batch.context is None:  # both batches are parts of the query
    return batch._replace(query=fallen(batch.query))
  mask = jnp.ones(batch.context_mask.shape).at[0, 2:4].set(0.0)
  context = jax.tree.map(
    lambda x: jnp.where(
      mask.reshape(mask.shape + (1,) * (x.ndim - 2)) > 0, x, jnp.nan
    ),
    fallen(batch.context),
  )
  return batch._replace(
    context=context, context_mask=mask, query=fallen(batch.query)
  )


def make_context(annotated):
  """Two episodes of the real form, six rows, and two that do not count."""
  rows = probes.random_transitions(jax.random.key(3), SPEC, (8,))
  time = jnp.array([0.0, 1, 2, 0, 1, 2, 3, 4])
  rows = rows._replace(extras={'time': time})
  valid = jnp.array([1.0] * 6 + [0.0] * 2)
  if annotated:
    rows = rows._replace(extras=returns.annotate(rows, valid, CONFIG.discount))
  return rows, valid
