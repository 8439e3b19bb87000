"""A recurrent belief over one task: along logs, and while acting (BOReL).

Steps are `Transition`s in the order in
which they took place, over several episodes; their extras hold 'time', the
step within the episode.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from offmeta.algorithms.latent import choose
from offmeta.networks.recurrent import BeliefEncoder
from offmeta.types import Array, Network, Params, Policy, Transition


class Belief(NamedTuple):
  """What a policy knows of one task.

  Attributes:
    hidden: [H], of the encoder.
    begins: [], 1 before the first step of an episode that is not the first.
  """

  hidden: Array
  begins: Array


@dataclasses.dataclass(frozen=True)
class Tracker:
  """Follows the belief over steps.

  Attributes:
    encoder: of the steps.
    hidden_size: H.
    episode_length: time limit in steps.
    boundaries: whether observations get one more entry: 1 if an episode ended
      with the step (of s') or another than the first begins with it (of s).
  """

  encoder: BeliefEncoder
  hidden_size: int
  episode_length: int
  boundaries: bool

  def _with(self, observation: Array, boundary: Array) -> Array:
    if not self.boundaries:
      return observation
    return jnp.concatenate([observation, boundary[..., None]], axis=-1)

  def _begins(self, steps: Transition) -> Array:
    later = jnp.arange(steps.reward.shape[-1]) > 0
    return (later & (steps.extras['time'] == 0)).astype(jnp.float32)

  def observation(self, steps: Transition) -> Array:
    """s of steps [..., T], with the boundary if there is one."""
    return self._with(steps.observation, self._begins(steps))

  def next_observation(self, steps: Transition) -> Array:
    """s' of steps [..., T], with the boundary if there is one."""
    last = steps.extras['time'] >= self.episode_length - 1
    ends = (last | (steps.discount == 0)).astype(jnp.float32)
    return self._with(steps.next_observation, ends)

  def advance(
    self, params: Params, hidden: Array, steps: Transition, mask: Array
  ) -> Array:
    """Hidden states after each step.

    Args:
      params: of the encoder.
      hidden: [..., H], before the first step.
      steps: leaves [..., T, ...].
      mask: [..., T], 1 where a step counts.

    Returns:
      [..., T, H].
    """
    return self.encoder.advance(
      params,
      hidden,
      self.next_observation(steps),
      steps.action,
      steps.reward,
      mask,
    )

  def start(self, batch: tuple[int, ...] = ()) -> Array:
    """The hidden state [..., H] that knows nothing."""
    return jnp.zeros(batch + (self.hidden_size,))

  def along(self, params: Params, steps: Transition, mask: Array) -> Array:
    """Mean and log-variance of q_t before the first step and after each.

    Args:
      params: of the encoder.
      steps: leaves [..., T, ...].
      mask: [..., T], a prefix of ones.

    Returns:
      [..., T + 1, 2 Z]; past the end of a sequence its last belief.
    """
    start = self.start(mask.shape[:-1])
    after = self.advance(params, start, steps, mask)
    return self.encoder.read(
      params, jnp.concatenate([start[..., None, :], after], axis=-2)
    )

  def annotate(
    self, params: Params, steps: Transition, mask: Array
  ) -> dict[str, Array]:
    """What RL on the belief MDP needs to know of each step.

    The state after an episode's last step is the first one of the next
    episode, under the same belief. A sequence's last step has no such
    successor; there the episode goes on as at any time limit.

    Args:
      params: of the encoder.
      steps: one sequence, leaves [T, ...].
      mask: [T], a prefix of ones.

    Returns:
      'belief' and 'next_belief' [T, 2 Z], before and after the step;
      'begins' and 'next_begins' [T], whether the state before and after it is
      the first of a later episode; 'next_observation' [T, O].
    """
    belief = self.along(params, steps, mask)
    begins = self._begins(steps) * mask
    next_begins = jnp.append(begins[1:], 0.0)
    return {
      'belief': belief[:-1],
      'next_belief': belief[1:],
      'begins': begins,
      'next_begins': next_begins,
      'next_observation': jnp.where(
        next_begins[:, None] > 0,
        jnp.roll(steps.observation, -1, axis=0),
        steps.next_observation,
      ),
    }

  def augmented(
    self, observation: Array, begins: Array, belief: Array
  ) -> Array:
    """The state of the belief MDP: [..., O], [...], [..., 2 Z] -> [..., .]."""
    return jnp.concatenate([self._with(observation, begins), belief], axis=-1)

  def augment(self, query: Transition) -> Transition:
    """Transitions of the belief MDP, from annotated ones [...]."""
    extras = query.extras
    return query._replace(
      observation=self.augmented(
        query.observation, extras['begins'], extras['belief']
      ),
      next_observation=self.augmented(
        extras['next_observation'], extras['next_begins'], extras['next_belief']
      ),
    )

  def policy(self, actor: Network, deterministic: bool) -> Policy:
    """Acts on (observation, belief), and updates the belief in every step.

    Args:
      actor: augmented state -> TanhNormal.
      deterministic: act with tanh(mean) instead of a sample.

    Returns:
      A Policy whose params are {'encoder', 'actor'}.
    """

    def init(params, key):
      del params, key
      return Belief(self.start(), jnp.zeros(()))

    def act(params, belief, observation, key):
      read = self.encoder.read(params['encoder'], belief.hidden)
      distribution = actor.apply(
        params['actor'], self.augmented(observation, belief.begins, read)
      )
      return choose(distribution, deterministic, key), belief, {}

    def observe(params, belief, transition, key):
      del key
      one = jax.tree.map(lambda x: x[None], transition)
      after = self.advance(
        params['encoder'], belief.hidden, one, jnp.ones((1,))
      )
      return Belief(after[0], jnp.zeros(()))

    def adapt(params, belief, context, valid, key):
      del belief, key
      after = self.advance(params['encoder'], self.start(), context, valid)
      return Belief(after[-1], jnp.any(valid > 0).astype(jnp.float32))

    return Policy(init=init, act=act, observe=observe, adapt=adapt)
