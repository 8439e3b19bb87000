"""What every phase of a run shares: family, tasks, algorithm, file names."""

from collections.abc import Callable
import dataclasses
import math
import os
import pathlib
import shutil
import time
from typing import Annotated, Any, Literal
import warnings

import jax
import jax.numpy as jnp

from offmeta import disk, envs, limits, parallel, processes
from offmeta.algorithms import ALGORITHMS
from offmeta.checkpoints.checkpointer import Checkpointer
from offmeta.results import records
from offmeta.training import metrics as metrics_lib, seeds as seeds_lib
from offmeta.training.config import (
  ConfigError,
  ExperimentConfig,
  config_hash,
  variant,
)
from offmeta.training.stopping import StopRequest
from offmeta.types import (
  Algorithm,
  EnvFamily,
  Key,
  Loop,
  Problem,
  Rollout,
  Task,
)


class PhaseError(RuntimeError):
  """A phase lacks what an earlier one should have left."""


@dataclasses.dataclass(frozen=True)
class Runtime:
  """How a run is carried out; none of it changes the numbers.

  Attributes:
    checkpoint_every_s: wall time between checkpoints.
    keep_checkpoints: of finished loops, with their replays; what later
      phases need is kept in any case.
    quiet: no progress on the console.
    max_devices: per process; None for all.
    share: 'seeds' or 'tasks', see `parallel.make_layout`.
    replay: 'device', or 'host' to keep it in the host's memory and stream
      batches (`training/streaming.py`).
  """

  checkpoint_every_s: Annotated[
    float, limits.Range(-math.inf, infinite=True)
  ] = 60.0
  keep_checkpoints: bool = False
  quiet: bool = False
  max_devices: int | None = None
  share: Literal['seeds', 'tasks'] = 'seeds'
  replay: Literal['device', 'host'] = 'device'


@dataclasses.dataclass(frozen=True)
class Setup:
  """Static facts of a run.

  Attributes:
    config: everything that decides the numbers.
    workdir: where every phase reads and writes.
    family: the environment.
    train_tasks, test_tasks: leaves [M, ...].
    seeds: the run's learners.
    stop: asks phases to save and stop.
    runtime: how it is carried out.
    num_rows: logged transitions of the training task with the fewest; 0 while
      there are no logs.
    loaded: what `once` has loaded or made, by path or name; setups made from
      this one by `dataclasses.replace` share it.
  """

  config: ExperimentConfig
  workdir: pathlib.Path
  family: EnvFamily
  train_tasks: Task
  test_tasks: Task
  seeds: seeds_lib.Seeds
  stop: StopRequest
  runtime: Runtime = Runtime()
  num_rows: int = 0
  loaded: dict[str, Any] = dataclasses.field(
    default_factory=dict, compare=False, repr=False
  )

  def once(self, name: str, load: Callable[[], Any]) -> Any:
    """What `load` gave when the run first asked for that file, or for that."""
    if name not in self.loaded:
      self.loaded[name] = load()
    return self.loaded[name]

  def algorithm(
    self, name: str, config: Any, axis_name: str | None = None
  ) -> Algorithm:
    """An algorithm of the registry for this family and these tasks."""
    problem = make_problem(
      self.family, envs.num_tasks(self.train_tasks), self.num_rows
    )
    return ALGORITHMS[name].make(problem, config, axis_name)

  def learner(
    self,
    axis_name: str | None = None,
    config: ExperimentConfig | None = None,
  ) -> Algorithm:
    """The algorithm of the run, or of a variant's `config`."""
    config = config or self.config
    return self.algorithm(config.algorithm, config.settings, axis_name)

  @property
  def logged(self) -> bool:
    """Whether the run's algorithm has any use for logged data."""
    return self.learner().data is not None

  def make_seeds(self, keys: Key, num_tasks: int) -> seeds_lib.Seeds:
    """Other learners than the run's, with meta-batches of `num_tasks`."""
    return seeds_lib.Seeds(
      keys,
      parallel.make_layout(
        keys.shape[0], num_tasks, self.runtime.max_devices, self.runtime.share
      ),
    )

  def checkpointer(
    self, name: str, seeds: seeds_lib.Seeds, kind: str = 'checkpoints'
  ) -> Checkpointer:
    """Of one loop, e.g. 'offline' or 'online/smac', or of the phase 'collect'.

    Args:
      name: of the loop or phase: its folder under the workdir.
      seeds: whose learners.
      kind: 'checkpoints' (to resume from) or 'final' (learner states only).
    """
    return Checkpointer(
      self.workdir / name / kind, config_hash(self.config), layout=seeds.layout
    )

  def writer(
    self, name: str, total: int, show: tuple[str, ...] = ()
  ) -> metrics_lib.MultiWriter:
    """JSONL, TensorBoard and console writers of one loop or phase.

    Only the main process writes anything.
    """
    if not processes.is_main():
      return metrics_lib.MultiWriter([])
    folder = self.workdir / name
    writers = [
      metrics_lib.JsonlWriter(folder / 'metrics.jsonl'),
      metrics_lib.TensorBoardWriter(folder / 'tensorboard'),
    ]
    if not self.runtime.quiet:
      writers.append(metrics_lib.ConsoleWriter(total, name, show=show))
    return metrics_lib.MultiWriter(writers)

  def is_done(self, name: str) -> bool:
    """Whether a loop or phase has been finished in this workdir."""
    path = self.workdir / name / 'done.json'
    return processes.on_main(path.exists)

  def mark_done(self, name: str):
    """Notes that a loop or phase is finished; drops what only it would need."""

    def mark():
      disk.write_json(self.workdir / name / 'done.json', {'name': name})
      if not self.runtime.keep_checkpoints:
        shutil.rmtree(self.workdir / name / 'checkpoints', ignore_errors=True)

    processes.on_main(mark)

  def add_time(self, name: str, seconds: float):
    """Adds to the wall time of a loop or phase, which may run in slices."""
    if not processes.is_main():
      return
    path = self.workdir / 'timing.json'
    timing = _read_timing(path)
    timing[name] = round(timing.get(name, 0.0) + seconds, 3)
    disk.write_json(path, timing)

  def timed(self, name: str, work: Callable[[], None]):
    """Runs `work` and books its wall time, also when it is interrupted."""
    begin = time.monotonic()
    try:
      work()
    finally:
      self.add_time(name, time.monotonic() - begin)


