"""The smallest family that observes images, and a learner of its frames.

`register` makes both known; nothing else in the package knows them.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from offmeta import algorithms, envs, optim, parallel, rollout
from offmeta.networks import base
from offmeta.types import (
  Algorithm,
  Array,
  BatchSpec,
  DataSpec,
  EnvSpec,
  EnvState,
  Key,
  Loop,
  Policy,
  Problem,
  Stage,
  Task,
  Trajectory,
  Windows,
)

_STEP_SIZE = 0.2  # length units per unit of action
_RADIUS = 0.25  # standard deviation of the blob, length units
_NOISE = 0.3  # of the script's actions


class Blob:
  """A bright blob on a square of 16 x 16 grey pixels; it has to go somewhere.

  The position (x, y) lies in [-1, 1]^2 and starts anywhere; one step moves by
  0.2 * action. The reward is minus the distance to the target, which is not
  drawn. Task: {'target': [2]}. Features: the position after the move, [2].
  """

  def __init__(self, *, episode_length: int = 8):
    self.spec = EnvSpec(
      name='blob',
      observation_shape=(16, 16, 1),
      action_size=2,
      feature_size=2,
      episode_length=episode_length,
      terminates=False,
      options={'episode_length': episode_length},
      observation_dtype='uint8',
    )

  def sample_tasks(self, key: Key, num_tasks: int) -> Task:
    """Targets uniform on the square."""
    return {'target': jax.random.uniform(key, (num_tasks, 2), minval=-1.0)}

  def task_list(self, name: str) -> tuple[Task, Task]:
    """There is none."""
    raise ValueError(f'unknown task list {name!r}; known: none')

  def reset(self, key: Key, task: Task) -> EnvState:
    """At a random position."""
    del task
    position = jax.random.uniform(key, (2,), minval=-1.0)
    zero = jnp.zeros(())
    return EnvState(position, draw(position), zero, zero, position)

  def step(self, state: EnvState, action: Array, task: Task) -> EnvState:
    """Moves by 0.2 * action, and not off the square."""
    move = _STEP_SIZE * jnp.clip(action, -1.0, 1.0)
    position = jnp.clip(state.physics + move, -1.0, 1.0)
    return EnvState(
      physics=position,
      observation=draw(position),
      reward=self.reward(position, action, task),
      terminal=jnp.zeros(()),
      features=position,
    )

  def reward(self, features: Array, action: Array, task: Task) -> Array:
    """The reward [...] of positions [..., 2]; the action plays no part."""
    del action
    square = jnp.sum(jnp.square(features - task['target']), axis=-1)
    return -jnp.sqrt(square + 1e-12)

  def scripted_policy(self) -> Policy:
    """Goes to the target with some noise; its params are one task."""

    def act(task, state, observation, key):
      way = (task['target'] - locate(observation)) / _STEP_SIZE
      way += _NOISE * jax.random.normal(key, (2,))
      return jnp.clip(way, -1.0, 1.0), state, {}

    return rollout.uniform_policy(2)._replace(act=act)


def _pixels() -> Array:
  """Centres of the pixels of a row, [16]."""
  return (jnp.arange(16) + 0.5) / 8.0 - 1.0


def draw(position: Array) -> Array:
  """The image [16, 16, 1] of a blob at (x, y); y grows downwards."""
  x, y = (jnp.square((_pixels() - p) / _RADIUS) for p in position)
  bright = 255.0 * jnp.exp(-0.5 * (y[:, None] + x[None]))
  return bright.astype(jnp.uint8)[..., None]


def locate(image: Array) -> Array:
  """The centre of brightness (x, y) of an image [16, 16, 1]."""
  bright = image[..., 0].astype(jnp.float32)
  total = jnp.maximum(jnp.sum(bright), 1.0)
  return jnp.stack([jnp.sum(bright, i) @ _pixels() / total for i in (0, 1)])


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
    envs.register('blob', Blob)
  algorithms.register('frames', Config, make)
