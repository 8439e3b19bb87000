"""A tiny MACAW, its states and what its updates are fed."""

import dataclasses
import functools

import helpers
import jax
import numpy as np

from offmeta.algorithms import macaw
from offmeta.losses import returns
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
  batch = helpers.random_batch(
    1, SPEC, algorithm.loop('offline').stages[0].batch, algorithm.data
  )

  def fallen(rows):
    lives = np.ones(rows.reward.shape, np.float32)
    lives[:, ::3] = 0.0
    return rows._replace(extras={**rows.extras, 'last_discount': lives})

  if batch.context is None:  # both batches are parts of the query
    return batch._replace(query=fallen(batch.query))
  mask = np.ones(batch.context_mask.shape, np.float32)
  mask[0, 2:4] = 0.0
  context = jax.tree.map(np.array, fallen(batch.context))
  for leaf in jax.tree.leaves(context):
    leaf[mask == 0] = np.nan
  return batch._replace(
    context=context, context_mask=mask, query=fallen(batch.query)
  )


@functools.cache
def make_context(annotated):
  """Two episodes of the real form, six rows, and two that do not count."""
  rows = helpers.random_transitions(3, SPEC, (8,))
  time = np.float32([0, 1, 2, 0, 1, 2, 3, 4])
  rows = rows._replace(extras={'time': time})
  valid = np.float32([1] * 6 + [0] * 2)
  if annotated:
    extras = jax.jit(returns.annotate, static_argnums=2)(
      rows, valid, CONFIG.discount
    )
    rows = rows._replace(extras=jax.device_get(extras))
  return rows, valid
