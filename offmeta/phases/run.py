"""The phases of a run: files in, files out.

`collect` (a file of its own) makes the dataset, `offline` meta-trains on it,
`online` runs every self-supervised variant from the same offline checkpoint
(where the algorithm has such a phase), `finetune` (a file of its own) trains on
in each held-out task, `test` scores the meta-trained ones. Each phase can be
rerun, resumed or replaced; `offmeta.results.report` reads what they wrote.
"""

from collections.abc import Mapping
import contextlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from offmeta import disk, processes, rollout
from offmeta.collection import phase as collecting
from offmeta.data import (
  buffer as buffers,
  prepare,
)
from offmeta.data.buffer import Replay
from offmeta.phases import finetune as finetuning
from offmeta.results import records
from offmeta.training import (
  config as configs,
  evaluator as evaluators,
  gatherers,
  loop as loops,
  seeds as seeds_lib,
  stopping,
  streaming,
  updates,
  visits as visits_lib,
)
from offmeta.training.setup import Setup
from offmeta.types import (
  LearnerState,
  Loop,
  Rows,
  Slice,
  Task,
)

PHASES = ('collect', 'offline', 'online', 'finetune', 'test', 'report')


# Offline.


def offline_replays(setup: Setup) -> evaluators.OfflineData | None:
  """The datasets as replays (no seed axis), where the run keeps its replays.

  None for algorithms that have no use for logs.
  """
  if not setup.logged:
    return None
  spec = setup.learner().data
  # What is random in the preparation is the same for all seeds.
  key = seeds_lib.stream(jax.random.key(setup.config.seed), 'preparation')
  on_host = setup.runtime.replay == 'host'

  def build(data, spec, tasks):
    place = (
      jax.default_device(streaming.host())
      if on_host
      else (contextlib.nullcontext())
    )
    with place:
      replay = prepare.replay(data, spec, setup.family, tasks, key)
    return replay if on_host else setup.seeds.layout.place(replay, None)

  held_out = collecting.load_test_dataset(setup)
  data = build(collecting.load_dataset(setup), spec, setup.train_tasks)
  _check_rows(setup, int(jnp.min(data.query.num_steps)))
  return evaluators.OfflineData(
    data,
    None
    if held_out is None
    else build(held_out, spec._replace(mix_rewards=False), setup.test_tasks),
  )


def _check_rows(setup: Setup, rows: int):
  """Refuses batches without replacement that would be the whole log."""
  name = setup.config.algorithm
  stages = [
    stage
    for loop in setup.learner().in_phase('offline')
    for stage in loop.stages
  ]
  for stage in stages:
    for part in (stage.batch.query, stage.batch.context):
      distinct = isinstance(part, Rows) and not part.replacement
      if (distinct or isinstance(part, Slice)) and rows < part.size:
        raise configs.ConfigError(
          f'config.{name}: batches of {part.size} rows without replacement,'
          f' but a task has only {rows} (after a stride of'
          f' {setup.learner().data.stride}); make context_size, query_size or'
          ' stride smaller, or use longer logs (config.collect)'
        )


def make_evaluator(setup: Setup) -> evaluators.Evaluator:
  """Compiled evaluations for all phases after `collect`."""
  setup = collecting.with_logs(setup)
  return evaluators.Evaluator(setup, setup.learner(), setup.seeds)


def _start_states(setup: Setup, algorithm, loop: Loop) -> LearnerState:
  """What a loop begins from: states [S] that the loop before it left.

  Args:
    setup: of the run.
    algorithm: has the loop.
    loop: which.
  """
  position = algorithm.loops.index(loop)
  if position == 0:
    states = updates.init_states(algorithm, setup.seeds)
  else:
    states = loops.final_states(
      setup, algorithm.loops[position - 1].name, algorithm, setup.seeds
    )
  return setup.seeds.layout.compile(loop.begin, (0,))(states)


def offline(setup: Setup, evaluator: evaluators.Evaluator | None = None):
  """Meta-trains on the fixed data.

  Args:
    setup: of the run.
    evaluator: see `make_evaluator`; phases of one process share it.
  """
  setup = collecting.with_logs(setup)
  for loop in setup.learner().in_phase('offline'):
    if not setup.is_done(loop.name):
      _offline_loop(setup, loop.name, evaluator or make_evaluator(setup))
      setup.mark_done(loop.name)


