"""The phases of a run: files in, files out.

`collect` trains the behaviour policy and cuts the dataset from its replay,
`offline` meta-trains on it, `online` runs every self-supervised variant from
the same offline checkpoint, `test` scores all of them. Each phase can be
rerun, resumed or replaced; `offmeta.results.report` reads what they wrote.
"""

from collections.abc import Mapping
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from offmeta import evaluation, parallel, rollout
from offmeta.data import buffer as buffers
from offmeta.data import dataset as datasets
from offmeta.data.buffer import Replay
from offmeta.training import config as configs
from offmeta.training import gather as gathering
from offmeta.training import loop, schedule
from offmeta.training.evaluator import Evaluator
from offmeta.training.setup import Setup, write_arrays
from offmeta.types import LearnerState, Transition

PHASES = ('collect', 'offline', 'online', 'test', 'report')


class PhaseError(RuntimeError):
  """A phase lacks what an earlier one should have left."""


def dataset_path(setup: Setup) -> str:
  """Where the offline data of this run are."""
  return setup.config.collect.dataset or str(setup.workdir / 'dataset')


def _init_states(algorithm, keys) -> LearnerState:
  return jax.jit(jax.vmap(
      lambda k: algorithm.init(schedule.stream(k, 'init'))))(keys)


def _gatherer(setup, algorithm, keys, visited, config):
  """The loop's `gather`, compiled once for all seeds."""
  keys = jax.vmap(lambda k: schedule.stream(k, 'gather'))(keys)

  def one(state, replay, task_id, key):
    return gathering.gather(
        setup.family, algorithm, state, replay, setup.train_tasks, task_id,
        key, config)

  @jax.jit
  def fold(iteration):
    return jax.vmap(lambda k: jax.random.fold_in(k, iteration))(keys)

  compiled = parallel.over_seeds(
      one, keys.shape[0], (0, 0, 0, 0), donate=(1,))
  return lambda state, replay, iteration: compiled(
      state, replay, visited[:, iteration], fold(iteration))


def _run_stage(setup, stage, checkpointer, progress, updater, show=(), **kw):
  """Restores, runs and marks one stage."""
  if checkpointer.latest_step() is not None:
    progress = checkpointer.restore(progress)
  done = int(progress.iteration) * updater.total + int(progress.updates)
  writer = setup.writer(stage, kw['iterations'] * updater.total, show)
  writer.truncate_after(done)
  try:
    progress = loop.run(
        progress, updater, writer=writer, checkpointer=checkpointer,
        checkpoint_every_s=setup.checkpoint_every_s, stop=setup.stop, **kw)
  finally:
    writer.close()
    checkpointer.close()
  final = setup.checkpointer(stage, 'final')
  final.save(0, progress.state)
  final.close()
  return progress


# Collect.


def behaviour_keys(seed: int):
  """Keys [1] of the behaviour policy; apart from those of any seed."""
  return jax.vmap(lambda k: schedule.stream(k, 'collect'))(
      schedule.seed_keys(seed, 1))


