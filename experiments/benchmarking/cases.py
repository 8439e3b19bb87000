"""The updates that are measured: their sizes, configurations and data."""

from collections.abc import Sequence
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.benchmarking import flops
from experiments.configs import recipes
from experiments.configs import smac as smac_experiment
from offmeta.algorithms import ALGORITHMS, sac
from offmeta.data import buffer as buffers
from offmeta.data.buffer import Replay
from offmeta.training import config as configs
from offmeta.training.config import ExperimentConfig
from offmeta.types import Algorithm, EnvSpec, Stage, Transition


class Case(NamedTuple):
  """One kind of update to measure.

  Attributes:
    algorithm: key of ALGORITHMS.
    stage: 'offline' or 'online'.
    variant: which configuration, e.g. 'released'.
    spec: sizes of the family.
    config: of the algorithm.
    num_tasks, num_rows: M and C of the replay.
  """

  algorithm: str
  stage: str
  variant: str
  spec: EnvSpec
  config: Any
  num_tasks: int
  num_rows: int

  def make(self, axis_name: str | None = None) -> Algorithm:
    """The algorithm of this case."""
    return ALGORITHMS[self.algorithm][1](self.spec, self.config, axis_name)

  def get_stage(self, axis_name: str | None = None) -> Stage:
    """The stage of this case."""
    return getattr(self.make(axis_name), self.stage)[0]

  def resized(self, **sizes: int) -> 'Case':
    """The same with other `num_tasks` or `query_size` in each batch.

    Raises:
      ValueError: single-task SAC and num_tasks.
    """
    if self.algorithm == 'sac':
      if 'num_tasks' in sizes:
        raise ValueError('single-task SAC has no meta-batch')
      changes = {'batch_size': sizes['query_size']}
    else:
      stage = getattr(self.config, self.stage)
      changes = {self.stage: dataclasses.replace(stage, **sizes)}
    return self._replace(config=dataclasses.replace(self.config, **changes))

  def evaluations(self) -> list[flops.Evaluation]:
    """The networks that one update evaluates."""
    return flops.EVALUATIONS[self.algorithm](
        self.spec, self.config, self.get_stage())

  def gflop(self) -> float:
    """Of one update of one seed."""
    return sum(e.flop() for e in self.evaluations()) / 1e9


def _spec(name: str, observation: int, action: int, length: int) -> EnvSpec:
  return EnvSpec(name, observation, action, 1, length, False, {})


def _smoke_config() -> ExperimentConfig:
  nets = {
      name: (16, 16) for name in (
          'encoder_hidden', 'decoder_hidden', 'critic_hidden', 'actor_hidden')}
  sizes = {'num_tasks': 2, 'query_size': 16, 'context_size': 8}
  return configs.from_dict({
      'smac': {
          **nets, 'offline': sizes, 'online': {**sizes, 'sequence_size': 16}},
      'collect': {'behaviour': {
          **nets, 'value_hidden': (16, 16), 'online': sizes}},
  })


def make_cases(profile: str) -> list[Case]:
  """All update cases of a profile."""
  single_task = sac.Config()
  if profile == 'paper':
    base, data = ExperimentConfig(), (100, 1200)
    spec = _spec('cheetah_vel', 20, 6, 200)
  elif profile == 'cpu':
    values = smac_experiment.get_config('point_robot').to_dict()
    values.pop('profiles')
    base = configs.from_dict(values)
    data = (base.family.num_train, base.collect.rl_size)
    spec = _spec('point_robot', 2, 2, 20)
  else:
    base, data = _smoke_config(), (4, 64)
    spec = _spec('smoke', 3, 2, 8)
    single_task = sac.Config((16, 16), (16, 16), batch_size=16)
  recipe = dict(recipes.MATCHED)
  recipe.pop('description')
  matched = configs.from_dict(recipe, base).settings
  behaviour = base.collect.behaviour
  cases = [
      Case('smac', 'offline', 'released', spec, base.settings, *data),
      Case('smac', 'online', 'released', spec, base.settings, *data),
      Case('smac', 'online', 'matched', spec, matched, *data),
      Case('pearl', 'online', 'behaviour', spec, behaviour, *data),
      Case('sac', 'online', 'one_task', spec, single_task, 1, data[1]),
  ]
  if profile == 'paper':  # the meta-batch of PEARL's own paper
    cases.append(
        Case('pearl', 'online', '16_tasks', spec, behaviour, *data).resized(
            num_tasks=16))
  return cases


def first_cases(profile: str, algorithms: Sequence[str]) -> list[Case]:
  """The first update case of each algorithm."""
  first = {}
  for case in make_cases(profile):
    first.setdefault(case.algorithm, case)
  return [case for name, case in first.items() if name in algorithms]


def synthetic_replay(case: Case) -> Replay:
  """Random transitions of a case's sizes, with one sequence per task."""
  shape = (case.num_tasks, case.num_rows)
  keys = jax.random.split(jax.random.key(0), 4)
  observation = (*shape, case.spec.observation_size)
  data = Transition(
      observation=jax.random.normal(keys[0], observation),
      action=jax.random.uniform(
          keys[1], (*shape, case.spec.action_size), minval=-1.0),
      reward=jax.random.normal(keys[2], shape),
      discount=jnp.ones(shape),
      next_observation=jax.random.normal(keys[3], observation))
  size = jnp.full(shape[:1], case.num_rows)
  buffer = buffers.make(data, size, case.num_rows, max_sequences=1)
  length = min(case.num_rows, max(1, case.get_stage().batch.sequence_size))
  return Replay(buffer._replace(
      sequence_length=jnp.full((case.num_tasks, 1), length),
      num_sequences=jnp.ones((case.num_tasks,), jnp.int32)), None)