def _offline_loop(setup: Setup, name: str, evaluator: evaluators.Evaluator):
  config = setup.config
  data = offline_replays(setup)
  algorithm = setup.learner()
  loop = algorithm.loop(name)
  updater = updates.make_updater(
    setup,
    lambda axis: setup.learner(axis).loop(name),
    setup.seeds,
    loop.iterations,
    shared_replay=True,
    gathers=False,
  )
  states = _start_states(setup, algorithm, loop)
  loops.run_loop(
    setup,
    name,
    loops.start(states, None),
    updater,
    show=(
      'eval/test/self_context/final_return',
      'eval/train/offline_context/final_return',
    ),
    label=config.algorithm,
    replay=data.train,
    evaluate=lambda state, replay: evaluator.curve(state, data),
    evaluate_every=config.evaluation.every_updates,
  )


# Online.


def _online_replays(setup, config, data: Replay) -> Replay:
  """Replays [S, ...] at the phase switch, from the dataset."""
  if data.query.data.next_observation is None:
    raise configs.ConfigError(
      f'config.family: {setup.family.spec.name!r} observes images, which are'
      ' stored once; replays that grow hold whole transitions, so an algorithm'
      ' with an online phase on logged data needs a family of vectors'
    )
  shared = config.online.share_buffer
  if shared and data.context is not None:
    raise configs.ConfigError(
      'config.online.share_buffer: the dataset has context data of'
      ' its own; set it to False, or config.collect.context_size to 0'
    )
  sizes = visits_lib.online_sizes(
    setup.family.spec, config, setup.seeds, *collecting.dataset_sizes(setup)
  )

  def make(data):
    widen = lambda buffer, capacity: buffers.make(
      buffer.data, buffer.size, capacity, sizes.sequences
    )
    return Replay(
      widen(data.query, sizes.query),
      None if shared else widen(data.contexts(), sizes.context),
    )

  return gatherers.new_replay(setup, setup.seeds, make, data)


def online(
  setup: Setup, name: str, evaluator: evaluators.Evaluator | None = None
):
  """Runs one variant of the online phase: self-supervised, or on-policy.

  In the former rewards are dropped inside the rollout unless the variant asks
  for true ones; labels come from the decoder and frozen offline data of the
  task.

  Args:
    setup: of the run.
    name: of the variant.
    evaluator: see `make_evaluator`; variants act alike, so they share it.
  """
  folder = f'online/{name}'
  if setup.is_done(folder):
    return
  setup = collecting.with_logs(setup)
  config = configs.variant(setup.config, name)
  data = offline_replays(setup)
  algorithm = setup.learner(config=config)
  (loop,) = algorithm.in_phase('online')
  updater = updates.make_updater(
    setup,
    lambda axis: setup.learner(axis, config).loop(loop.name),
    setup.seeds,
    config.online.iterations if loop.iterations is None else loop.iterations,
    shared_replay=False,
    gathers=True,
  )
  states = _start_states(setup, algorithm, loop)
  evaluator = evaluator or make_evaluator(setup)
  if loop.gather is None:
    visited = visits_lib.online_visits(config, setup.seeds)
    gather = gatherers.gatherer(
      setup,
      algorithm,
      setup.seeds,
      setup.seeds.mine(visited),
      config.online.gather,
    )
    start = _online_replays(setup, config, data.train)
  else:
    begin, gather = gatherers.rollout_gatherer(
      setup, algorithm, setup.seeds, loop.gather
    )
    start = begin(states)
  loops.run_loop(
    setup,
    folder,
    loops.start(states, start),
    updater,
    show=(
      'eval/test/self_context/final_return',
      'eval/train/self_context/final_return'
      if data is None
      else 'eval/train/offline_context/final_return',
    ),
    label=config.algorithm,
    gather=gather,
    evaluate=lambda state, replay: evaluator.curve(state, data),
    evaluate_every=config.evaluation.every_iterations * updater.total,
  )
  setup.mark_done(folder)


# Test.


def test(setup: Setup, evaluator: evaluators.Evaluator | None = None):
  """Scores the offline loops and every finished variant."""
  setup = collecting.with_logs(setup)
  config = setup.config
  algorithm = setup.learner()
  evaluator = evaluator or make_evaluator(setup)
  data = offline_replays(setup)
  offline_loops = [loop.name for loop in algorithm.in_phase('offline')]
  variants = [f'online/{name}' for name in config.online.variants]
  for folder in offline_loops + variants:
    if folder in offline_loops or setup.is_done(folder):
      states = loops.final_states(setup, folder, algorithm, setup.seeds)
      _score(setup, evaluator, folder.replace('/', '-'), states, data)