def collect(setup: Setup):
  """Trains PEARL, keeps a slice of its replay, scores the references."""
  config = setup.config.collect
  if setup.is_done('collect'):
    return
  if config.dataset:
    load_dataset(setup)  # fail here, not after minutes of training
    _score_references(setup, None, None)
    setup.mark_done('collect')
    return
  algorithm = setup.algorithm('pearl', config.behaviour)
  keys = behaviour_keys(config.seed)
  num_train = setup.config.family.num_train
  visited = schedule.visits(
      keys, config.iterations, config.gather, num_train)
  _check_slices(setup, visited)
  checkpointer = setup.checkpointer('collect')
  begin = lambda: _behaviour_start(setup, algorithm, keys, visited)
  fresh = checkpointer.latest_step() is None
  progress = begin() if fresh else jax.eval_shape(begin)
  updater = loop.Updater(
      lambda axis: setup.algorithm('pearl', config.behaviour, axis).online,
      keys, setup.config.chunk, shared_replay=False,
      max_devices=setup.config.max_devices)
  evaluator = Evaluator(setup, algorithm, keys)
  last = config.iterations - 1
  every = max(1, config.iterations // 10)
  progress = _run_stage(
      setup, 'collect', checkpointer, progress, updater,
      show=('eval/test/self_context/final_return',),
      label='pearl', iterations=config.iterations,
      gather=_gatherer(setup, algorithm, keys, visited, config.gather),
      evaluate=lambda state, replay: evaluator.curve(state, None),
      evaluate_due=lambda iteration, updates: updates == updater.total and (
          iteration % every == every - 1 or iteration == last))
  data = _cut(setup, jax.tree.map(lambda x: np.asarray(x[0]), progress.replay))
  datasets.save(
      dataset_path(setup), data, setup.family.spec,
      {
          'algorithm': 'pearl',
          'config': configs.to_dict(config),
          'task_list': setup.config.family.task_list,
      },
      overwrite=True)
  _score_references(setup, evaluator, progress.state)
  setup.mark_done('collect')


def _check_slices(setup, visited):
  """Fails before the training if its replay will be too short to cut."""
  config, gather = setup.config.collect, setup.config.collect.gather
  spec = setup.family.spec
  initial, prior, posterior = (  # with terminations at least the quota
      quota if spec.terminates else schedule.longest(spec, quota)
      for quota in (
          config.initial_steps, gather.prior_steps, gather.posterior_steps))
  tasks = np.arange(setup.config.family.num_train)
  visits = np.sum(np.asarray(visited)[0, :, :, None] == tasks, axis=1)
  rl = initial + visits.sum(0) * (prior + posterior)
  per_visit = prior + (posterior if gather.posterior_to_encoder else 0)
  encoder = initial + visits.sum(0) * per_visit
  if gather.clear_encoder_buffer:  # the last iteration's visits stay
    encoder = np.full(tasks.shape, initial)
    for counts in visits:
      encoder = np.where(counts > 0, counts * per_visit, encoder)
  for name, held in (('rl_size', rl), ('encoder_size', encoder)):
    if getattr(config, name) > held.min():
      raise configs.ConfigError(
          f'config.collect.{name}: {getattr(config, name)} transitions per'
          f' task asked for, but the schedule gathers only {held.min()} in'
          f' training task {held.argmin()}; ask for less, or collect more')


def _behaviour_start(setup, algorithm, keys, visited):
  """An untrained behaviour policy and its initial data."""
  config = setup.config.collect
  num_train = setup.config.family.num_train
  size = schedule.sizes(
      setup.family.spec, config.gather, visited, num_train,
      schedule.longest(setup.family.spec, config.initial_steps),
      schedule.longest(setup.family.spec, config.initial_steps), False)
  example = jax.eval_shape(
      lambda: rollout.episode(
          setup.family, rollout.uniform_policy(
              setup.family.spec.action_size), (), (),
          jax.tree.map(lambda x: x[0], setup.train_tasks),
          jax.random.key(0))[1])
  example = jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), example)
  states = _init_states(algorithm, keys)

  @jax.jit
  def initial(states):
    def one(state, key):
      replay = Replay(
          buffers.empty(example, num_train, size.rl),
          buffers.empty(example, num_train, size.encoder))
      return gathering.initial_data(
          setup.family, algorithm, state, replay, setup.train_tasks,
          schedule.stream(key, 'initial'), config.initial_steps,
          config.gather)
    return jax.vmap(one)(states, keys)

  return loop.start(states, initial(states))


