"""CSRO: FOCAL whose latent is kept from telling the behaviour policy.

Gao, Zhang, Guo, Wu, Yi, Peng, Lan, Chen, Du, Hu, Guo, Li, Chen: "Context
Shift Reduction for Offline Meta-Reinforcement Learning", NeurIPS 2023, arXiv
2311.03695. A model p(z | s, a) of single transitions is
trained beside the encoder; the encoder then also descends a CLUB bound on
I(z; (s, a)). All else is FOCAL's first release, whose switches are the
defaults here, but for `DIFFERENCES`.

The bound's pairs are those of one task, as released. Left out: the release
lets the model see the reward too where the context has next observations.
"""

import dataclasses

import jax
import jax.numpy as jnp

from offmeta import limits
from offmeta.algorithms import focal
from offmeta.losses import metric, policy as policy_losses
from offmeta.networks import context
from offmeta.types import Algorithm, Problem

# Settings whose defaults are not the release's: (here, released, why).
DIFFERENCES = {
  'gradient_penalty': focal.DIFFERENCES['gradient_penalty'],
}


@dataclasses.dataclass(frozen=True)
class Config(focal.Config):
  """Hyper-parameters (defaults: the release's for cheetah-vel)."""

  # Lambda_MI on the CLUB bound; 10 to 50 by family.
  mi_weight: limits.Weight = 10.0
  metric_weight: limits.Weight = 10.0
  max_log_std: limits.Number = 0.0
  model_weight: limits.Weight = 10.0  # on the likelihood of p(z | s, a)
  model_hidden: limits.Widths = (200, 200, 200)
  latent_size: limits.Width = 20
  encoder_hidden: limits.Widths = (200, 200, 200)
  use_next_observation: bool = False  # True for dynamics families
  use_terminal: bool = False
  critic_hidden: limits.Widths = (256, 256, 256)
  actor_hidden: limits.Widths = (256, 256, 256)
  value_hidden: limits.Widths = (256, 256, 256)
  divergence_hidden: limits.Widths = (256, 256, 256)
  reward_scale: limits.Positive = 5.0
  value_network: bool = True
  entropy_in_target: bool = True
  mean_weight: limits.Weight = 1e-3
  log_std_weight: limits.Weight = 1e-3
  divergence_weight: limits.Weight = 50.0
  learn_divergence_weight: bool = True
  value_penalty: bool = False
  num_updates: limits.Count = 105_000
  context_size: limits.Count = 100


def representation(problem: Problem, config: Config) -> focal.Representation:
  """First the model, then the encoder against the new model."""
  encoder = focal.make_encoder(problem.spec, config)
  model = context.bounded_gaussian(
    (problem.spec.observation_size, problem.spec.action_size),
    config.latent_size,
    config.model_hidden,
    config.hidden_bias,
  )

  def read(params, batch, noise):
    """A latent per transition [M, N, Z], and what (s, a) tells of it."""
    points = encoder.apply(params['context']['encoder'], batch.context, noise)
    predicted = model.apply(
      params['club']['model'], batch.context.observation, batch.context.action
    )
    return points, predicted

  def model_terms(params, batch, noise, axis_name):
    del axis_name
    points, predicted = read(params, batch, noise)
    loss = jnp.mean(
      metric.gaussian_nll(jax.lax.stop_gradient(points), *predicted), axis=-1
    )
    return {
      'club/model': config.model_weight
      * jnp.mean(policy_losses.masked_mean(loss, batch.context_mask))
    }

  def encoder_terms(params, batch, noise, axis_name):
    points, predicted = read(params, batch, noise)
    bound = metric.club_bound(points, *predicted, batch.context_mask)
    z = context.masked_mean(points, batch.context_mask)
    return {
      **focal.metric_terms(z, batch, config, axis_name),
      'encoder/club': config.mi_weight * jnp.mean(bound),
    }

  return focal.Representation(
    {'context': {'encoder': encoder}, 'club': {'model': model}},
    (('club', model_terms), ('context', encoder_terms)),
  )


def make(
  problem: Problem, config: Config, axis_name: str | None = None
) -> Algorithm:
  """CSRO for one family; see `focal.build`."""
  return focal.build(
    problem.spec, config, representation(problem, config), axis_name
  )
