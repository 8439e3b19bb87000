"""The phase `collect`: where the offline dataset comes from.

A PEARL run whose replay is cut, a family's scripted policy, or a dataset that
the user brings. Random and behaviour policies are scored on the way.
"""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from offmeta import evaluation, processes, rollout
from offmeta.data import buffer as buffers
from offmeta.data import dataset as datasets
from offmeta.data.buffer import Replay
from offmeta.training import config as configs
from offmeta.training import evaluator as evaluators
from offmeta.training import gather as gathering
from offmeta.training import loop, schedule
from offmeta.training import stage as stages
from offmeta.training.setup import Setup, write_arrays
from offmeta.training.stage import PhaseError
from offmeta.types import EnvFamily, Policy, Transition


def dataset_path(setup: Setup) -> str:
  """Where the offline data of this run are."""
  return setup.config.collect.dataset or str(setup.workdir / 'dataset')


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


def behaviour_seeds(setup: Setup) -> schedule.Seeds:
  """The behaviour policy's seed; apart from those of the run."""
  config = setup.config.collect
  keys = jax.vmap(lambda k: schedule.stream(k, 'collect'))(
      schedule.seed_keys(config.seed, 1))
  return setup.make_seeds(keys, config.behaviour.online.num_tasks)


def trains_behaviour(config: configs.CollectConfig) -> bool:
  """Whether the data come from a behaviour policy of our own."""
  return not config.dataset and config.source == 'pearl'


def collect(setup: Setup):
  """Makes (or checks) the dataset and scores the references."""
  if setup.is_done('collect'):
    return
  config = setup.config.collect
  trained = (None, None)
  if trains_behaviour(config):
    trained = _train_behaviour(setup)
  elif config.dataset:
    load_dataset(setup)  # fail here, not after minutes of training
  else:
    _save(setup, script_data(setup), 'script')
  _score_references(setup, *trained)
  setup.mark_done('collect')


def dataset_sizes(setup: Setup) -> tuple[int, int]:
  """Rows per task that the dataset has, or will have: RL data, and encoder
  data of its own (0 without)."""
  config = setup.config.collect
  if config.dataset or setup.is_done('collect'):
    data = load_dataset(setup)
    context = 0 if data.context is None else data.context.reward.shape[1]
    return data.transitions.reward.shape[1], context
  if config.source == 'script':  # where an episode can end early, at most
    return config.script_episodes * setup.family.spec.episode_length, 0
  return config.rl_size, config.encoder_size


def _save(setup: Setup, data: datasets.MetaDataset, algorithm: str):
  made_by = {
      'algorithm': algorithm,
      'config': configs.to_dict(setup.config.collect),
      'task_list': setup.config.family.task_list,
  }
  processes.on_main(lambda: datasets.save(
      dataset_path(setup), data, setup.family.spec, made_by, overwrite=True))
  processes.in_all(
      lambda: processes.await_directory(pathlib.Path(dataset_path(setup))))


def scripted_policy(family: EnvFamily) -> Policy:
  """The family's scripted policy; its params are one task.

  Raises:
    ConfigError: it has none.
  """
  if not hasattr(family, 'scripted_policy'):
    raise configs.ConfigError(
        f'config.collect.source: family {family.spec.name!r} has no scripted'
        ' policy; use "pearl"')
  return family.scripted_policy()


def script_data(setup: Setup) -> datasets.MetaDataset:
  """Whole episodes of the family's scripted policy in every training task.

  Raises:
    ConfigError: the family has no scripted policy.
  """
  config, family = setup.config.collect, setup.family
  policy = scripted_policy(family)

  def one(task, key):
    state = policy.init(task, jax.random.fold_in(key, 0))
    return rollout.episode(
        family, policy, task, state, task, jax.random.fold_in(key, 1))[1:]

  @jax.jit
  def side_by_side(key):
    keys = jax.vmap(lambda slot: jax.random.fold_in(key, slot))(
        jnp.arange(setup.config.family.num_train))
    return jax.vmap(one)(setup.train_tasks, keys)

  key = behaviour_seeds(setup).keys[0]
  done = [
      jax.device_get(side_by_side(jax.random.fold_in(key, number)))
      for number in range(config.script_episodes)]
  transitions, valid = jax.tree.map(
      lambda *parts: np.concatenate(parts, axis=1), *done)
  return _packed(setup, transitions, valid.astype(bool))


def _packed(
    setup: Setup, transitions: Transition, valid: np.ndarray
) -> datasets.MetaDataset:
  """Steps that took place, in order: leaves [M, T, ...], valid [M, T]."""
  size = valid.sum(axis=1).astype(np.int32)
  order = np.argsort(~valid, axis=1, kind='stable')[:, :size.max()]
  rows = np.arange(len(size))[:, None]
  transitions = jax.tree.map(lambda x: np.asarray(x)[rows, order], transitions)
  return datasets.MetaDataset(
      transitions=transitions, size=size, context=None, context_size=None,
      tasks=jax.tree.map(np.asarray, setup.train_tasks),
      episode_return=episode_returns(
          transitions, size, setup.family.spec.episode_length))