def _read_timing(path: pathlib.Path) -> dict[str, float]:
  """Seconds by loop or phase; a file that cannot be read is not worth a run."""
  try:
    return records.load_timing(path)
  except ValueError as error:
    warnings.warn(f'{error}; counting begins anew', stacklevel=2)
    return {}


def _first(tasks: Task, count: int, what: str, name: str) -> Task:
  known = jax.tree.leaves(tasks)[0].shape[0]
  if count > known:
    raise ConfigError(
      f'config.family.{what}: {count} asked for, but task list {name!r} has'
      f' {known}; ask for at most that many or use task_list="random:SEED"'
    )
  return jax.tree.map(lambda x: jnp.asarray(x)[:count], tasks)


def make_tasks(
  family: EnvFamily, name: str, num_train: int, num_test: int
) -> tuple[Task, Task]:
  """Training and test tasks of a published list or of 'random:SEED'.

  Raises:
    ConfigError: an unknown list, or fewer tasks than asked for.
  """
  kind, _, seed = name.partition(':')
  if kind == 'random':
    if not seed.isdecimal() or int(seed) > limits.MOST_SEED:
      raise ConfigError(
        f'config.family.task_list: {name!r}; write "random:SEED" with a'
        f' whole number from 0 to {limits.MOST_SEED}'
      )
    tasks = family.sample_tasks(jax.random.key(int(seed)), num_train + num_test)
    train = jax.tree.map(lambda x: x[:num_train], tasks)
    return train, jax.tree.map(lambda x: x[num_train:], tasks)
  try:
    train, test = family.task_list(name)
  except ValueError as error:
    raise ConfigError(f'config.family.task_list: {error}') from error
  return (
    _first(train, num_train, 'num_train', name),
    _first(test, num_test, 'num_test', name),
  )


def make_problem(
  family: EnvFamily, num_tasks: int, num_rows: int = 0
) -> Problem:
  """What algorithms of this family are made for; see `Problem`."""
  return Problem(
    family.spec, num_tasks, num_rows, getattr(family, 'termination', None)
  )


def _check_loops(made: Algorithm, config: ExperimentConfig):
  """Refuses loops that the phases could not run; see `types.Loop`."""
  name, seen = config.algorithm, [loop.name for loop in made.loops]
  bare = [n for n in seen if n in ('offline', 'online', 'finetune')]
  inner = [n for n in seen if n.startswith('offline/')]
  after = seen.index('offline') if 'offline' in seen else 0
  good = (
    len(set(seen)) == len(seen) == len(bare) + len(inner)
    and all(seen.index(n) < after for n in inner)
    and not any(n.count('/') > 1 or n.endswith('/') for n in inner)
  )
  if not good:
    raise ConfigError(
      f'config.{name}: loops {seen}; name them "offline", "online" and'
      ' "finetune", each at most once, and what comes before "offline"'
      ' "offline/NAME"'
    )
  for loop in made.loops:
    visits = loop.phase == 'online' and loop.gather is None
    if (visits or loop.phase == 'finetune') and loop.iterations is not None:
      raise ConfigError(
        f'config.{name}: loop {loop.name!r} says iterations={loop.iterations},'
        ' but the experiment does where tasks are visited; leave it None'
      )
    if visits and made.data is None:
      raise ConfigError(
        f'config.{name}: loop {loop.name!r} goes on from logged data, but the'
        ' algorithm has no use for logs (data=None); give one of the two'
      )


