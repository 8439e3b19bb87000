"""UNICORN: FOCAL whose latent must also predict what happens.

Li, Zhang, Zhang, Zhu, Yu, Zhao, Heng: "Towards an Information Theoretic
Framework of Context-Based Offline Meta-Reinforcement Learning", NeurIPS 2024,
arXiv 2402.02429. The latent is a mean of one random point
per transition, at meta-test too.

* UNICORN-SS (`supervision='reconstruction'`): two Gaussian models read s' - s
  and r of the context's transitions from (z, s, a); the metric loss comes in
  with `metric_weight` = beta.
* UNICORN-SUP ('classification'): z must tell the training task; no metric
  loss, no models.

Control is FOCAL's later code. What the release calls SAC (all families but
ant-dir) is `divergence_weight=0, entropy_in_target=True` with `entropy_weight`
= its alpha (0.2, cheetah-vel 0). Defaults are the release's for ant-dir, but
for `DIFFERENCES`, which are FOCAL's.
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp

from offmeta import limits
from offmeta.algorithms import focal
from offmeta.losses import metric, policy as policy_losses
from offmeta.networks import base, context
from offmeta.types import Algorithm, Network, Problem

# Settings whose defaults are not the release's: (here, released, why).
DIFFERENCES = focal.DIFFERENCES

_SPREAD_WEIGHT = 0.01  # on the distance of the models' log-variance bounds


@dataclasses.dataclass(frozen=True)
class Config(focal.Config):
  """Hyper-parameters (defaults: the release's for ant-dir)."""

  # SS, or SUP.
  supervision: Literal['reconstruction', 'classification'] = 'reconstruction'
  decoder_hidden: limits.Widths = (64, 64)  # of models, or of the classifier
  # How the models start; 'rlkit': as all else, as in PEARL.
  decoder_start: Literal['truncated_normal', 'rlkit'] = 'truncated_normal'
  metric_weight: limits.Weight = 0.15  # beta; SS only


def validate(config: Config):
  """Checks the values of switches.

  Raises:
    ValueError: names the switch and what it takes.
  """
  limits.check(config, 'unicorn')


def _decoders(problem: Problem, config: Config) -> dict[str, Network]:
  """What reads the latent."""
  if limits.chosen(config, 'supervision', 'classification'):
    heads = (base.Head(problem.num_tasks, 3e-3),)
    return {
      'classifier': base.mlp(
        (config.latent_size,), config.decoder_hidden, heads, config.hidden_bias
      )
    }
  spec = problem.spec
  sizes = (config.latent_size, spec.observation_size, spec.action_size)
  return {
    name: context.gaussian_model(
      sizes,
      size,
      config.decoder_hidden,
      config.hidden_bias,
      config.decoder_start,
    )
    for name, size in (('dynamics', spec.observation_size), ('reward', 1))
  }


def representation(problem: Problem, config: Config) -> focal.Representation:
  """Encoder and what reads its latent learn together."""
  encoder = focal.make_encoder(problem.spec, config, stochastic=True)
  decoders = _decoders(problem, config)

  def latents(params, batch, noise):
    points = encoder.apply(params['context']['encoder'], batch.context, noise)
    return context.masked_mean(points, batch.context_mask)

  def model_term(name, params, batch, z, target):
    """The released NLL: without its 1/2, and mean over outputs."""
    data = batch.context
    z = jnp.broadcast_to(z[:, None], data.reward.shape + z.shape[-1:])
    predicted, spread = decoders[name].apply(
      params['context'][name], z, data.observation, data.action
    )
    loss = 2.0 * jnp.mean(metric.gaussian_nll(target, *predicted), axis=-1)
    return _SPREAD_WEIGHT * spread + jnp.mean(
      policy_losses.masked_mean(loss, batch.context_mask)
    )

  def reconstruction_terms(params, batch, noise, axis_name):
    z, data = latents(params, batch, noise), batch.context
    change = data.next_observation - data.observation
    return {
      **focal.metric_terms(z, batch, config, axis_name),
      'decoder/dynamics': model_term('dynamics', params, batch, z, change),
      'decoder/reward': model_term(
        'reward', params, batch, z, data.reward[..., None]
      ),
    }

  def classification_terms(params, batch, noise, axis_name):
    del axis_name
    logits = decoders['classifier'].apply(
      params['context']['classifier'], latents(params, batch, noise)
    )
    return {
      'decoder/task': jnp.mean(metric.cross_entropy(logits, batch.task_id))
    }

  terms = {
    'reconstruction': reconstruction_terms,
    'classification': classification_terms,
  }[config.supervision]
  return focal.Representation(
    {'context': {'encoder': encoder, **decoders}}, (('context', terms),)
  )


def make(
  problem: Problem, config: Config, axis_name: str | None = None
) -> Algorithm:
  """UNICORN for one family; see `focal.build`.

  Raises:
    ValueError: a switch has an unknown value.
  """
  validate(config)
  return focal.build(
    problem.spec, config, representation(problem, config), axis_name
  )