def _cut(setup: Setup, replay: Replay) -> datasets.MetaDataset:
  """The dataset: slices of the behaviour policy's two buffers."""
  config = setup.config.collect

  def whole(buffer, context, context_size):
    return datasets.MetaDataset(
        transitions=buffer.data, size=buffer.size, context=context,
        context_size=context_size,
        tasks=jax.tree.map(np.asarray, setup.train_tasks),
        episode_return=np.zeros(buffer.size.shape, np.float32))

  context = context_size = None
  if config.encoder_size:
    part = datasets.slice_transitions(
        whole(replay.encoder, None, None), -config.encoder_size, None)
    context, context_size = part.transitions, part.size
  first, last = (0, config.rl_size), (-config.rl_size, None)
  part = datasets.slice_transitions(
      whole(replay.rl, context, context_size),
      *(first if config.rl_slice == 'first' else last))
  return part._replace(episode_return=episode_returns(
      part.transitions, part.size, setup.family.spec.episode_length))


def episode_returns(
    data: Transition, size: np.ndarray, horizon: int
) -> np.ndarray:
  """Mean return [M] of the whole episodes in a log.

  Args:
    data: leaves [M, C, ...]; extras hold 'time', the step within an episode.
    size: [M].
    horizon: steps at which the time limit ends an episode.
  """
  means = []
  for task in range(len(size)):
    n = int(size[task])
    time, reward = data.extras['time'][task, :n], data.reward[task, :n]
    starts = np.flatnonzero(time == 0)
    ends = np.append(starts[1:], n)
    whole = [
        reward[a:b].sum() for a, b in zip(starts, ends)
        if b - a == horizon or data.discount[task, b - 1] == 0]
    means.append(np.mean(whole) if whole else reward.sum())
  return np.asarray(means, np.float32)


def _score_references(setup, evaluator, state):
  """Random and behaviour policies under the meta-test protocol."""
  config = setup.config.evaluation
  family = setup.family
  policy = rollout.uniform_policy(family.spec.action_size)
  keys = jax.vmap(lambda k: schedule.stream(k, 'evaluation'))(setup.keys)
  random = parallel.over_seeds(
      lambda key: evaluation.meta_test(
          family, policy, (), setup.test_tasks, key, config.num_repeats,
          config.num_steps, config.num_prior_episodes).returns,
      keys.shape[0], (0,))(keys)
  arrays = {'random_test_returns': random}
  data = load_dataset(setup)
  arrays['behaviour_data_returns'] = data.episode_return
  if evaluator is not None:
    arrays['behaviour_test_returns'] = evaluator.full(
        state, None)[0]['test_self_returns']
  write_arrays(setup.workdir / 'evaluations' / 'collect.npz', arrays)


# Offline.


def load_dataset(setup: Setup) -> datasets.MetaDataset:
  """The run's dataset, validated against the family and the task list.

  Raises:
    PhaseError: there is none yet, or it is of other tasks.
    DatasetError: it is damaged or of another family.
  """
  path = dataset_path(setup)
  if not setup.config.collect.dataset and not (
      setup.workdir / 'dataset').exists():
    raise PhaseError(
        f'{path}: no dataset; run --phases=collect first or point'
        ' --config.collect.dataset at one')
  data = datasets.load(path, setup.family.spec)
  for name, leaf in setup.train_tasks.items():
    stored = data.tasks.get(name)
    if stored is None or stored.shape != leaf.shape or not np.allclose(
        stored, leaf, atol=1e-6):
      raise PhaseError(
          f'{path}: task parameter {name!r} differs from the training tasks of'
          f' config.family (task_list {setup.config.family.task_list!r},'
          f' num_train {setup.config.family.num_train}); use the list that'
          ' the dataset was made with')
  return data


def offline_replay(
    setup: Setup,
    sizes: schedule.Sizes | None = None,
    share: bool = True,
) -> Replay:
  """The dataset as a replay (no seed axis).

  Args:
    setup: of the run.
    sizes: capacities of the online phase; as large as the data if None.
    share: one buffer for both roles unless the dataset has encoder data.
  """
  data = load_dataset(setup)

  def build(transitions, size, capacity):
    bare = transitions._replace(extras={})
    bare = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), bare)
    return buffers.make(
        bare, size, capacity or bare.reward.shape[1],
        sizes.sequences if sizes else 0)

  rl = build(data.transitions, data.size, sizes and sizes.rl)
  if data.context is not None:
    return Replay(rl, build(
        data.context, data.context_size, sizes and sizes.encoder))
  if share:
    return Replay(rl, None)
  return Replay(rl, build(
      data.transitions, data.size, sizes and sizes.encoder))


