"""A learner of the frames of `testing.blob.Blob`: stored windows of images."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from offmeta import algorithms, envs, optim, parallel, rollout
from offmeta.networks import base
from offmeta.testing import blob
from offmeta.types import (
  Algorithm,
  BatchSpec,
  DataSpec,
  Loop,
  Problem,
  Stage,
  Trajectory,
  Windows,
)


@dataclasses.dataclass(frozen=True)
class Config:
  """Settings of `make`."""

  hidden: tuple[int, ...] = (16,)
  lr: float = 3e-3
  num_updates: int = 8
  num_tasks: int = 2  # meta-batch
  num_windows: int = 3  # per task
  window: int = 4  # steps


def make(
  problem: Problem, config: Config, axis_name: str | None = None
) -> Algorithm:
  """Predicts each next frame from a frame and an action; acts at random.

  Args:
    problem: of a family of images.
    config: hyper-parameters.
    axis_name: device axis when the meta-batch is sharded.
  """
  spec = problem.spec
  height, width, channels = spec.observation_shape
  pixels = height * width * channels
  network = base.mlp(
    (pixels, spec.action_size), config.hidden, [(pixels, 1e-2)]
  )
  optimizers = {'model': optax.adam(config.lr)}

  def init(key):
    return optim.first_state(key, {'model': network.init(key)}, optimizers)

  def loss(params, windows: Trajectory):
    frames = windows.observation.astype(jnp.float32) / 255.0
    frames = frames.reshape(frames.shape[:-3] + (pixels,))
    before, after = frames[..., :-1, :], frames[..., 1:, :]
    change = network.apply(params['model'], before, windows.action)
    error = jnp.sum(jnp.square(before + change - after), axis=-1)
    return jnp.sum(windows.mask * error) / jnp.sum(windows.mask)

  def update(state, batch):
    value, gradients = parallel.pmean(
      jax.value_and_grad(loss)(state.params, batch.query), axis_name
    )
    params, opt_state = optim.step_groups(
      optimizers, gradients, state.opt_state, state.params
    )
    return state.replace(
      step=state.step + 1, params=params, opt_state=opt_state
    ), {'model/error': value}

  batch = BatchSpec(
    config.num_tasks, Windows(config.num_windows, config.window)
  )
  acting = rollout.uniform_policy(spec.action_size)
  return Algorithm(
    init=init,
    loops=(
      Loop('offline', (Stage('frames', config.num_updates, batch, update),)),
    ),
    explore=acting,
    evaluate=acting,
    evaluate_given_context=None,
    actor_params=lambda state: (),
    data=DataSpec(sequence_episodes=1),
  )


def register():
  """Adds the family 'blob' and the algorithm 'frames', once."""
  if 'blob' not in envs.FAMILIES:
    envs.register('blob', blob.Blob)
  algorithms.register('frames', Config, make)