def _check_gather(loop: Loop, config: ExperimentConfig, num_train: int):
  """Refuses rollouts that do not fit the tasks, and batches of none."""
  name = config.algorithm
  fresh = any(isinstance(stage.batch.query, Rollout) for stage in loop.stages)
  if loop.gather is None:
    if fresh:
      raise ConfigError(
        f'config.{name}: a stage of loop {loop.name!r} is fed by rollouts, but'
        ' the loop gathers none; give it gather=Rollouts(...)'
      )
    return
  if loop.phase != 'online' or not all(
    isinstance(stage.batch.query, Rollout)
    and stage.batch.num_tasks == loop.gather.num_envs
    for stage in loop.stages
  ):
    raise ConfigError(
      f'config.{name}: loop {loop.name!r} gathers rollouts; that is for loops'
      " of the phase 'online' whose stages are all fed by them, with as many"
      ' tasks as there are environments'
    )
  if loop.gather.num_envs % num_train:
    raise ConfigError(
      f'config.{name}: {loop.gather.num_envs} environments do not spread'
      f' evenly over {num_train} training tasks; choose a multiple, or another'
      ' config.family.num_train'
    )


def _common_meta_batch(config: ExperimentConfig, family: EnvFamily) -> int:
  """What the meta-batches of all stages and variants are multiples of."""
  stages = []
  fewest = ALGORITHMS[config.algorithm].min_tasks
  if config.family.num_train < fewest:
    raise ConfigError(
      f'config.family.num_train: {config.family.num_train} training task, but'
      f' {config.algorithm} compares tasks with each other and needs at least'
      f' {fewest}'
    )
  for changed in (
    config,
    *(variant(config, name) for name in config.online.variants),
  ):
    problem = make_problem(family, config.family.num_train)
    try:
      made = ALGORITHMS[changed.algorithm].make(problem, changed.settings)
    except ValueError as error:
      raise ConfigError(f'config.{changed.algorithm}: {error}') from error
    for loop in made.loops:
      _check_gather(loop, changed, config.family.num_train)
    _check_loops(made, changed)
    stages += [
      stage
      for loop in made.loops
      if loop.phase != 'finetune'  # has layouts of its own
      for stage in loop.stages
    ]
  for stage in stages:
    batch = stage.batch
    if not batch.replacement and batch.num_tasks > config.family.num_train:
      raise ConfigError(
        f'config.{config.algorithm}: a meta-batch of {batch.num_tasks} tasks,'
        f' drawn without replacement from {config.family.num_train} training'
        ' tasks; make num_tasks smaller'
      )
  return math.gcd(*(stage.batch.num_tasks for stage in stages))


def make_setup(
  config: ExperimentConfig,
  workdir: str | os.PathLike[str],
  stop: StopRequest | None = None,
  runtime: Runtime = Runtime(),
) -> Setup:
  """Builds the family, its tasks, and the layout of the learners.

  Raises:
    ConfigError: an unknown family, option or task list, or a flag of the
      runtime that means nothing.
  """
  try:
    limits.check(runtime, 'runtime')
  except ValueError as error:
    raise ConfigError(str(error)) from error
  try:
    family = envs.make(config.family.name, **config.family.options)
  except ValueError as error:
    raise ConfigError(f'config.family: {error}') from error
  train, test = make_tasks(
    family,
    config.family.task_list,
    config.family.num_train,
    config.family.num_test,
  )
  keys = seeds_lib.seed_keys(config.seed, config.num_seeds, config.first_seed)
  meta_batch = _common_meta_batch(config, family)
  layout = parallel.make_layout(
    config.num_seeds, meta_batch, runtime.max_devices, runtime.share
  )
  if layout.repeated:
    raise ConfigError(
      f'config.num_seeds: {config.num_seeds} seeds do not divide over'
      f' {jax.process_count()} processes, nor are meta-batches of'
      f' {meta_batch} tasks shared (--share={runtime.share});'
      ' change the number of seeds (--seeds) or of processes'
    )
  if (
    config.matmul_precision == 'tensorfloat32'
    and jax.default_backend() != 'gpu'
  ):
    raise ConfigError(
      "config.matmul_precision: 'tensorfloat32' exists on GPUs only, this is"
      f' a {jax.default_backend()}; choose float32 or bfloat16'
    )
  return Setup(
    config=config,
    workdir=pathlib.Path(workdir).absolute(),
    family=family,
    train_tasks=train,
    test_tasks=test,
    seeds=seeds_lib.Seeds(keys, layout),
    stop=stop or StopRequest(),
    runtime=runtime,
  )
