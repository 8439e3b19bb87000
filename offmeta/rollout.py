"""Episodes as `lax.scan`, and adaptation sequences built from them.

Those serve one environment of one task; batch them with vmap. Environments
that go on from call to call (`Actors`) come as a batch.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from offmeta import parallel
from offmeta.types import (
  Array,
  EnvFamily,
  EnvState,
  Key,
  Params,
  Policy,
  PolicyState,
  Task,
  Transition,
)

RecordFn = Callable[[EnvState], Mapping[str, Any]]


def uniform_policy(action_size: int) -> Policy:
  """Uniform random actions in [-1, 1]; takes any params."""

  def act(params, state, observation, key):
    del params, observation
    return jax.random.uniform(key, (action_size,), minval=-1.0), state, {}

  return Policy(
    init=lambda params, key: (),
    act=act,
    observe=lambda params, state, transition, key: state,
    adapt=lambda params, state, context, valid, key: state,
  )


class Acting(NamedTuple):
  """What `uniform_at_first` takes as params.

  Attributes:
    params: of the policy.
    uniform_steps: [], act at random while the belief was formed from fewer
      transitions than this; 0: never.
  """

  params: Params
  uniform_steps: Array


def uniform_at_first(policy: Policy, action_size: int) -> Policy:
  """The policy or, until it has adapted to enough, uniform random actions.

  One program for both. With `Acting.uniform_steps` a meta-test depends on no
  trained exploration (CSRO's non-prior protocol).
  """
  uniform = uniform_policy(action_size)

  def init(acting, key):
    return policy.init(acting.params, key), jnp.zeros(())

  def act(acting, state, observation, key):
    inner, known = state
    chosen, inner, extras = policy.act(acting.params, inner, observation, key)
    random, _, _ = uniform.act((), (), observation, key)
    action = jnp.where(known < acting.uniform_steps, random, chosen)
    return action, (inner, known), extras

  def observe(acting, state, transition, key):
    return policy.observe(acting.params, state[0], transition, key), state[1]

  def adapt(acting, state, context, valid, key):
    inner = policy.adapt(acting.params, state[0], context, valid, key)
    return inner, jnp.sum(valid)

  return Policy(init, act, observe, adapt, policy.keep)


def without_reward(transition: Transition) -> Transition:
  """Drops all that could tell the reward: the reward and the extras."""
  return transition._replace(
    reward=jnp.zeros_like(transition.reward), extras={}
  )


def select(condition: Array, yes: Any, no: Any) -> Any:
  """Leaf by leaf; typed keys too."""
  return jax.tree.map(lambda y, n: jnp.where(condition, y, n), yes, no)


def _transition(
  before: EnvState, action: Array, after: EnvState, time: Array
) -> Transition:
  """What a policy observes of a step; `time` [] counts from the reset."""
  return Transition(
    observation=before.observation,
    action=action,
    reward=after.reward,
    discount=1.0 - after.terminal,
    next_observation=after.observation,
    extras={'features': after.features, 'time': time.astype(jnp.float32)},
  )


def episode(
  family: EnvFamily,
  policy: Policy,
  params: Params,
  state: PolicyState,
  task: Task,
  key: Key,
  reward_free: bool = False,
  record: RecordFn = lambda state: {},
  keep: Callable[[Transition], Transition] = lambda transition: transition,
) -> tuple[PolicyState, Transition, Array]:
  """One episode from a random start.

  The environment is frozen after a termination, so nothing that a fallen
  body does afterwards (NaN included) reaches the result.

  A step in which the simulation blew up is flagged in `extras['diverged']`. In
  a family with terminations it is one. In others it is stored as
  (s, a, r, s' = s) with discount 1, where r is the reward of a body at rest,
  and the rest of the episode is another one from the same start. Such a step
  is no sample of the dynamics; the flag tells it from those that are.

  Args:
    family: supplies reset and step.
    policy: acts, and observes every transition.
    params: of the policy.
    state: belief at the start of the episode.
    task: one task.
    key: random key.
    reward_free: drop rewards and features before the policy, or anything
      else, can see them.
    record: what else of the state after a step goes into `extras`, out of the
      policy's sight during the episode.
    keep: what of a step is returned; 'diverged' and what is recorded are in
      any case.

  Returns:
    Belief at the end, transitions [H, ...], valid [H] (a prefix of ones).
  """
  spec = family.spec
  k_reset, k_steps = jax.random.split(key)

  def step(carry, t):
    env_state, belief, alive, time = carry
    k_act, k_observe = jax.random.split(jax.random.fold_in(k_steps, t))
    action, seen, _ = policy.act(params, belief, env_state.observation, k_act)
    after = family.step(env_state, action, task)
    transition = _transition(env_state, action, after, time)
    if reward_free:
      transition = without_reward(transition)
    new_belief = policy.observe(params, seen, transition, k_observe)
    transition = keep(transition)
    transition = transition._replace(
      extras={
        **transition.extras,
        'diverged': jnp.asarray(after.diverged),
        **record(after),
      }
    )
    if not spec.terminates:
      again = after.diverged > 0.5
      carry = (
        select(again, start, after),
        new_belief,
        alive,
        jnp.where(again, 0, time + 1),
      )
      return carry, (transition, jnp.ones(()))
    transition = select(
      alive, transition, jax.tree.map(jnp.zeros_like, transition)
    )
    carry = (
      select(alive, after, env_state),
      select(alive, new_belief, belief),
      alive & (after.terminal < 0.5),
      time + 1,
    )
    return carry, (transition, alive.astype(jnp.float32))

  start = family.reset(k_reset, task)
  (_, belief, _, _), (transitions, valid) = jax.lax.scan(
    step,
    (start, state, jnp.ones((), bool), jnp.zeros((), jnp.int32)),
    jnp.arange(spec.episode_length),
  )
  return belief, transitions, valid


class Adaptation(NamedTuple):
  """What happened in one adaptation sequence of at most E episodes.

  Attributes:
    returns: [E] undiscounted true returns, NaN where no episode took place.
    transitions: [W, ...], what the policy keeps of the steps of all episodes,
      one after another.
    valid: [W], 1 where `transitions` holds a step.
    context_size: [] int32, how many leading transitions the last episode's
      belief was formed from (0: the prior).
  """

  returns: Array
  transitions: Transition
  valid: Array
  context_size: Array


def max_episodes(family: EnvFamily, num_steps: int) -> int:
  """Upper bound on episodes within a step budget.

  Without terminations it is exact. With them it is four times as many: a
  policy that falls faster than that is scored on its last episode within
  the bound.
  """
  full = -(-num_steps // family.spec.episode_length)
  return 4 * full if family.spec.terminates else full


ContextFn = Callable[[Transition, Array, Key], tuple[Transition, Array]]


def adaptation_sequence(
  family: EnvFamily,
  policy: Policy,
  params: Params,
  task: Task,
  key: Key,
  num_steps: int,
  num_prior_episodes: int,
  context_fn: ContextFn | None = None,
  record: RecordFn = lambda state: {},
) -> Adaptation:
  """Episodes with adaptation in between.

  Whole episodes are run until `num_steps` steps are used. The belief is the
  prior for the first `num_prior_episodes`; afterwards it is formed, before
  each episode, from all transitions so far.

  Args:
    family: the environment.
    policy: acts.
    params: of the policy.
    task: one task.
    key: random key.
    num_steps: step budget.
    num_prior_episodes: episodes under the prior.
    context_fn: replaces "all transitions so far" by something else:
      (transitions, valid, key) -> (context, valid).
    record: see `episode`.

  Returns:
    Adaptation.
  """
  horizon = family.spec.episode_length
  limit = max_episodes(family, num_steps)
  width = num_steps + horizon if family.spec.terminates else limit * horizon

  @jax.jit  # so that `blank` does not trace it a second time
  def run_episode(params, belief, task, key):
    return episode(
      family,
      policy,
      params,
      belief,
      task,
      key,
      record=record,
      keep=policy.keep,
    )

  def blank():
    def one(k):
      state = policy.init(params, k)
      return run_episode(params, state, task, k)[1]

    shapes = jax.eval_shape(one, key)
    return jax.tree.map(
      lambda x: jnp.zeros((width,) + x.shape[1:], x.dtype), shapes
    )

  def run(carry):
    number, used, store, returns, _ = carry
    k_adapt, k_context, k_episode = jax.random.split(
      jax.random.fold_in(key, number), 3
    )
    adapt = number >= num_prior_episodes
    gathered = (jnp.arange(width) < used).astype(jnp.float32)
    context, valid = (
      (store, gathered)
      if context_fn is None
      else context_fn(store, gathered, k_context)
    )
    belief = policy.init(params, k_adapt)
    belief = policy.adapt(params, belief, context, valid * adapt, k_adapt)
    _, new, alive = run_episode(params, belief, task, k_episode)
    count = jnp.sum(alive).astype(jnp.int32)
    store = jax.tree.map(
      lambda s, n: jax.lax.dynamic_update_slice(
        s, n, (used,) + (0,) * (n.ndim - 1)
      ),
      store,
      new,
    )
    returns = returns.at[number].set(jnp.sum(new.reward))
    return (number + 1, used + count, store, returns, jnp.where(adapt, used, 0))

  def unfinished(carry):
    return (carry[1] < num_steps) & (carry[0] < limit)

  zero = jnp.zeros((), jnp.int32)
  _, used, store, returns, context_size = jax.lax.while_loop(
    unfinished, run, (zero, zero, blank(), jnp.full((limit,), jnp.nan), zero)
  )
  valid = (jnp.arange(width) < used).astype(jnp.float32)
  return Adaptation(returns, store, valid, context_size)


def final_return(returns: Array) -> Array:
  """The last episode that took place: [..., E] with NaN -> [...]."""
  last = jnp.sum(jnp.isfinite(returns), axis=-1) - 1
  return jnp.take_along_axis(returns, last[..., None], axis=-1)[..., 0]


# Environments that go on: on-policy data.


class Actors(NamedTuple):
  """E environments in the middle of their episodes, and who acts in them.

  Attributes:
    env_state: leaves [E, ...].
    belief: states of the policy, leaves [E, ...].
    time: [E] int32, steps since the last reset.
  """

  env_state: EnvState
  belief: PolicyState
  time: Array


def _begin(family, policy, params, task, key) -> Actors:
  """One environment after a reset; leaves [...]."""
  k_reset, k_belief = jax.random.split(key)
  # A state's default is no jax array.
  state = jax.tree.map(jnp.asarray, family.reset(k_reset, task))
  return Actors(state, policy.init(params, k_belief), jnp.zeros((), jnp.int32))


def _actor_keys(key: Key, tasks: Task) -> Key:
  """Keys [E], one per environment: how many there are does not matter."""
  number = jax.tree.leaves(tasks)[0].shape[0]
  return jax.vmap(lambda slot: jax.random.fold_in(key, slot))(
    jnp.arange(number)
  )


def start_actors(
  family: EnvFamily,
  policy: Policy,
  params: Params,
  tasks: Task,
  key: Key,
  axis_name: str | None = None,
) -> Actors:
  """Environments at random starts, with beliefs that know nothing.

  Args:
    family: the environment.
    policy: will act.
    params: of the policy.
    tasks: leaves [E, ...], of each environment.
    key: random key.
    axis_name: device axis over which the environments are shared out; every
      device gets all results.
  """
  return parallel.shared_vmap(
    lambda task, key: _begin(family, policy, params, task, key),
    axis_name,
    (0, 0),
  )(tasks, _actor_keys(key, tasks))


def continue_rollout(
  family: EnvFamily,
  policy: Policy,
  params: Params,
  actors: Actors,
  tasks: Task,
  num_steps: int,
  key: Key,
  axis_name: str | None = None,
) -> tuple[Actors, Transition]:
  """The next steps of every environment; episodes may straddle calls.

  An environment is reset, with a prior belief, after a termination, at the
  time limit, and where the simulation blew up. In a family with terminations
  that is one; in others the step is stored as in `episode`, as a time limit.

  Args:
    family: the environment.
    policy: acts, and observes every transition.
    params: of the policy.
    actors: where the environments stand.
    tasks: leaves [E, ...], the same in every call.
    num_steps: T.
    key: random key, another one in every call.
    axis_name: see `start_actors`.

  Returns:
    The actors afterwards, and transitions [E, T, ...]. `next_observation` is
    the true one, before any reset; `discount` is 0 at terminations only. The
    extras are 'features', 'time' (steps since the reset), 'diverged',
    'truncated' (1 where an episode ended without a termination) and all that
    the policy's `act` says besides.
  """
  horizon = family.spec.episode_length

  def one(actor, task, key):
    def step(actor, t):
      env_state, belief, time = actor
      k_act, k_observe, k_begin = jax.random.split(
        jax.random.fold_in(key, t), 3
      )
      action, belief, said = policy.act(
        params, belief, env_state.observation, k_act
      )
      after = family.step(env_state, action, task)
      transition = _transition(env_state, action, after, time)
      belief = policy.observe(params, belief, transition, k_observe)
      terminal = after.terminal > 0.5
      ends = terminal | (time + 1 >= horizon) | (after.diverged > 0.5)
      transition = transition._replace(
        extras={
          **said,
          **transition.extras,
          'diverged': jnp.asarray(after.diverged),
          'truncated': (ends & ~terminal).astype(jnp.float32),
        }
      )
      fresh = _begin(family, policy, params, task, k_begin)
      going_on = Actors(after, belief, time + 1)
      return select(ends, fresh, going_on), transition

    return jax.lax.scan(step, actor, jnp.arange(num_steps))

  return parallel.shared_vmap(one, axis_name, (0, 0, 0))(
    actors, tasks, _actor_keys(key, tasks)
  )
