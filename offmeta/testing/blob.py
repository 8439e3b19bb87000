"""The smallest family that observes images; `envs.register` makes it known."""

import jax
import jax.numpy as jnp

from offmeta.types import Array, EnvSpec, EnvState, Key, Policy, Task

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

    return Policy(
      init=lambda params, key: (),
      act=act,
      observe=lambda params, state, transition, key: state,
      adapt=lambda params, state, context, valid, key: state,
    )


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
