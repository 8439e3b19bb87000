"""How much memory each phase of a run will keep, before it starts.

Capacities are a function of the configuration (`data/capacity.py`), so this
is known to the byte; nothing is allocated here.
"""

from collections.abc import Iterator
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from offmeta import limits, processes, rollout
from offmeta.collection import phase as collecting, single_task
from offmeta.collection.sources import (
  pearl as collect_pearl,
  sac as collect_sac,
)
from offmeta.data import capacity, prepare
from offmeta.phases import finetune as finetuning
from offmeta.training import (
  config as configs,
  gather as gathering,
  gatherers,
  memory,
  seeds as seeds_lib,
  streaming,
  visits as visits_lib,
)
from offmeta.training.config import ConfigError
from offmeta.training.setup import Setup
from offmeta.types import (
  Algorithm,
  DataSpec,
  LearnerState,
  Loop,
  Rollouts,
  Transition,
  Visits,
)

_ADVICE = (
  "Keep the replay in the host's memory with --replay=host, run fewer"
  ' --seeds at a time (--config.first_seed continues), or shorten the phase'
  ' (iterations, gather.*_steps); devices that share tasks hold a copy each.'
)

_PASSING_ADVICE = (
  'Make batches (num_tasks, context_size, query_size, batch_size), contexts'
  ' (gather.context_size, label_context_size, finetune.context_size) or'
  ' evaluations (evaluation.num_repeats, num_steps, num_train_tasks;'
  ' num_episodes) smaller, or run fewer --seeds at a time.'
)

_ROLLOUT_ADVICE = (
  'Take fewer environments or steps per iteration (num_envs, num_steps), or'
  ' run fewer --seeds at a time (--config.first_seed continues).'
)

_SAC_ADVICE = (
  'Shorten the training histories (config.collect.specialists.env_steps), or'
  ' take fewer tasks (config.family): these replays stay on the devices.'
)


class _Phase(NamedTuple):
  """A phase still to run.

  Attributes:
    name: for people.
    seeds: its learners.
    demands: what stays in memory.
    on_host: whether all that stays in the host's memory.
    passing: what comes and goes, one at a time; the largest parts of it.
    advice: what to change if it does not fit.
  """

  name: str
  seeds: seeds_lib.Seeds
  demands: list[memory.Demand]
  on_host: bool
  passing: list[memory.Demand]
  advice: str = _ADVICE


def _example(setup: Setup, extras: bool) -> Transition:
  # Tracing an episode of a simulator takes half a second.
  example = setup.once(
    'example transition',
    lambda: jax.eval_shape(
      lambda: gathering.example_transition(setup.family, setup.train_tasks)
    ),
  )
  return example if extras else example._replace(extras={})


def _replay(
  num_tasks: int,
  example: Transition,
  sizes: capacity.Sizes,
  num_seeds: int,
  one_buffer: bool,
  table: int,
  whose: str = '',
) -> list[memory.Demand]:
  """Both buffers, or the one that serves both roles."""
  parts = [(f'replay{whose}', sizes.query)]
  if not one_buffer:
    parts.append((f'replay for contexts{whose}', sizes.context))
  return [
    memory.replay_demand(example, num_tasks, rows, num_seeds, what, table)
    for what, rows in parts
  ]


def _planned(
  setup: Setup, spec: DataSpec, rows: tuple[int, int], num_tasks: int
) -> prepare.Planned:
  """What becomes of logged data."""
  return prepare.planned(
    _example(setup, True), spec, setup.family.spec, num_tasks, rows
  )


def _dataset(
  setup: Setup,
  spec: DataSpec,
  rows: tuple[int, int],
  num_tasks: int,
  what: str,
) -> memory.Demand:
  """Logged data as `prepare.replay` makes them; every device has a copy.

  On the host they stay memory maps unless rows are picked or changed.

  Args:
    setup: of the run.
    spec: how they are prepared.
    rows: per task, query and context data.
    num_tasks: M.
    what: name of the demand.
  """
  layout = setup.seeds.layout
  places = len(layout.local_devices)
  if setup.runtime.replay == 'host' or layout.axis_name:
    places = 1  # all that devices share tasks of is multiplied later
  planned = _planned(setup, spec, rows, num_tasks)
  held = planned.loaded if setup.runtime.replay == 'host' else planned.replay
  query, *_ = counts = [
    buffer.data.reward.shape[1] for buffer in planned.replay if buffer
  ]
  size = memory.nbytes(held.query.data) // max(num_tasks * query, 1)
  return memory.Demand(
    what,
    places * memory.nbytes(held),
    f'{memory.times(places, "place")} x {num_tasks:,} tasks x {sum(counts):,}'
    f' transitions x {size:,} B',
  )