def _score(setup, evaluator, point, states, data):
  arrays, adaptation = evaluator.full(states, data)
  arrays = setup.seeds.layout.all_seeds(arrays)
  color = task_color(setup.train_tasks)
  if color is not None:
    arrays['train_task_color'] = color
  arrays.update(_paths(setup, adaptation))
  processes.on_main(
    lambda: disk.write_arrays(
      setup.workdir / 'evaluations' / f'{point}.npz', arrays
    )
  )


def task_color(tasks: Task) -> np.ndarray | None:
  """One number per task [M] to colour pictures by: a value or an angle.

  None where tasks are neither one number [M] nor one pair [M, 2].
  """
  leaf, *others = map(np.asarray, jax.tree.leaves(tasks))
  if others or leaf.shape[1:] not in ((), (2,)):
    return None
  return leaf if leaf.ndim == 1 else np.arctan2(leaf[:, 1], leaf[:, 0])


def _paths(setup: Setup, adaptation: rollout.Adaptation) -> dict:
  """Where the agent went, for families that say where it is (`position`).

  Args:
    setup: of the run.
    adaptation: on held-out tasks, leaves [S, M, R, ...].

  Returns:
    'trajectories' [m, E, T + 1, 2], NaN after the end of an episode: seed 0,
    first repetition, of the first m held-out tasks, at most `MOST_PATHS`; and
    'trajectory_goals' [m, 2] where tasks have a goal. Else nothing, as where
    the policy keeps no observations (`Policy.keep`).
  """
  family, tasks = setup.family, setup.test_tasks
  kept = adaptation.transitions.observation
  after = adaptation.transitions.next_observation
  if not hasattr(family, 'position') or kept is None or after is None:
    return {}
  if not kept.shape[4:] == after.shape[4:] == family.spec.observation_shape:
    return {}
  number = min(setup.config.family.num_test, records.MOST_PATHS)
  valid, steps = jax.tree.map(
    lambda x: np.asarray(x[0, :number, 0]),
    (adaptation.valid, adaptation.transitions),
  )
  here = np.asarray(family.position(steps.observation))
  there = np.asarray(family.position(steps.next_observation))
  horizon = family.spec.episode_length
  # A step that blew up restarts an episode of fixed length within it.
  starts = [
    np.flatnonzero(time == 0)
    if family.spec.terminates
    else np.arange(0, len(time), horizon)
    for time in np.where(valid > 0, steps.extras['time'], -1)
  ]
  paths = np.full(
    (number, max(map(len, starts)), horizon + 1, 2), np.nan, here.dtype
  )
  for task, begins in enumerate(starts):
    ends = [*begins[1:], int(valid[task].sum())]
    for episode, (begin, end) in enumerate(zip(begins, ends)):
      paths[task, episode, : end - begin] = here[task, begin:end]
      paths[task, episode, end - begin] = there[task, end - 1]
  goal = tasks.get('goal') if isinstance(tasks, Mapping) else None
  found = {'trajectories': paths}
  if goal is not None and goal.shape[1:] == (2,):
    found['trajectory_goals'] = np.asarray(goal)[:number]
  return found


def run(setup: Setup, phases: tuple[str, ...]):
  """Runs the named phases, except 'report', and books their time.

  Raises:
    ConfigError: a phase that cannot be run; before anything is.
    Interrupted: a stop was requested; the same call continues.
  """
  if 'finetune' in phases and setup.config.finetune.iterations:
    finetuning.check(setup)
  evaluator = None  # its algorithm may ask how long the logs are
  for phase in phases:
    _honour_stop(setup)
    if phase in ('offline', 'online', 'test'):
      evaluator = evaluator or make_evaluator(setup)
    if phase == 'collect':
      setup.timed('collect', lambda: collecting.collect(setup))
    elif phase == 'offline':
      setup.timed('offline', lambda: offline(setup, evaluator))
    elif phase == 'online':
      for name in setup.config.online.variants:
        _honour_stop(setup)
        setup.timed(
          f'online/{name}', lambda n=name: online(setup, n, evaluator)
        )
    elif phase == 'finetune' and setup.config.finetune.iterations:
      setup.timed('finetune', lambda: finetuning.finetune(setup))
    elif phase == 'test':
      setup.timed('test', lambda: test(setup, evaluator))
    sys.stdout.flush()


def _honour_stop(setup: Setup):
  """Stops between two stages; within one the loop does."""
  if processes.any_process([setup.stop.requested])[0]:
    raise stopping.Interrupted
