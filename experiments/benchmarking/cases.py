"""The updates that are measured: their sizes, configurations and data."""

from collections.abc import Mapping, Sequence
import dataclasses
import importlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.benchmarking import flops
from experiments.configs import recipes, smac as smac_experiment
from experiments.runs import configuration
from offmeta.algorithms import ALGORITHMS, sac
from offmeta.data import buffer as buffers, sampler
from offmeta.data.buffer import Replay
from offmeta.losses import returns
from offmeta.training import config as configs
from offmeta.training.config import ExperimentConfig
from offmeta.types import (
  Algorithm,
  EnvSpec,
  LearnerState,
  MetaBatch,
  Problem,
  Stage,
  Transition,
)

# Without an online phase; their settings are those of their config files.
_OFFLINE = (
  'macaw',
  'meta_bc',
  'multitask',
  'borel',
  'focal',
  'csro',
  'unicorn',
)


class Case(NamedTuple):
  """One kind of update to measure.

  Attributes:
    algorithm: key of ALGORITHMS.
    stage: 'offline' or 'online'.
    variant: which configuration, or which of several stages.
    spec: sizes of the family.
    config: of the algorithm.
    num_tasks, num_rows: M and C of the replay.
    number: of the stage among the offline or online ones.
    sizes: of its batches, where they are not the configuration's: see
      `resized`.
  """

  algorithm: str
  stage: str
  variant: str
  spec: EnvSpec
  config: Any
  num_tasks: int
  num_rows: int
  number: int = 0
  sizes: Mapping[str, int] = {}

  def make(self, axis_name: str | None = None) -> Algorithm:
    """The algorithm of this case."""
    problem = Problem(self.spec, self.num_tasks, self.num_rows)
    return ALGORITHMS[self.algorithm].make(problem, self.config, axis_name)

  def get_stage(self, axis_name: str | None = None) -> Stage:
    """The stage of this case."""
    stage = self.make(axis_name).loop(self.stage).stages[self.number]
    batch = stage.batch
    if 'query_size' in self.sizes:
      query = batch.query._replace(size=self.sizes['query_size'])
      batch = batch._replace(query=query)
    if 'num_tasks' in self.sizes:
      batch = batch._replace(num_tasks=self.sizes['num_tasks'])
    return stage._replace(batch=batch)

  def resized(self, **sizes: int) -> 'Case':
    """The same with other `num_tasks` or `query_size` in each batch.

    Raises:
      ValueError: single-task SAC and num_tasks.
    """
    if self.algorithm == 'sac' and 'num_tasks' in sizes:
      raise ValueError('single-task SAC has no meta-batch')
    return self._replace(sizes={**self.sizes, **sizes})

  def shapes(self) -> tuple[LearnerState, MetaBatch]:
    """Shapes of what an update takes."""
    stage = self.get_stage()
    state = jax.eval_shape(self.make().init, jax.random.key(0))

    def batch(state):
      replay = synthetic_replay(self)
      if stage.annotate is not None:
        log = replay.query.data
        replay = replay.with_extras(
          jax.vmap(stage.annotate, (None, 0, 0))(state, log, log.discount)
        )
      return sampler.sample_batch(
        jax.random.key(0),
        state.step,
        jnp.arange(stage.batch.num_tasks),
        stage.batch,
        replay,
      )

    return state, jax.eval_shape(batch, state)

  def gflop(self) -> float:
    """Of one update of one seed."""
    return flops.count(self.get_stage().update, *self.shapes()) / 1e9


def _spec(name: str, observation: int, action: int, length: int) -> EnvSpec:
  return EnvSpec(name, (observation,), action, 1, length, False, {})


def _smoke_config() -> ExperimentConfig:
  nets = {
    name: (16, 16)
    for name in (
      'encoder_hidden',
      'decoder_hidden',
      'critic_hidden',
      'actor_hidden',
    )
  }
  sizes = {'num_tasks': 2, 'query_size': 16, 'context_size': 8}
  return configs.from_dict(
    {
      'smac': {
        **nets,
        'offline': sizes,
        'online': {**sizes, 'sequence_size': 16},
      },
      'collect': {
        'behaviour': {**nets, 'value_hidden': (16, 16), 'online': sizes}
      },
    }
  )


def _settings(algorithm: str, profile: str) -> Any:
  """The defaults for 'paper', else those of the config file."""
  if profile == 'paper':
    settings = ALGORITHMS[algorithm].config()
  else:
    file = importlib.import_module(f'experiments.configs.{algorithm}')
    settings = configuration.resolve(
      file.get_config('point_robot'), profile, {}
    ).settings
  return settings