def _datasets(
  setup: Setup, spec: DataSpec, rows: tuple[int, int]
) -> list[memory.Demand]:
  """Of the training tasks and, if there are any, of the held-out ones."""
  family = setup.config.family
  demands = [_dataset(setup, spec, rows, family.num_train, 'dataset')]
  held_out = collecting.test_dataset_sizes(setup)
  if held_out:
    demands.append(
      _dataset(
        setup,
        spec._replace(mix_rewards=False),
        held_out,
        family.num_test,
        'dataset of held-out tasks',
      )
    )
  return demands


def _annotations(
  setup: Setup, algorithm: Algorithm, rows: int, num_seeds: int
) -> list[memory.Demand]:
  """The most that a stage adds to the queries of every seed."""
  planned = _planned(setup, algorithm.data, (1, 0), 1)
  log = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype),
    planned.replay.query.data,
  )
  state = jax.eval_shape(algorithm.init, jax.random.key(0))
  sizes = [
    memory.nbytes(jax.eval_shape(stage.annotate, state, log, jnp.ones(1)))
    for loop in algorithm.in_phase('offline')
    for stage in loop.stages
    if stage.annotate is not None
  ]
  if not sizes:
    return []
  num_tasks = setup.config.family.num_train
  return [
    memory.Demand(
      'annotations',
      num_seeds * num_tasks * rows * max(sizes),
      f'{memory.times(num_seeds, "seed")} x {num_tasks:,} tasks x {rows:,}'
      f' transitions x {max(sizes):,} B',
    )
  ]


def _rollouts(
  setup: Setup, algorithm: Algorithm, spec: Rollouts, num_seeds: int
) -> memory.Demand:
  """Environments and the latest rollouts."""
  start, _ = gatherers.rollout_functions(setup, algorithm, spec)
  fresh = jax.eval_shape(
    lambda key: start(algorithm.init(key), key), jax.random.key(0)
  )
  size = memory.nbytes(fresh)
  return memory.Demand(
    'rollouts',
    num_seeds * size,
    f'{memory.times(num_seeds, "seed")} x {spec.num_envs:,} environments x'
    f' {spec.num_steps:,} steps: {size:,} B each',
  )


def _learners(
  algorithm: Algorithm,
  number: int,
  unit: str = 'seed',
  loops: tuple[Loop, ...] = (),
) -> memory.Demand:
  """States, the largest that they are in any of the loops that are begun."""
  state: LearnerState = jax.eval_shape(algorithm.init, jax.random.key(0))
  size = max(
    [memory.nbytes(state)]
    + [memory.nbytes(jax.eval_shape(loop.begin, state)) for loop in loops]
  )
  return memory.Demand(
    'learners', number * size, f'{memory.times(number, unit)} x {size:,} B'
  )


def _groups(settings: Any) -> Iterator[Any]:
  """A dataclass of settings, and those in it."""
  yield settings
  for field in dataclasses.fields(settings):
    value = getattr(settings, field.name)
    if dataclasses.is_dataclass(value):
      yield from _groups(value)


def _batches(setup: Setup, settings: Any, number: int) -> memory.Demand:
  """The largest batch of an algorithm, at least; by the names of settings."""
  size = memory.nbytes(_example(setup, True))

  def rows(group):
    get = lambda name: getattr(group, name, 0)
    whole = get('num_sequences') * setup.family.spec.episode_length
    context = max(get('context_size'), get('sequence_size'))
    loose = context + get('query_size') + get('batch_size')
    return getattr(group, 'num_tasks', 1) * (loose + whole)

  most = max(map(rows, _groups(settings)))
  return memory.Demand(
    'a batch',
    number * most * size,
    f'{memory.times(number, "learner")} x {most:,} transitions x {size:,} B',
  )


def _contexts(setup: Setup, visits: Visits, number: int) -> memory.Demand:
  """What a round of visits looks at, for its policy and for its labels."""
  rows = visits.context_size
  if limits.chosen(visits, 'rewards', 'decoder'):
    rows += visits.label_context_size
  size = memory.nbytes(_example(setup, False))
  return memory.Demand(
    'contexts of visits',
    number * visits.tasks_per_iteration * rows * size,
    f'{memory.times(number, "seed")} x {visits.tasks_per_iteration:,} tasks x'
    f' {rows:,} transitions x {size:,} B',
  )


def _scores(setup: Setup, episodes: int, number: int) -> memory.Demand:
  """Rewards of the episodes that every learner is scored in, side by side."""
  steps = setup.family.spec.episode_length
  size = memory.nbytes(_example(setup, False).reward)
  return memory.Demand(
    'scored episodes',
    number * episodes * steps * size,
    f'{memory.times(number, "learner")} x {episodes:,} episodes x'
    f' {steps:,} rewards x {size:,} B',
  )