def make_evaluator(setup: Setup) -> Evaluator:
  """Compiled evaluations for all phases after `collect`."""
  algorithm = setup.algorithm('smac', setup.config.smac)
  return Evaluator(setup, algorithm, setup.keys)


def offline(setup: Setup, evaluator: Evaluator | None = None):
  """Meta-trains on the fixed data.

  Args:
    setup: of the run.
    evaluator: see `make_evaluator`; phases of one process share it.
  """
  if setup.is_done('offline'):
    return
  config = setup.config
  algorithm = setup.algorithm('smac', config.smac)
  replay = jax.device_put(offline_replay(setup))
  progress = loop.start(_init_states(algorithm, setup.keys), None)
  updater = loop.Updater(
      lambda axis: setup.algorithm('smac', config.smac, axis).offline,
      setup.keys, config.chunk, shared_replay=True,
      max_devices=config.max_devices)
  evaluator = evaluator or make_evaluator(setup)
  every = config.evaluation.every_updates
  _run_stage(
      setup, 'offline', setup.checkpointer('offline'), progress, updater,
      show=('eval/test/self_context/final_return',
            'eval/train/offline_context/final_return'),
      label='smac', iterations=1, replay=replay, evaluate=evaluator.curve,
      evaluate_due=lambda iteration, updates: (
          updates % every < config.chunk or updates == updater.total))
  setup.mark_done('offline')


# Online.


def _final_states(setup: Setup, stage: str, algorithm) -> LearnerState:
  """The learner states [S] that a finished stage left.

  Raises:
    PhaseError: it is not finished.
  """
  if not setup.is_done(stage):
    raise PhaseError(
        f'{setup.workdir / stage}: not finished; run the phase'
        f' {stage.split("/")[0]!r} first (the same command with'
        ' --phases=collect,offline,online continues it)')
  return setup.checkpointer(stage, 'final').restore(
      _init_states(algorithm, setup.keys))


def _online_start(setup, config, algorithm, visited):
  """States and replays [S, ...] at the phase switch."""
  states = _final_states(setup, 'offline', algorithm)
  data = load_dataset(setup)
  shared = config.online.share_encoder_buffer
  if shared and data.context is not None:
    raise configs.ConfigError(
        'config.online.share_encoder_buffer: the dataset has encoder data of'
        ' its own; set it to False, or config.collect.encoder_size to 0')
  context = data.transitions if data.context is None else data.context
  sizes = schedule.sizes(
      setup.family.spec, config.online.gather, visited,
      config.family.num_train, data.transitions.reward.shape[1],
      context.reward.shape[1], shared)
  replay = offline_replay(setup, sizes, shared)
  replays = jax.tree.map(
      lambda x: jnp.repeat(jnp.asarray(x)[None], config.num_seeds, 0), replay)
  states = jax.jit(jax.vmap(algorithm.begin_online))(states)
  return loop.start(states, replays)


