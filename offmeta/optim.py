"""First states, gradient steps and target averaging."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from offmeta.types import Key, LearnerState, Params


def init_groups(
  optimizers: Mapping[str, optax.GradientTransformation],
  params: Mapping[str, Params],
) -> dict:
  """Optimiser states of named parameter groups."""
  return {name: opt.init(params[name]) for name, opt in optimizers.items()}


def first_state(
  key: Key,
  params: Mapping[str, Params],
  optimizers: Mapping[str, optax.GradientTransformation],
  target_params: Params = {},
  extras: Any = {},
) -> LearnerState:
  """A learner before its first update.

  Args:
    key: of the updates.
    params: named groups.
    optimizers: of some or all groups.
    target_params, extras: copied, as they may be parts of `params` and buffers
      are donated.
  """
  return LearnerState(
    step=jnp.zeros((), jnp.int32),
    key=key,
    params=params,
    target_params=jax.tree.map(jnp.copy, target_params),
    opt_state=init_groups(optimizers, params),
    extras=jax.tree.map(jnp.copy, extras),
  )


def step_groups(
  optimizers: Mapping[str, optax.GradientTransformation],
  gradients: Mapping[str, Params],
  opt_state: Mapping,
  params: Mapping[str, Params],
  frozen: tuple[str, ...] = (),
) -> tuple[dict, dict]:
  """One optimiser step per named group.

  Args:
    optimizers: group name -> optimiser.
    gradients: already averaged over devices.
    opt_state: group name -> state.
    params: group name -> parameters.
    frozen: groups that are left alone, their optimiser state included.

  Returns:
    (params, opt_state), new dictionaries.
  """
  new_params, new_state = dict(params), dict(opt_state)
  for name, optimizer in optimizers.items():
    if name in frozen:
      continue
    updates, new_state[name] = optimizer.update(
      gradients[name], opt_state[name], params[name]
    )
    new_params[name] = optax.apply_updates(params[name], updates)
  return new_params, new_state


def polyak(target: Params, online: Params, tau: float) -> Params:
  """(1 - tau) * target + tau * online."""
  return jax.tree.map(lambda t, o: t + tau * (o - t), target, online)


# One step of gradient descent with learned step sizes, as in MACAW's release.


def init_step_sizes(params: Params, rate: float) -> Params:
  """One scalar ln(rate) for every tensor of `params`."""
  return jax.tree.map(lambda _: jnp.log(jnp.float32(rate)), params)


def step_sizes(rho: Params) -> Params:
  """softplus of every scalar; at the start ln(1 + rate)."""
  return jax.tree.map(jax.nn.softplus, rho)


def inner_sgd(params: Params, gradients: Params, steps: Params) -> Params:
  """params - steps * gradients, which can be differentiated in all three.

  Args:
    params: any tree.
    gradients: the same tree.
    steps: the same tree with scalar leaves; see `step_sizes`.
  """
  return jax.tree.map(lambda p, g, a: p - a * g, params, gradients, steps)