def _evaluation(
  setup: Setup, number: int, all_tasks: bool = False
) -> memory.Demand:
  """All steps of a meta-test, and the offline contexts.

  Args:
    setup: of the run.
    number: of seeds.
    all_tasks: whether all training tasks are scored, as in the phase 'test'.
  """
  config, family = setup.config.evaluation, setup.config.family
  tasks = family.num_train
  if not all_tasks:
    tasks = min(config.num_train_tasks, tasks)
  tasks += family.num_test
  steps = rollout.max_episodes(setup.family, config.num_steps)
  steps = steps * setup.family.spec.episode_length + config.context_size
  size = memory.nbytes(_example(setup, True))
  return memory.Demand(
    'an evaluation',
    number * tasks * config.num_repeats * steps * size,
    f'{memory.times(number, "seed")} x {tasks:,} tasks x'
    f' {config.num_repeats:,} repetitions x {steps:,} transitions x {size:,} B',
  )


def _updates(loop: Loop) -> int:
  """Of one iteration."""
  return sum(stage.num_steps for stage in loop.stages)


def _check_counter(name: str, loop: Loop, iterations: int, done: int = 0):
  """Refuses more updates than a learner's counter holds.

  Args:
    name: of the phase.
    loop: whose stages are run in each iteration.
    iterations: how many.
    done: updates before.

  Raises:
    ConfigError: says how many there would be.
  """
  each = _updates(loop)
  total = done + iterations * each
  if total > limits.MOST:
    raise ConfigError(
      f'phase {name}: {iterations:,} iterations of {each:,} updates; a learner'
      f' counts up to {limits.MOST:,} in all. Make fewer'
    )


def _script(setup: Setup) -> _Phase:
  """Logs of a scripted policy, which are joined in the host's memory."""
  family, spec = setup.config.family, setup.family.spec
  rows = setup.config.collect.script_episodes * spec.episode_length
  log = memory.replay_demand(
    _example(setup, True),
    family.num_train + family.num_test,
    rows,
    1,
    'logs',
  )
  return _Phase(
    'collect',
    setup.seeds,
    [log],
    True,
    [],
    'Make fewer episodes (config.collect.script_episodes) or take fewer tasks.',
  )


def _finetune(setup: Setup) -> _Phase:
  """Learners of all seeds and held-out tasks, with a replay each."""
  algorithm, number = setup.learner(), finetuning.learners(setup)
  config = setup.config.finetune
  for loop in algorithm.in_phase('finetune'):
    _check_counter('finetune', loop, config.iterations)
  example = jax.eval_shape(lambda: finetuning.example_row(setup, algorithm))
  steps = rollout.max_episodes(setup.family, config.context_size)
  steps *= setup.family.spec.episode_length
  return _Phase(
    'finetune',
    finetuning.one_learner_per_task(setup).seeds,
    [
      memory.replay_demand(
        example, 1, finetuning.rows(setup), number, 'replay', unit='learner'
      ),
      _learners(algorithm, number, 'learner'),
    ],
    False,  # these replays stay on the devices
    [
      _batches(setup, setup.config.settings, number),
      _scores(setup, config.num_episodes, number),
      memory.replay_demand(
        example, 1, steps, number, 'random transitions', unit='learner'
      ),
    ],
    'Shorten the phase (config.finetune.iterations, burn_in) or run fewer'
    ' --seeds at a time.',
  )


def _collect(setup: Setup) -> Iterator[_Phase]:
  """The phase `collect`, if it makes anything."""
  config, family = setup.config.collect, setup.config.family
  if not setup.logged or config.dataset:
    return
  if config.source == 'script':
    yield _script(setup)
    return
  example = _example(setup, True)
  if config.source == 'sac':
    seeds = collect_sac.learners(setup).seeds
    number = len(seeds.layout.seeds)
    capacity = single_task.rows(setup.family.spec, config.specialists)
    sac = setup.algorithm('sac', config.specialists.sac)
    plan = single_task.rounds(config.specialists)
    _check_counter('collect', sac.loop('online'), plan.iterations)
    yield _Phase(
      'collect',
      seeds,
      [
        memory.replay_demand(
          example, 1, capacity, number, 'replay', unit='learner'
        ),
        _learners(sac, number, 'learner'),
      ],
      False,
      [
        _batches(setup, config.specialists.sac, number),
        _scores(setup, config.specialists.num_episodes, number),
      ],
      _SAC_ADVICE,
    )
    return
  seeds = collect_pearl.behaviour_seeds(setup)
  pearl = setup.algorithm('pearl', config.behaviour)
  _check_counter('collect', pearl.loop('online'), config.iterations)
  yield _Phase(
    'collect',
    seeds,
    [
      *_replay(
        family.num_train,
        example,
        collect_pearl.sizes(setup, seeds),
        1,
        False,
        0,
      ),
      *_replay(
        family.num_test,
        example,
        collect_pearl.visit_sizes(setup),
        1,
        False,
        0,
        ' of held-out tasks',
      ),
      _learners(pearl, 1),
    ],
    setup.runtime.replay == 'host',
    [
      _batches(setup, config.behaviour, 1),
      _contexts(setup, config.gather, 1),
      _evaluation(setup, 1),
    ],
  )


