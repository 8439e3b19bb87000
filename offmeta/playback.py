"""What a finished run did, once more: its policies from their files."""

import pathlib

import jax

from offmeta import disk, rollout
from offmeta.collection import phase as collecting
from offmeta.collection.sources import (
  pearl as collect_pearl,
  script as collect_script,
)
from offmeta.training import config as configs, loop as loops
from offmeta.training.setup import Setup
from offmeta.types import Key, Params, Policy, Task


def read_config(workdir: pathlib.Path) -> configs.ExperimentConfig:
  """The configuration that WORKDIR/run.json describes.

  Raises:
    ConfigError: there is none, or this version reads it differently.
  """
  path = workdir / 'run.json'
  try:
    record = disk.read_json(path)
    config, known = configs.from_dict(record['config']), record['config_hash']
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise configs.ConfigError(
      f'{path}: not readable as a run description ({error})'
    ) from error
  if configs.config_hash(config) != known:
    raise configs.ConfigError(
      f'{path}: written by a version of offmeta with other settings'
    )
  return config


def meta_test(
  setup: Setup,
  folder: str,
  seed: int,
  task_id: int,
  record: rollout.RecordFn,
) -> rollout.Adaptation:
  """The first repetition of the meta-test in one held-out task.

  The same starts and random numbers as in the episodes that the phase `test`
  scored (`collect` for its own policy). They are compiled otherwise here, so
  rounding differs: bodies with contacts may part from the scored episodes
  after some tens of steps, others keep to them.

  A scripted policy (`collect.source` 'script') was not scored; under 'collect'
  it acts, knowing the task, in the same protocol.

  Args:
    setup: of the run.
    folder: of a loop: 'offline', 'online/VARIANT' or 'collect'.
    seed: position among the run's seeds.
    task_id: position among its held-out tasks.
    record: see `rollout.episode`.

  Raises:
    ConfigError: no such loop, seed or task, or no policy of this run behind
      'collect'.
    PhaseError: the loop is not finished.
  """
  check_index('task', task_id, setup.config.family.num_test)
  task = jax.tree.map(lambda x: x[task_id], setup.test_tasks)
  policy, params, key = _policy(setup, folder, seed, task)
  for number in (0, task_id, 0):  # `Evaluator`, `evaluation.meta_test`
    key = jax.random.fold_in(key, number)
  config = setup.config.evaluation
  return jax.jit(
    lambda params, task, key: rollout.adaptation_sequence(
      setup.family,
      policy,
      params,
      task,
      key,
      config.num_steps,
      config.num_prior_episodes,
      record=record,
    )
  )(params, task, key)


def check_index(name: str, value: int, size: int):
  """Raises ConfigError unless 0 <= value < size."""
  if not 0 <= value < size:
    raise configs.ConfigError(
      f'{name} {value} is out of range; there are 0 to {size - 1}'
    )


def _policy(
  setup: Setup, folder: str, seed: int, task: Task
) -> tuple[Policy, Params, Key]:
  """What acted in a loop, its parameters, and its key for evaluations."""
  config = setup.config
  known = [loop.name for loop in setup.learner().in_phase('offline')]
  known += [f'online/{name}' for name in config.online.variants]
  if folder not in (*known, 'collect'):
    raise configs.ConfigError(
      f'loop {folder!r}; known: {", ".join((*known, "collect"))}'
    )
  if folder == 'collect':
    seeds = collect_pearl.behaviour_seeds(setup)
    if config.collect.dataset:
      raise configs.ConfigError(
        "loop 'collect': the run was given its dataset,"
        f' {config.collect.dataset}; this run has no behaviour policy'
      )
    if config.collect.source == 'sac':
      raise configs.ConfigError(
        "loop 'collect': each task's data come from a SAC learner of its"
        ' own (config.collect.source); there is no policy that adapts'
      )
    algorithm = setup.algorithm('pearl', config.collect.behaviour)
  else:
    seeds = setup.seeds
    algorithm = collecting.with_logs(setup).learner()
  check_index('seed', seed, seeds.layout.num_seeds)
  key = seeds.streams('evaluation')[seed]
  if folder == 'collect' and config.collect.source == 'script':
    return collect_script.scripted_policy(setup.family), task, key
  states = loops.final_states(setup, folder, algorithm, seeds)
  params = algorithm.actor_params(jax.tree.map(lambda x: x[seed], states))
  return algorithm.evaluate, params, key
