"""What `experiments.render` does: act, draw, write.

To be imported when flags have been parsed: it imports jax.
"""

import ast
from collections.abc import Callable, Iterator
import pathlib
import sys
from typing import Any, NamedTuple

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np

from experiments.runs import configuration, jax_settings
from offmeta import disk, envs, limits, playback as restore, rollout
from offmeta.checkpoints.checkpointer import CheckpointError
from offmeta.envs import render
from offmeta.results import animation, raycast
from offmeta.training import setup as setups
from offmeta.training.config import ConfigError
from offmeta.training.setup import PhaseError
from offmeta.types import EnvFamily, Task, Transition

_PICTURES_PER_SECOND = 25  # at most about so many unless asked for
_MOST_EPISODES = 1000  # all that come before one are acted, too
_LIMITS = {
  'seed': limits.SEED,
  'every': limits.COUNT,
  'fps': limits.Range(0.1, 1000),
  'width': limits.Range(64, 4096),
  'height': limits.Range(48, 4096),
}
_STEPS_PER_SECOND = 10  # of families without a time step
_TRAIL, _OLD_TRAIL = (0.25, 0.35, 0.55), (0.66, 0.70, 0.76)


class Show(NamedTuple):
  """The flags of `experiments.render` that do not say whose policy it is."""

  task: int
  seed: int
  episodes: tuple[str, ...]
  out: str
  every: int | None
  fps: float | None
  width: int
  height: int


class Performance(NamedTuple):
  """What happened.

  Attributes:
    family: the environment.
    task: one task.
    adaptation: its steps; extras hold 'physics' after each of them.
    title: whose policy it is.
    phases: (number of an episode, from 0) -> '' or a remark on it.
  """

  family: EnvFamily
  task: Task
  adaptation: rollout.Adaptation
  title: str
  phases: Callable[[int], str]


def run(show: Show, perform: Callable[[], Performance]) -> int:
  """Writes the file; returns the exit status.

  0: done. 1: bad input, with one message on stderr.
  """
  logging.set_verbosity(logging.WARNING)
  path = pathlib.Path(show.out).expanduser()
  try:
    _check(show)
    animation.check(path)
    jax_settings.configure()
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures, fps = _pictures(show, perform())
    animation.save(path, pictures, fps)
  except (
    animation.AnimationError,
    CheckpointError,
    ConfigError,
    ModuleNotFoundError,
    PhaseError,
    render.RenderError,
  ) as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  except OSError as error:
    print(
      f'error: {error.filename or path}: {error.strerror or error}',
      file=sys.stderr,
    )
    return 1
  print(f'{path}: {path.stat().st_size / 1e3:.0f} kB')
  return 0


def _check(show: Show):
  """Refuses sizes and rates that no file can have.

  Raises:
    ConfigError: names the flag.
  """
  for name, limit in _LIMITS.items():
    value = getattr(show, name)
    try:
      if value is not None:
        limits.require(value, limit, f'--{name}')
    except ValueError as error:
      raise ConfigError(str(error)) from error


def fresh(
  show: Show, name: str, options: list[str], policy: str
) -> Performance:
  """A family of its own under a policy that knows nothing, or the script.

  Raises:
    ConfigError: an unknown family, option, task or policy.
  """
  try:
    family = envs.make(name, **dict(map(_parse_option, options)))
  except (ValueError, TypeError) as error:
    raise ConfigError(f'--family={name}: {error}') from error
  tasks = family.task_list('default')[1]
  restore.check_index('task', show.task, envs.num_tasks(tasks))
  task = envs.take_tasks(tasks, show.task)
  params, acting = (), rollout.uniform_policy(family.spec.action_size)
  if policy == 'zero':
    acting = acting._replace(
      act=lambda params, state, observation, key: (
        jnp.zeros((family.spec.action_size,)),
        state,
        {},
      )
    )
  elif policy == 'script':
    if not hasattr(family, 'scripted_policy'):
      raise ConfigError(f'--policy=script: family {name!r} has none')
    params, acting = task, family.scripted_policy()
  num_steps = family.spec.episode_length * max(_numbers(show), default=1)
  adaptation = jax.jit(
    lambda params, task, key: rollout.adaptation_sequence(
      family,
      acting,
      params,
      task,
      key,
      num_steps,
      num_steps,
      record=lambda state: {'physics': render.visible(state)},
    )
  )(params, task, jax.random.key(show.seed))
  return Performance(
    family, task, adaptation, f'{policy} policy', lambda number: ''
  )


