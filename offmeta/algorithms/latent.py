"""Acting with a belief over a task latent.

A Gaussian that is sampled from (PEARL, SMAC), or a point (FOCAL, CSRO,
UNICORN).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from offmeta.networks.distributions import (
  Gaussian,
  TanhNormal,
  standard_normal,
)
from offmeta.types import (
  Array,
  Key,
  LearnerState,
  Network,
  Policy,
  Transition,
)


class LatentBelief(NamedTuple):
  """Belief over one task.

  Attributes:
    posterior: Gaussian [Z].
    latent: [Z], the sample that conditions the policy now.
    steps: [] int32, environment steps since the belief was formed.
  """

  posterior: Gaussian
  latent: Array
  steps: Array


def slot_keys(key: Key, step: Array, slots: Array, stream: int) -> Key:
  """One key [M] per task slot for a named stream of one update."""
  key = jax.random.fold_in(jax.random.fold_in(key, step), stream)
  return jax.vmap(lambda slot: jax.random.fold_in(key, slot))(slots)


def choose(distribution: TanhNormal, deterministic: bool, key: Key) -> Array:
  """The action [A]: tanh(mean) or a sample."""
  if deterministic:
    return distribution.mode()
  return distribution.sample(jax.random.normal(key, distribution.mean.shape))[0]


def latent_policy(
  encode: Callable[..., Gaussian],
  action_distribution: Callable,
  latent_size: int,
  deterministic: bool,
  resample_period: int,
) -> Policy:
  """A policy conditioned on samples of a posterior.

  Args:
    encode: (params, context [N], valid [N]) -> Gaussian [Z]; the prior when
      nothing is valid.
    action_distribution: (params, observation [O], latent [Z]) -> TanhNormal.
    latent_size: Z.
    deterministic: act with tanh(mean) instead of a sample.
    resample_period: draw a new latent from the belief every so many steps;
      0 keeps one latent for the whole episode. SMAC uses 1 everywhere, also
      at meta-test (SMAC's release); PEARL uses 0.

  Returns:
    A Policy whose params are what `encode` and `action_distribution` take.
  """

  def believe(posterior, key):
    noise = jax.random.normal(key, (latent_size,))
    steps = jnp.zeros((), jnp.int32)
    return LatentBelief(posterior, posterior.sample(noise), steps)

  def init(params, key):
    del params
    return believe(standard_normal((latent_size,)), key)

  def act(params, belief, observation, key):
    distribution = action_distribution(params, observation, belief.latent)
    return choose(distribution, deterministic, key), belief, {}

  def observe(params, belief, transition, key):
    del params, transition
    belief = belief._replace(steps=belief.steps + 1)
    if not resample_period:
      return belief
    fresh = belief.posterior.sample(jax.random.normal(key, (latent_size,)))
    due = belief.steps % resample_period == 0
    return belief._replace(latent=jnp.where(due, fresh, belief.latent))

  def adapt(params, belief, context: Transition, valid: Array, key):
    del belief
    return believe(encode(params, context, valid), key)

  return Policy(init=init, act=act, observe=observe, adapt=adapt)


def context_acting(
  encoder: Network, actor: Network, latent_size: int, resample_period: int
) -> dict[str, Any]:
  """The acting half of an `Algorithm` with an encoder and an actor.

  Args:
    encoder: (context, mask) -> Gaussian [Z].
    actor: (observation, latent) -> TanhNormal.
    latent_size: Z.
    resample_period: see `latent_policy`; an offline context always keeps
      one latent per episode.

  Returns:
    Keyword arguments of `Algorithm`: explore, evaluate,
    evaluate_given_context, actor_params, posterior.
  """

  def encode(params, context, valid):
    return encoder.apply(params['encoder'], context, valid)

  def distribution(params, observation, z):
    return actor.apply(params['actor'], observation, z)

  def posterior(params, context, valid):
    belief = encode(params, context, valid)
    return belief.mean, jnp.sqrt(belief.variance)

  def policy(deterministic, period):
    return latent_policy(
      encode, distribution, latent_size, deterministic, period
    )

  return dict(
    explore=policy(False, resample_period),
    evaluate=policy(True, resample_period),
    evaluate_given_context=policy(True, 0),
    actor_params=_actor_params,
    posterior=posterior,
  )


def point_acting(
  encode: Callable[..., Array], actor: Network, latent_size: int
) -> dict[str, Any]:
  """The acting half of an `Algorithm` whose belief is one latent, no more.

  It is 0 before anything is known, and stays for a whole episode.

  Args:
    encode: (encoder params, context [N], valid [N], key) -> [Z], which is 0
      when nothing is valid.
    actor: (observation, latent) -> TanhNormal.
    latent_size: Z.

  Returns:
    Keyword arguments of `Algorithm`: explore, evaluate,
    evaluate_given_context, actor_params.
  """

  def init(params, key):
    del params, key
    return jnp.zeros((latent_size,))

  def observe(params, latent, transition, key):
    del params, transition, key
    return latent

  def adapt(params, latent, context: Transition, valid: Array, key):
    del latent
    return encode(params['encoder'], context, valid, key)

  def policy(deterministic):

    def act(params, latent, observation, key):
      distribution = actor.apply(params['actor'], observation, latent)
      return choose(distribution, deterministic, key), latent, {}

    return Policy(init=init, act=act, observe=observe, adapt=adapt)

  return dict(
    explore=policy(False),
    evaluate=policy(True),
    evaluate_given_context=policy(True),
    actor_params=_actor_params,
  )


def _actor_params(state: LearnerState) -> dict[str, Any]:
  """What acting needs of a learner."""
  return {
    'encoder': state.params['context']['encoder'],
    'actor': state.params['actor'],
  }
