"""The smallest run that has every phase, and how two runs are compared."""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import dataclasses
import json
import os
import pathlib
import signal
from typing import Any
from unittest import mock

from absl import logging
import helpers
import jax
import ml_collections
import numpy as np
from orbax.checkpoint import v1 as ocp

from experiments.runs import configuration, jax_settings, launch
from offmeta.collection import single_task
from offmeta.phases import finetune
from offmeta.training import (
  config as configs,
  evaluator as evaluators,
  gatherers,
  setup as setups,
  stopping,
  updates,
)

PHASES = ('collect', 'offline', 'online', 'test')
STAGES = ('collect', 'offline', 'online/matched', 'online/oracle')

_WIDTH = (8,)
_NETS = {
  'latent_size': 2,
  'encoder_hidden': _WIDTH,
  'decoder_hidden': _WIDTH,
  'critic_hidden': _WIDTH,
  'actor_hidden': _WIDTH,
}
_OFFLINE = {
  'num_updates': 6,
  'num_tasks': 2,
  'query_size': 4,
  'context_size': 8,
}
_ONLINE = {**_OFFLINE, 'num_updates': 4, 'task_repeat': 1}
_GATHER = {
  'tasks_per_iteration': 2,
  'prior_steps': 40,
  'posterior_steps': 40,
  'context_size': 8,
  'label_context_size': 8,
}
_MATCHED = {'train_context_online': True, 'online': {'context': 'episodes'}}

# Steps per stage: collect 2 x 4, offline 6, online 2 x 4; two per chunk.
CONFIG = {
  'num_seeds': 2,
  'chunk': 2,
  'family': {'num_train': 3, 'num_test': 2},
  'collect': {
    'iterations': 2,
    'initial_steps': 40,
    'log_size': 40,
    'gather': _GATHER,
    'behaviour': {**_NETS, 'value_hidden': _WIDTH, 'online': _ONLINE},
  },
  'smac': {
    **_NETS,
    'offline': _OFFLINE,
    'online': {**_ONLINE, 'sequence_size': 40},
  },
  'online': {
    'iterations': 2,
    'share_buffer': True,
    'gather': _GATHER,
    'headline': 'matched',
    'oracle': 'oracle',
    'variants': {
      'matched': {'description': 'recipe', 'smac': _MATCHED},
      'oracle': {
        'description': 'with true rewards',
        'smac': _MATCHED,
        'online': {'gather': {'rewards': 'true'}},
      },
    },
  },
  'evaluation': {
    'num_repeats': 2,
    'num_steps': 40,
    'context_size': 8,
    'num_train_tasks': 2,
    'every_updates': 4,
  },
}


def make_config(changes: Mapping = {}) -> configs.ExperimentConfig:
  """The tiny configuration with nested `changes`."""
  config = configs.from_dict(changes, configs.from_dict(CONFIG))
  configs.validate(config)
  return config


def make_setup(
  workdir: str | os.PathLike[str],
  changes: Mapping = {},
  stop: stopping.StopRequest | None = None,
  runtime: Mapping = {},
) -> setups.Setup:
  """A quiet setup that saves a checkpoint after every chunk."""
  return setups.make_setup(
    make_config(changes),
    workdir,
    stop,
    setups.Runtime(
      **{
        'checkpoint_every_s': -1.0,
        'keep_checkpoints': True,
        'quiet': True,
        **runtime,
      }
    ),
  )


@contextlib.contextmanager
def shared_programs() -> Iterator[None]:
  """Lets runs of one configuration share their compiled programs.

  Tracing takes nearly all the time of a tiny run. What is shared holds no
  state of a run, only programs, tasks and the keys of the seeds.
  """
  evaluator, gatherer = evaluators.Evaluator, gatherers.gatherer
  own_gatherer, updater = gatherers.own_gatherer, updates.Updater
  own_evaluator, scorer = single_task.Evaluator, finetune._scorer

  def once(key, make, *args, **kw):
    if key not in _PROGRAMS:
      _PROGRAMS[key] = make(*args, **kw)
    return _PROGRAMS[key]

  def about(setup, seeds):
    family = setup.family
    return (
      configs.config_hash(setup.config),
      seeds.layout,
      setup.runtime.replay,
      type(family).__name__,
      str(vars(family).get('_value')),
      str(family.spec),
      *(
        _bytes(tree)
        for tree in (seeds.keys, setup.train_tasks, setup.test_tasks)
      ),
    )

  def shared_updater(make_loop, seeds, chunk, *args, **kw):
    # The configuration is not known here; the closure holds it.
    cells = [cell.cell_contents for cell in make_loop.__closure__]
    setup = next(c for c in cells if isinstance(c, setups.Setup))
    others = [
      repr(c) for c in cells if dataclasses.is_dataclass(c) and c is not setup
    ]
    loop = make_loop(None)
    stages = tuple((s.name, s.num_steps, s.batch) for s in loop.stages)
    found = once(
      ('updater', *about(setup, seeds), loop.name, stages, *others),
      updater,
      make_loop,
      seeds,
      chunk,
      *args,
      **kw,
    )
    found._extras = (-1, {})  # annotations are of one run
    return found

  def shared_own_gatherer(setup, algorithm, config, rounds):
    state = jax.eval_shape(algorithm.init, jax.random.key(0))
    key = about(setup, setup.seeds), str(state), config, str(rounds(1))
    return once(
      ('own gatherer', *key), own_gatherer, setup, algorithm, config, rounds
    )

  with (
    mock.patch.object(
      evaluators,
      'Evaluator',
      lambda setup, algorithm, seeds: once(
        ('evaluator', *about(setup, seeds)), evaluator, setup, algorithm, seeds
      ),
    ),
    mock.patch.object(
      gatherers,
      'gatherer',
      lambda setup, algorithm, seeds, visited, config: once(
        ('gatherer', *about(setup, seeds), config),
        gatherer,
        setup,
        algorithm,
        seeds,
        visited,
        config,
      ),
    ),
    mock.patch.object(gatherers, 'own_gatherer', shared_own_gatherer),
    mock.patch.object(updates, 'Updater', shared_updater),
    mock.patch.object(
      single_task,
      'Evaluator',
      lambda setup, config: once(
        ('own evaluator', *about(setup, setup.seeds), repr(config)),
        own_evaluator,
        setup,
        config,
      ),
    ),
    mock.patch.object(
      finetune,
      '_scorer',
      lambda own, algorithm: once(
        ('scorer', *about(own, own.seeds)), scorer, own, algorithm
      ),
    ),
  ):
    yield