def _phases(setup: Setup, phases: tuple[str, ...]) -> Iterator[_Phase]:
  """Phases still to run."""
  if 'collect' in phases and not setup.is_done('collect'):
    yield from _collect(setup)
  if {'offline', 'online'} & set(phases):
    yield from _training(setup, phases)
  if 'finetune' in phases and setup.config.finetune.iterations:
    if not setup.is_done('finetune'):
      yield _finetune(setup)


def _training(setup: Setup, phases: tuple[str, ...]) -> Iterator[_Phase]:
  """The phases `offline` and `online`."""
  config, on_host = setup.config, setup.runtime.replay == 'host'
  algorithm = setup.learner()
  data, start = [], (0, 0)
  if setup.logged:
    start = collecting.dataset_sizes(setup)
    data = _datasets(setup, algorithm.data, start)
  num_seeds = len(setup.seeds.layout.seeds)
  passing = [
    _batches(setup, config.settings, num_seeds),
    _evaluation(setup, num_seeds, 'test' in phases),
  ]
  offline = algorithm.in_phase('offline')
  done = all(setup.is_done(loop.name) for loop in offline)
  before = 0  # updates
  for loop in offline:
    _check_counter(loop.name, loop, loop.iterations or 0, before)
    before += (loop.iterations or 0) * _updates(loop)
  if 'offline' in phases and not done:
    yield _Phase(
      'offline',
      setup.seeds,
      [
        *data,
        *_annotations(setup, algorithm, start[0], num_seeds),
        _learners(algorithm, num_seeds, loops=offline),
      ],
      on_host,
      passing,
    )
  if 'online' in phases:
    for name in config.online.variants:
      if setup.is_done(f'online/{name}'):
        continue
      changed = configs.variant(config, name)
      learner = setup.learner(config=changed)
      (loop,) = learner.in_phase('online')
      _check_counter(
        f'online/{name}',
        loop,
        changed.online.iterations
        if loop.iterations is None
        else loop.iterations,
        before,
      )
      if loop.gather is not None:
        yield _Phase(
          f'online/{name}',
          setup.seeds,
          [
            _rollouts(setup, learner, loop.gather, num_seeds),
            *data,
            _learners(learner, num_seeds, loops=(loop,)),
          ],
          False,
          passing,
          _ROLLOUT_ADVICE,
        )
        continue
      sizes = visits_lib.online_sizes(
        setup.family.spec, changed, setup.seeds, *start
      )
      yield _Phase(
        f'online/{name}',
        setup.seeds,
        [
          *_replay(
            config.family.num_train,
            _example(setup, False),
            sizes,
            num_seeds,
            changed.online.share_buffer,
            sizes.sequences,
          ),
          *data,
          _learners(learner, num_seeds, loops=(loop,)),
        ],
        on_host,
        [
          _batches(setup, changed.settings, num_seeds),
          _contexts(setup, changed.online.gather, num_seeds),
          *passing,
        ],
      )


def check(setup: Setup, phases: tuple[str, ...]) -> list[str]:
  """What the phases still to run will keep in memory, for people.

  Returns:
    One line per phase, and one with what is available.

  Raises:
    ConfigError: one would not fit; names the sizes and what to change.
    ProcessError: it would not fit in another process.
  """
  planned = list(_phases(setup, phases))  # asks the main process
  return processes.in_all(lambda: _fitting(planned))


def _fitting(planned: list[_Phase]) -> list[str]:
  """`check`, for the memory of this process."""
  lines, free = [], {}
  for name, seeds, demands, on_host, passing, advice in planned:
    devices = seeds.layout.local_devices
    if on_host:
      devices = [streaming.host()]
    elif seeds.layout.axis_name:  # every device has all of it
      demands = [
        demand._replace(nbytes=demand.nbytes * len(devices))
        for demand in demands
      ]
    available = memory.available_bytes(devices)
    try:
      memory.check(demands, available, advice)
      for demand in passing:
        memory.check([demand], available, _PASSING_ADVICE)
    except memory.MemoryBudgetError as error:
      raise ConfigError(f'phase {name}: {error}') from error
    total = memory.readable(sum(demand.nbytes for demand in demands))
    lines.append(f'memory, {name}: {total} ({demands[0].detail})')
    if available is not None:
      place = 'in the host' if on_host else 'on the devices in use'
      free[place] = memory.readable(available)
  return lines + [
    f'memory available {place}: {size}' for place, size in free.items()
  ]