def _train_behaviour(setup: Setup):
  """PEARL, and a slice of its replay; returns (evaluator, states [1])."""
  config = setup.config.collect
  algorithm = setup.algorithm('pearl', config.behaviour)
  seeds = behaviour_seeds(setup)
  visited = _behaviour_visits(setup, seeds)
  _check_slices(setup, visited)
  fresh = setup.checkpointer('collect', seeds).latest_step() is None
  progress = _behaviour_start(setup, algorithm, seeds, fresh)
  updater = stages.make_updater(
      setup,
      lambda axis: setup.algorithm('pearl', config.behaviour, axis).online,
      seeds, setup.config.chunk, shared_replay=False)
  evaluator = evaluators.Evaluator(setup, algorithm, seeds)
  last = config.iterations - 1
  every = max(1, config.iterations // 10)
  progress = stages.run_stage(
      setup, 'collect', progress, updater,
      show=('eval/test/self_context/final_return',),
      label='pearl', iterations=config.iterations,
      gather=stages.gatherer(
          setup, algorithm, seeds, seeds.mine(visited), config.gather),
      evaluate=lambda state, replay: evaluator.curve(state, None),
      evaluate_due=lambda iteration, updates: updates == updater.total and (
          iteration % every == every - 1 or iteration == last))
  data = _cut(setup, jax.tree.map(lambda x: np.asarray(x[0]), progress.replay))
  _save(setup, data, 'pearl')
  return evaluator, progress.state


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


def _behaviour_visits(setup, seeds):
  config = setup.config.collect
  return schedule.visits(
      seeds.all_keys, config.iterations, config.gather,
      setup.config.family.num_train)


def behaviour_sizes(setup: Setup, seeds: schedule.Seeds) -> schedule.Sizes:
  """Capacities of the behaviour policy's replay."""
  config, spec = setup.config.collect, setup.family.spec
  start = schedule.longest(spec, config.initial_steps)
  return schedule.sizes(
      spec, config.gather, _behaviour_visits(setup, seeds),
      setup.config.family.num_train, start, start, False)


def _behaviour_start(setup, algorithm, seeds, fresh):
  """An untrained behaviour policy and, if fresh, its initial data."""
  config = setup.config.collect
  num_train = setup.config.family.num_train
  size = behaviour_sizes(setup, seeds)
  example = gathering.example_transition(setup.family, setup.train_tasks)
  states = stages.init_states(algorithm, seeds)

  replay = stages.new_replay(setup, seeds, lambda: Replay(
      buffers.empty(example, num_train, size.rl),
      buffers.empty(example, num_train, size.encoder)))
  if not fresh:
    return loop.start(states, replay)
  initial = dataclasses.replace(  # in every task, under the prior
      config.gather, prior_steps=config.initial_steps, posterior_steps=0)
  everywhere = np.broadcast_to(
      np.arange(num_train), (seeds.keys.shape[0], num_train))
  replay, _ = stages.make_gather(setup, algorithm, seeds, initial)(
      states, replay, everywhere, seeds.streams('initial'))
  return loop.start(states, replay)


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


def num_diverged(data: datasets.MetaDataset) -> int:
  """How many rows hold a step that blew up, those for the encoder included.

  A step that is in both parts counts twice.
  """
  total = 0
  for part, size in ((data.transitions, data.size),
                     (data.context, data.context_size)):
    if part is not None and 'diverged' in part.extras:
      flags = np.asarray(part.extras['diverged'])
      held = np.arange(flags.shape[1]) < np.asarray(size)[:, None]
      total += np.count_nonzero(flags[held])
  return total


def _score_references(setup, evaluator, state):
  """Random and behaviour policies under the meta-test protocol."""
  config = setup.config.evaluation
  family = setup.family
  policy = rollout.uniform_policy(family.spec.action_size)
  layout = setup.seeds.layout

  def score(key):
    done = evaluation.meta_test(
        family, policy, (), setup.test_tasks, key, config.num_repeats,
        config.num_steps, config.num_prior_episodes, layout.axis_name)
    return done.returns, jnp.sum(done.transitions.extras['diverged'])

  returns, diverged = layout.all_seeds(
      layout.compile(score, (0,))(setup.seeds.streams('evaluation')))
  arrays = {'random_test_returns': returns, 'random_diverged': diverged}
  data = load_dataset(setup)
  arrays['behaviour_data_returns'] = data.episode_return
  if 'diverged' in data.transitions.extras:
    arrays['dataset_diverged'] = np.array([num_diverged(data)])
  if evaluator is not None:
    scores, _ = evaluator.full(state, None)
    arrays['behaviour_test_returns'] = scores['test_self_returns']
    arrays['behaviour_diverged'] = scores['diverged']
  processes.on_main(lambda: write_arrays(
      setup.workdir / 'evaluations' / 'collect.npz', arrays))