def _bytes(tree: Any) -> tuple[bytes, ...]:
  """Keys, or a tree of arrays, to be compared."""
  return tuple(helpers.numbers(x).tobytes() for x in jax.tree.leaves(tree))


_PROGRAMS: dict[tuple, Any] = {}


@contextlib.contextmanager
def command() -> Iterator[Callable[..., int]]:
  """`experiments.run` with the tiny configuration, in this process.

  Yields:
    (workdir, phases, overrides, profile, checkpoint_every_s, argv) -> exit
    status; all but the first two have defaults.
  """

  def run(
    workdir,
    names,
    overrides={},
    profile='smoke',
    checkpoint_every_s=-1.0,
    argv=('x',),
  ):
    values = ml_collections.ConfigDict(
      configs.to_dict(configs.from_dict(CONFIG))
    )
    values.profiles = ml_collections.ConfigDict({'smoke': {}})
    flag = lambda flag: (values, dict(overrides))
    with mock.patch.object(configuration, 'from_flag', flag):
      return launch.run(
        None,
        profile,
        str(workdir),
        tuple(names),
        {},
        {'checkpoint_every_s': checkpoint_every_s, 'keep_checkpoints': True},
        None,
        list(argv),
      )

  handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
  verbosity = logging.get_verbosity()
  with (
    mock.patch.object(configuration, 'config_file', lambda flag: ''),
    mock.patch.object(jax_settings, 'configure', lambda: None),
  ):
    yield run
  for number, handler in handlers.items():
    signal.signal(number, handler)
  logging.set_verbosity(verbosity)


class StopAt(stopping.StopRequest):
  """Asks to stop once a stage has written the metrics of a step."""

  def __init__(self, stage: pathlib.Path, step: int):
    self._metrics = stage / 'metrics.jsonl'
    self._step = step

  @property
  def requested(self) -> bool:
    """Whether that has happened."""
    rows = metrics(self._metrics) if self._metrics.exists() else []
    return any(row['step'] >= self._step for row in rows)


def metrics(path: pathlib.Path) -> list[dict]:
  """The rows of a metrics file without wall times."""
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  return [{k: v for k, v in row.items() if k != 'wall_time_s'} for row in rows]


def checkpoint_steps(workdir: pathlib.Path, stage: str) -> list[int]:
  """Which checkpoints of a stage there are."""
  folder = workdir / stage / 'checkpoints'
  return sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal())


def saved(checkpoint: pathlib.Path) -> dict[str, np.ndarray]:
  """The arrays of one checkpoint by their names, whatever wrote it."""
  path = checkpoint / 'state'
  return ocp.load(
    path,
    {
      name: np.empty(leaf.shape, leaf.dtype)
      for name, leaf in ocp.metadata(path).metadata.items()
    },
  )


def last_progress(workdir: pathlib.Path, stage: str) -> dict[str, np.ndarray]:
  """Learner state, replay and counters at the last checkpoint."""
  step = checkpoint_steps(workdir, stage)[-1]
  return saved(workdir / stage / 'checkpoints' / str(step))


def results(
  workdir: pathlib.Path, stages: tuple[str, ...] = STAGES
) -> dict[str, Any]:
  """All that a run computed: arrays and metric rows by name."""
  found: dict[str, Any] = {}

  def add(prefix, arrays):
    found.update({f'{prefix}:{k}': v for k, v in arrays.items()})

  for stage in stages:
    add(f'{stage}/final', saved(workdir / stage / 'final' / '0'))
    add(f'{stage}/last', last_progress(workdir, stage))
    found[f'{stage}/metrics'] = metrics(workdir / stage / 'metrics.jsonl')
  for path in (workdir / 'dataset').glob('*.npy'):
    found[f'dataset/{path.name}'] = np.load(path)
  for path in (workdir / 'evaluations').glob('*.npz'):
    add(f'evaluations/{path.stem}', dict(np.load(path)))
  return found


def differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
  """Names whose values are not the same bit for bit, or in one only."""

  def same(x, y):
    if not isinstance(x, np.ndarray):
      return x == y
    return (x.shape, x.dtype, x.tobytes()) == (y.shape, y.dtype, y.tobytes())

  assert a and b
  return sorted(
    name
    for name in a.keys() | b.keys()
    if name not in a or name not in b or not same(a[name], b[name])
  )
