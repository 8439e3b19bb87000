"""One step of gradient descent per task: what MACAW and Meta-BC share.

The belief over a task is the weights of a policy that was adapted to it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from offmeta.networks.distributions import Normal
from offmeta.networks.weight_transform import AdaptableNetwork, Weights
from offmeta.types import Array, Params, Policy, Transition


class Adapted(NamedTuple):
  """Belief over one task.

  Attributes:
    weights: of the policy that acts.
    known: [] bool, whether it has adapted to anything.
  """

  weights: Weights
  known: Array


def over_tasks(task_loop: str) -> Callable[[Callable], Callable]:
  """`jax.vmap`, or for 'scan' the same with one task after the other."""
  if task_loop == 'vmap':
    return jax.vmap
  if task_loop != 'scan':
    raise ValueError(f'task_loop: {task_loop!r}; choose "scan" or "vmap"')
  return lambda fn: lambda *args: jax.lax.map(lambda one: fn(*one), args)


def inner_step(
  network: AdaptableNetwork,
  params: Params,
  steps: Params,
  loss: Callable,
  task_loop: str,
  *rows: Any,
) -> tuple[Weights, Weights, Any]:
  """One step of gradient descent per task; it can be differentiated.

  Args:
    network: whose weights are adapted.
    params: of the network, where every task starts.
    steps: step sizes, scalars in the tree of `params`.
    loss: (weights, *rows of one task) -> (scalar, aux).
    task_loop: see `over_tasks`.
    *rows: what the loss takes, leaves [M, ...].

  Returns:
    Adapted weights, the gradients in the weights, and aux; leaves [M, ...].
  """
  weights = network.generate(params)
  gradients, aux = over_tasks(task_loop)(
    lambda *one: jax.grad(loss, has_aux=True)(weights, *one)
  )(*rows)
  # All tasks at once even in a scan: they share the large matrices.
  adapted = jax.vmap(network.step, (None, 0, None))(params, gradients, steps)
  return adapted, gradients, aux


def only_valid(rows: Transition, mask: Array) -> Transition:
  """`rows` [..., N, ...] with zeros where the mask [..., N] is 0.

  What stands there need not be finite, and zero times NaN is NaN.
  """

  def clear(x):
    wide = mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))
    return jnp.where(wide > 0, x, jnp.zeros_like(x))

  return jax.tree.map(clear, rows)


def acting(
  policy: AdaptableNetwork, adapt: Callable[..., Weights], action_std: float
) -> dict[str, Any]:
  """The acting half of an `Algorithm`.

  The policy that is scored on what it collects itself explores, with noise,
  until it has adapted: the weighted likelihood of a policy's own actions
  without noise has no gradient, so that there would be nothing to adapt to.

  Args:
    policy: observation -> mean action in [-1, 1]; its parameters are the
      group 'policy'.
    adapt: (params, context [N, ...], valid [N]) -> weights; the result counts
      if anything is valid.
    action_std: of the noise of exploring, whose actions are clipped.

  Returns:
    Keyword arguments of `Algorithm`: explore, evaluate,
    evaluate_given_context, actor_params.
  """

  def prior(params):
    return policy.generate(params['policy'])

  def adapted(params, belief, context, valid, key):
    del belief, key
    known = jnp.any(valid > 0)
    # A step by nothing is the prior only up to rounding.
    return Adapted(
      jax.tree.map(
        lambda new, old: jnp.where(known, new, old),
        adapt(params, context, valid),
        prior(params),
      ),
      known,
    )

  def policy_of(noise_before: float, noise_after: float):

    def act(params, belief, observation, key):
      del params
      mean = policy.apply_generated(belief.weights, observation)
      std = jnp.where(belief.known, noise_after, noise_before)
      action = Normal(mean, std).sample(jax.random.normal(key, mean.shape))
      return jnp.clip(action, -1.0, 1.0), belief, {}

    return Policy(
      init=lambda params, key: Adapted(prior(params), jnp.zeros((), bool)),
      act=act,
      observe=lambda params, belief, transition, key: belief,
      adapt=adapted,
    )

  return dict(
    explore=policy_of(action_std, action_std),
    evaluate=policy_of(action_std, 0.0),
    evaluate_given_context=policy_of(0.0, 0.0),
    actor_params=lambda state: state.params,
  )