def restored(show: Show, workdir: str, loop: str) -> Performance:
  """The meta-test of a run's policy.

  Raises:
    CheckpointError, ConfigError, PhaseError: see `offmeta.playback`.
    ConfigError: the config file with the run's own family is not there.
  """
  folder = pathlib.Path(workdir).expanduser()
  config = restore.read_config(folder)
  file = disk.read_json(folder / 'run.json').get('config_file')
  if config.family.name not in envs.FAMILIES and isinstance(file, str) and file:
    configuration.load_config(str(configuration.ROOT / file))
  setup = setups.make_setup(config, folder, runtime=setups.Runtime(quiet=True))
  adaptation = restore.meta_test(
    setup,
    loop,
    show.seed,
    show.task,
    record=lambda state: {'physics': render.visible(state)},
  )
  num_prior = config.evaluation.num_prior_episodes
  return Performance(
    setup.family,
    jax.tree.map(lambda x: x[show.task], setup.test_tasks),
    adaptation,
    f'{loop}, seed {show.seed}',
    lambda number: ' (prior)' if number < num_prior else ' (adapted)',
  )


def _parse_option(text: str) -> tuple[str, Any]:
  """'backend=mjx' -> ('backend', 'mjx'), values as Python literals."""
  name, _, value = text.partition('=')
  try:
    return name, ast.literal_eval(value)
  except (ValueError, SyntaxError):
    return name, value


def _numbers(show: Show) -> list[int]:
  """The episodes asked for, from 1; empty for all.

  Raises:
    ConfigError: not a whole number of at least 1.
  """
  for number in show.episodes:
    if not number.isdecimal() or not 1 <= int(number) <= _MOST_EPISODES:
      raise ConfigError(
        f'--episodes: {number!r}; number them from 1, at most {_MOST_EPISODES}'
      )
  return sorted({int(number) for number in show.episodes})


def _pictures(
  show: Show, performance: Performance
) -> tuple[Iterator[np.ndarray], float]:
  """Pictures, made one by one, and how many to show per second.

  Raises:
    ConfigError: an episode that did not take place.
    RenderError: the family cannot be drawn.
  """
  family, task, adaptation = performance[:3]
  describe = getattr(family, 'describe', _describe)
  dt = family.simulator.dt if hasattr(family, 'simulator') else None
  rate = 1 / dt if dt else _STEPS_PER_SECOND
  every = show.every or max(1, round(rate / _PICTURES_PER_SECOND))
  transitions = jax.device_get(adaptation.transitions)
  episodes = _split(family, transitions, int(adaptation.valid.sum()))
  numbers = _numbers(show) or range(1, len(episodes) + 1)
  if max(numbers) > len(episodes):
    raise ConfigError(
      f'--episodes: only {len(episodes)} took place, not {max(numbers)}'
    )
  shown = [  # (episode, step in the log), the last step of each among them
    (number, step)
    for number in numbers
    for step in episodes[number - 1]
    if (episodes[number - 1][-1] - step) % every == 0
  ]
  steps = np.array([step for _, step in shown])
  frames, view = render.scene(
    family,
    task,
    jax.tree.map(lambda x: x[steps], transitions.extras['physics']),
  )
  caster = raycast.Raycaster(
    view.azimuth, view.elevation, view.extent, show.width, show.height
  )

  def captions(number, step):
    episode = episodes[number - 1]
    past = step + 1 - episode[0]
    time = f't = {past * dt:.2f} s' if dt else f'step {past}'
    total = transitions.reward[episode[0] : step + 1].sum()
    return (
      f'{family.spec.name}  {performance.title}',
      f'task {show.task}: {describe(task)}',
      f'episode {number}{performance.phases(number - 1)}   {time}'
      f'   return {total:.1f}',
    )

  def draw():
    for index, (number, step) in enumerate(shown):
      picture = caster.image(
        frames[index],
        view.targets[index],
        _trails(view.track, [n for n, _ in shown[: index + 1]]),
      )
      yield animation.caption(picture, captions(number, step))

  return draw(), show.fps or rate / every


def _trails(
  track: np.ndarray | None, numbers: list[int]
) -> list[tuple[np.ndarray, tuple[float, float, float]]]:
  """Ways [K, 2] and their colours: of this episode, under it earlier ones.

  Args:
    track: [F, 2], where the body was, F >= K; or None.
    numbers: [K], the episodes that the first K pictures belong to.
  """
  if track is None:
    return []
  return [
    (
      track[[i for i, n in enumerate(numbers) if n == number]],
      _TRAIL if number == numbers[-1] else _OLD_TRAIL,
    )
    for number in sorted(set(numbers))
  ]


def _split(
  family: EnvFamily, transitions: Transition, used: int
) -> list[range]:
  """Where the episodes lie in a log of `used` steps."""
  begins = np.arange(0, used, family.spec.episode_length)
  if family.spec.terminates:
    begins = np.flatnonzero(transitions.extras['time'][:used] == 0)
  ends = [*begins[1:], used]
  return [range(begin, end) for begin, end in zip(begins, ends)]


def _describe(task: Task) -> str:
  """The parameters of a task; of long ones only the names."""

  def show(value):
    numbers = ', '.join(f'{x:.2f}' for x in np.ravel(value))
    return numbers if np.ndim(value) == 0 else f'({numbers})'

  return ', '.join(
    f'{name} {show(value)}' if np.size(value) <= 3 else name
    for name, value in task.items()
  )