def online(setup: Setup, name: str, evaluator: Evaluator | None = None):
  """Runs one variant of the self-supervised phase.

  Rewards are dropped inside the rollout unless the variant asks for true
  ones; labels come from the decoder and frozen offline data of the task.

  Args:
    setup: of the run.
    name: of the variant.
    evaluator: see `make_evaluator`; variants act alike, so they share it.
  """
  stage = f'online/{name}'
  if setup.is_done(stage):
    return
  config = configs.variant(setup.config, name)
  algorithm = setup.algorithm('smac', config.smac)
  visited = schedule.visits(
      setup.keys, config.online.iterations, config.online.gather,
      config.family.num_train)
  progress = _online_start(setup, config, algorithm, visited)
  updater = loop.Updater(
      lambda axis: setup.algorithm('smac', config.smac, axis).online,
      setup.keys, config.chunk, shared_replay=False,
      max_devices=config.max_devices)
  evaluator = evaluator or make_evaluator(setup)
  offline_data = offline_replay(setup)
  every = config.evaluation.every_iterations
  last = config.online.iterations - 1
  _run_stage(
      setup, stage, setup.checkpointer(stage), progress, updater,
      show=('eval/test/self_context/final_return',
            'eval/train/offline_context/final_return'),
      label='smac', iterations=config.online.iterations,
      gather=_gatherer(
          setup, algorithm, setup.keys, visited, config.online.gather),
      evaluate=lambda state, replay: evaluator.curve(state, offline_data),
      evaluate_due=lambda iteration, updates: updates == updater.total and (
          iteration % every == every - 1 or iteration == last))
  setup.mark_done(stage)


# Test.


def test(setup: Setup, evaluator: Evaluator | None = None):
  """Scores the offline stage and every finished variant."""
  config = setup.config
  algorithm = setup.algorithm('smac', config.smac)
  evaluator = evaluator or make_evaluator(setup)
  replay = offline_replay(setup)
  for stage in ('offline', *(f'online/{n}' for n in config.online.variants)):
    if stage == 'offline' or setup.is_done(stage):
      states = _final_states(setup, stage, algorithm)
      _score(setup, evaluator, stage.replace('/', '-'), states, replay)


def _score(setup, evaluator, point, states, replay):
  arrays, adaptation = evaluator.full(states, replay)
  arrays['train_task_color'] = task_color(setup.train_tasks)
  if setup.family.spec.name.endswith('point_robot'):
    arrays.update(_point_robot_paths(setup, adaptation))
  write_arrays(setup.workdir / 'evaluations' / f'{point}.npz', arrays)


def task_color(tasks: Mapping[str, Any]) -> np.ndarray:
  """One number per task [M] to colour pictures by: a value or an angle."""
  leaf = np.asarray(next(iter(tasks.values())))
  if leaf.ndim == 1:
    return leaf
  return np.arctan2(leaf[:, 1], leaf[:, 0])


def _point_robot_paths(setup, adaptation):
  """Positions [4, E, T + 1, 2] and goals [4, 2]: seed 0, held-out tasks that
  are spread over the task parameter."""
  order = np.argsort(task_color(setup.test_tasks), kind='stable')
  shown = order[np.linspace(0, len(order) - 1, min(4, len(order))).astype(int)]
  transitions = jax.tree.map(
      lambda x: np.asarray(x[0, shown, 0]), adaptation.transitions)
  horizon = setup.family.spec.episode_length
  position = transitions.observation
  episodes = position.shape[1] // horizon
  shape = (position.shape[0], episodes, horizon, 2)
  after = transitions.next_observation.reshape(shape)
  return {
      'trajectories': np.concatenate(
          [position.reshape(shape), after[:, :, -1:]], axis=2),
      'trajectory_goals': np.asarray(setup.test_tasks['goal'])[shown],
  }


def run(setup: Setup, phases: tuple[str, ...]):
  """Runs the named phases, except 'report', and books their time.

  Raises:
    Interrupted: a stop was requested; the same call continues.
  """
  evaluator = make_evaluator(setup)
  for phase in phases:
    _honour_stop(setup)
    if phase == 'collect':
      setup.timed('collect', lambda: collect(setup))
    elif phase == 'offline':
      setup.timed('offline', lambda: offline(setup, evaluator))
    elif phase == 'online':
      for name in setup.config.online.variants:
        _honour_stop(setup)
        setup.timed(
            f'online/{name}', lambda n=name: online(setup, n, evaluator))
    elif phase == 'test':
      setup.timed('test', lambda: test(setup, evaluator))
    sys.stdout.flush()


def _honour_stop(setup: Setup):
  """Stops between two stages; within one the loop does."""
  if setup.stop.requested:
    raise loop.Interrupted