def _offline_cases(
  algorithm: str, profile: str, spec: EnvSpec, data: tuple[int, int]
) -> list[Case]:
  """Update cases of one of _OFFLINE."""
  settings = _settings(algorithm, profile)
  change = lambda **changes: dataclasses.replace(settings, **changes)
  if algorithm == 'macaw':
    variants = {loop: (change(task_loop=loop), 0) for loop in ('scan', 'vmap')}
  elif algorithm == 'borel':
    if profile == 'paper':  # decoding all 401 beliefs takes over 1 GB
      settings = change(vae=dataclasses.replace(settings.vae, num_decoded=50))
    variants = {
      'rl': (settings, 1),
      f'vae_{settings.vae.num_decoded}_times': (settings, 0),
    }
  else:
    variants = {'released': (settings, 0)}
  return [
    Case(algorithm, 'offline', name, spec, config, *data, number)
    for name, (config, number) in variants.items()
  ]


def make_cases(
  profile: str, algorithms: Sequence[str] = tuple(ALGORITHMS)
) -> list[Case]:
  """All update cases of a profile and of these algorithms."""
  single_task = sac.Config()
  if profile == 'paper':
    base, data = ExperimentConfig(), (100, 1200)
    spec = _spec('cheetah_vel', 20, 6, 200)
  elif profile == 'cpu':
    base = configuration.resolve(
      smac_experiment.get_config('point_robot'), profile, {}
    )
    data = (base.family.num_train, base.collect.log_size)
    spec = _spec('point_robot', 2, 2, 20)
  else:
    base, data = _smoke_config(), (16, 64)
    spec = _spec('smoke', 3, 2, 8)
    single_task = sac.Config((16, 16), (16, 16), batch_size=16)
  recipe = dict(recipes.MATCHED)
  recipe.pop('description')
  matched = configs.from_dict(recipe, base).settings
  behaviour = base.collect.behaviour
  pearl = Case('pearl', 'online', 'behaviour', spec, behaviour, *data)
  cases = [
    Case('smac', 'offline', 'released', spec, base.settings, *data),
    Case('smac', 'online', 'released', spec, base.settings, *data),
    Case('smac', 'online', 'matched', spec, matched, *data),
    pearl,
    Case('sac', 'online', 'one_task', spec, single_task, 1, data[1]),
  ]
  if profile == 'paper':  # the meta-batch of PEARL's own paper
    cases.append(pearl._replace(variant='16_tasks').resized(num_tasks=16))
  cases = [case for case in cases if case.algorithm in algorithms]
  for name in _OFFLINE:
    if name in algorithms:
      cases += _offline_cases(name, profile, spec, data)
  return cases


def first_cases(profile: str, algorithms: Sequence[str]) -> list[Case]:
  """The first update case of each algorithm."""
  first = {}
  for case in make_cases(profile, algorithms):
    first.setdefault(case.algorithm, case)
  return list(first.values())


def synthetic_replay(case: Case) -> Replay:
  """Random transitions of a case's sizes, in episodes and sequences.

  They hold what the algorithm's DataSpec asks for; a stride has been taken.
  There is one sequence per task, or as many as fit where they are part of it.
  """
  shape = (case.num_tasks, case.num_rows)
  spec, asked = case.spec, case.make().data
  keys = jax.random.split(jax.random.key(0), 4)
  observation = (*shape, spec.observation_size)
  time = jnp.arange(case.num_rows) % spec.episode_length
  data = Transition(
    observation=jax.random.normal(keys[0], observation),
    action=jax.random.uniform(keys[1], (*shape, spec.action_size), minval=-1.0),
    reward=jax.random.normal(keys[2], shape),
    discount=jnp.ones(shape),
    next_observation=jax.random.normal(keys[3], observation),
    extras={'time': jnp.broadcast_to(time.astype(jnp.float32), shape)},
  )
  kept = {}
  if asked.returns_discount is not None:
    kept = jax.vmap(
      lambda log: returns.annotate(
        log, jnp.ones_like(log.reward), asked.returns_discount
      )
    )(data)
  context = case.get_stage().batch.context
  length = getattr(context, 'sequence_size', 1)  # of Exploration
  number = 1
  if asked.sequence_episodes:
    kept['time'] = data.extras['time']
    length = asked.sequence_episodes * spec.episode_length
    number = max(1, case.num_rows // length)
  buffer = buffers.make(
    data._replace(extras=kept),
    jnp.full(shape[:1], case.num_rows),
    case.num_rows,
  )
  table = jnp.full((case.num_tasks, number), min(case.num_rows, length))
  return Replay(
    buffer._replace(
      sequence_start=table * jnp.arange(number),
      sequence_length=table,
      num_sequences=jnp.full(shape[:1], number),
    ),
    None,
  )
