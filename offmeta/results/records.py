"""Reads what a run left in its workdir, and says clearly what is wrong.

Axis letters: S seeds, M held-out tasks, N training tasks, R repetitions,
E episodes, T time, Z latent, P points (posterior draws), K evaluations.

Layout (all but `run.json` and `evaluations/offline.npz` may be missing, and
that too where nothing is trained offline):

  run.json                       what ran: config, variants, versions
  timing.json                    {phase: seconds}
  <loop>/metrics.jsonl           loop: collect, offline, online/<variant>,
                                 finetune, or any other
  evaluations/<point>.npz        point: the same, with - for /; of the four, and
                                 of other loops of the offline phase
"""

from collections.abc import Mapping
import dataclasses
import logging
import math
import operator
import pathlib
from typing import Any, NamedTuple
import zipfile
import zlib

import numpy as np

from offmeta import disk

# Array name -> axes. Axes of one letter must agree wherever returns are
# compared (S, M, N, K); lower-case axes are free, digits are sizes.
ARRAYS = {
  'test_self_returns': 'S M r e',
  'test_prior_returns': 'S M r e',
  'test_offline_returns': 'S M r e',
  'test_uniform_returns': 'S M r e',
  'train_self_returns': 'S N r e',
  'train_offline_returns': 'S N r e',
  'random_test_returns': 'S M r e',
  'behaviour_test_returns': 's M r e',
  'behaviour_data_returns': 'n',
  'specialist_train_returns': 'N r',
  'specialist_test_returns': 'M r',
  'finetune_returns': 'S M K',
  'finetune_env_steps': 'S M K',
  'kl_offline': 'S n',
  'kl_self': 'S n',
  'normalized_shift': 'S',
  'posterior_offline_mean': 'S n p z',
  'posterior_self_mean': 'S n p z',
  'diverged': 'S',
  'dataset_diverged': '1',
  'random_diverged': 'S',
  'behaviour_diverged': 's',
  'specialist_diverged': '',
  'train_task_color': 'n',
  'trajectories': 'm e t 2',
  'trajectory_goals': 'm 2',
}
MOST_PATHS = 64  # held-out tasks, the first, whose paths a run keeps
# The beginning of the names of what an algorithm says of itself: [S, ...] with
# at most two more axes.
DIAGNOSE = 'diagnose/'
_AXIS_NAMES = {
  'S': 'seeds',
  'M': 'held-out tasks',
  'N': 'training tasks',
  'K': 'evaluations',
}
# What the points of a kind must hold.
_REQUIRED = {
  'offline': ('test_self_returns',),
  'online': ('test_self_returns',),
  'finetune': ('finetune_returns', 'finetune_env_steps'),
}


def _axes(name: str, array: np.ndarray) -> list[str]:
  """The axes of a known array."""
  if name.startswith(DIAGNOSE):
    return ['S', *'ab'[: max(array.ndim - 1, 0)]]
  return ARRAYS[name].split()


def diagnoses(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Those of a point's arrays that an algorithm says of itself, by name."""
  return {
    name.removeprefix(DIAGNOSE): array
    for name, array in arrays.items()
    if name.startswith(DIAGNOSE)
  }


class Series(NamedTuple):
  """One metric over training.

  Attributes:
    step: [K] number of updates, increasing.
    values: [K, S]; [K, 1] for a metric logged as one number.
  """

  step: np.ndarray
  values: np.ndarray


@dataclasses.dataclass(frozen=True)
class Run:
  """The contents of run.json; '' for roles where there is no online phase."""

  num_seeds: int
  headline_variant: str
  oracle_variant: str | None = None
  variants: Mapping[str, str] = dataclasses.field(default_factory=dict)
  config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  config_hash: str = ''
  command: str = ''
  profile: str = ''
  family: str = ''
  algorithm: str = ''
  versions: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  machine: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Record:
  """Everything a report is made of.

  Attributes:
    workdir: where it was read.
    run: contents of run.json.
    timing: phase -> seconds; empty if there is no timing.json.
    evaluations: point -> array name -> array.
    metrics: loop -> metric name -> Series.
  """

  workdir: pathlib.Path
  run: Run
  timing: Mapping[str, float]
  evaluations: Mapping[str, Mapping[str, np.ndarray]]
  metrics: Mapping[str, Mapping[str, Series]]

  def array(self, point: str, name: str) -> np.ndarray | None:
    """One evaluation array, None if the run does not have it."""
    return self.evaluations.get(point, {}).get(name)

  def online(self, variant: str | None, name: str) -> np.ndarray | None:
    """The same of one online variant."""
    return self.array(f'online-{variant}', name)

  @property
  def other_variants(self) -> list[str]:
    """Variants that are neither the headline nor the oracle."""
    special = (self.run.headline_variant, self.run.oracle_variant)
    return [name for name in self.run.variants if name not in special]


def load(workdir: str | pathlib.Path, tested: bool = True) -> Record:
  """Reads a workdir.

  Args:
    workdir: what `experiments.run --workdir` was given.
    tested: whether it must have been tested: its offline phase, if it has one.

  Raises:
    ValueError: with what is wrong, where, and what to do.
  """
  workdir = pathlib.Path(workdir)
  run = load_run(workdir / 'run.json')
  known = [
    'collect',
    'offline',
    *(f'online/{n}' for n in run.variants),
    'finetune',
  ]
  loops = _loops(workdir)
  # Offline loops beside the last are scored, too.
  scored = [*known, *(x for x in loops if x.startswith('offline/'))]
  evaluations, metrics = {}, {}
  for point in (name.replace('/', '-') for name in scored):
    path = workdir / 'evaluations' / f'{point}.npz'
    if path.exists():
      evaluations[point] = load_evaluation(path)
    elif point == 'offline' and tested and _has_offline(workdir, run):
      raise ValueError(
        f'{path} is missing: the offline phase has not been tested; run '
        'again with --phases=collect,offline,test,report'
      )
  if tested and not any(
    p.startswith(('offline', 'online')) for p in evaluations
  ):
    raise ValueError(
      f'{workdir / "evaluations"}: nothing that was trained has been tested;'
      ' run again with --phases=collect,online,test,report'
    )
  _check_axes(evaluations, run.num_seeds, workdir / 'evaluations')
  for name in dict.fromkeys([*known, *loops]):
    path = workdir / name / 'metrics.jsonl'
    if path.exists():
      metrics[name] = load_metrics(path)
  return Record(
    workdir, run, load_timing(workdir / 'timing.json'), evaluations, metrics
  )


def _loops(workdir: pathlib.Path) -> list[str]:
  """Folders in which anything was logged: 'offline', 'online/NAME', ..."""
  return sorted(
    path.parent.relative_to(workdir).as_posix()
    for pattern in ('*/metrics.jsonl', '*/*/metrics.jsonl')
    for path in workdir.glob(pattern)
  )


def _has_offline(workdir: pathlib.Path, run: Run) -> bool:
  """Whether the run trains offline: on-policy ones only have variants."""
  return not run.variants or (workdir / 'offline').exists()


_TEXT, _GROUP = (str, 'a text'), (Mapping, 'a group')
_RUN_TYPES = {
  'headline_variant': _TEXT,
  'oracle_variant': (str | None, 'a text or null'),
  'variants': _GROUP,
  'config': _GROUP,
  'config_hash': _TEXT,
  'command': _TEXT,
  'profile': _TEXT,
  'family': _TEXT,
  'algorithm': _TEXT,
  'versions': _GROUP,
  'machine': _GROUP,
}


def load_run(path: pathlib.Path) -> Run:
  """Reads run.json; unknown keys are ignored.

  Raises:
    ValueError: it is missing, cannot be read, or a field is not what `Run`
      says.
  """
  if not path.exists():
    raise ValueError(
      f'{path} is missing: this is not the workdir of a run; pass the '
      '--workdir that experiments.run was given'
    )
  fields = _load_json(path)
  known = {field.name for field in dataclasses.fields(Run)}
  try:
    run = Run(**{key: fields[key] for key in known & fields.keys()})
  except TypeError as error:
    raise ValueError(
      f'{path} lacks num_seeds or headline_variant; write it again by '
      f'running the same command ({error})'
    ) from error
  if type(run.num_seeds) is not int or run.num_seeds < 1:
    raise ValueError(
      f'{path}: num_seeds must be a positive integer, got {run.num_seeds!r}'
    )
  for key in known - {'num_seeds'}:
    value, (kind, what) = getattr(run, key), _RUN_TYPES[key]
    if not isinstance(value, kind):
      raise ValueError(f'{path}: {key} must be {what}, got {value!r:.40}')
  if not all(isinstance(value, str) for value in run.variants.values()):
    raise ValueError(f'{path}: variants must map names to descriptions')
  for role in ('headline_variant', 'oracle_variant'):
    name = getattr(run, role)
    if name and name not in run.variants:
      raise ValueError(
        f'{path}: {role} {name!r} is not among the variants '
        f'{sorted(run.variants)}'
      )
  return run


def load_timing(path: pathlib.Path) -> dict[str, float]:
  """Reads timing.json; empty if it is missing.

  Raises:
    ValueError: it cannot be read, or has other values than finite numbers.
  """
  if not path.exists():
    return {}
  fields = _load_json(path)
  try:
    timing = {key: float(value) for key, value in fields.items()}
    for key, value in timing.items():
      if not math.isfinite(value):
        raise ValueError(f'{key} is {value}')
    return timing
  except (TypeError, ValueError, OverflowError) as error:
    raise ValueError(
      f'{path} must map phases to seconds ({error}); delete '
      'it, the report does without'
    ) from error


def load_evaluation(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Reads one evaluation point; checks names, ranks and dtypes.

  Args:
    path: evaluations/<point>.npz.

  Returns:
    The known arrays as float64; unknown names are ignored.
  """
  point = path.stem.split('-')[0]
  redo = 'delete it and run again with --phases=test,report'
  if point == 'finetune':
    redo = (
      'delete it and the folder finetune and run again with'
      ' --phases=finetune,report'
    )
  try:
    with (
      disk.open_regular(path) as file,
      np.load(file, allow_pickle=False) as archive,
    ):
      arrays = {
        name: archive[name]
        for name in archive.files
        if name in ARRAYS or name.startswith(DIAGNOSE)
      }
  except (
    OSError,
    EOFError,
    TypeError,  # a single array
    ValueError,
    KeyError,
    zipfile.BadZipFile,
    zlib.error,
  ) as error:
    raise ValueError(
      f'{path} cannot be read as plain arrays ({error}); {redo}'
    ) from error
  for name, array in arrays.items():
    axes = _axes(name, array)
    fits = (
      array.ndim == len(axes)
      and 0 not in array.shape
      and all(
        not axis.isdigit() or size == int(axis)
        for axis, size in zip(axes, array.shape)
      )
    )
    if not fits or array.dtype.kind not in 'fiu':
      raise ValueError(
        f'{path}: {name} must be numbers of shape [{", ".join(axes)}], got '
        f'{array.dtype} {list(array.shape)}; {redo}'
      )
    arrays[name] = array.astype(np.float64)
    if axes[-2:] == ['r', 'e']:
      _check_returns(path, name, arrays[name])
    elif axes[-1:] == ['K'] and not np.isfinite(array).all():
      raise ValueError(
        f'{path}: {name} is not finite for seed, task, evaluation'
        f' {np.argwhere(~np.isfinite(array))[0].tolist()}: training diverged;'
        f' {redo}'
      )
  for name in _REQUIRED.get(point, ()):
    if name not in arrays:
      raise ValueError(f'{path} has no array {name}; {redo}')
  return arrays


def load_metrics(path: pathlib.Path) -> dict[str, Series]:
  """Reads metrics.jsonl as one series per metric.

  A killed run leaves a truncated last line, and a resumed one repeats steps:
  the former is dropped, of the latter the last value counts. A broken line
  elsewhere is dropped with a warning.

  Args:
    path: <loop>/metrics.jsonl.

  Raises:
    ValueError: it cannot be read, or has metrics of two runs.
  """
  columns: dict[str, dict[int, np.ndarray]] = {}
  try:
    with disk.open_regular(path) as file:
      lines = file.read().decode(errors='replace').splitlines()
  except OSError as error:
    raise ValueError(
      f'{path}: cannot be read: {error.strerror or error}'
    ) from error
  for number, line in enumerate(lines, start=1):
    try:
      row = disk.parse_json(line)
      step = operator.index(row['step'])
      np.int64(step)  # Steps are an array later.
      values = {name: _vector(x) for name, x in dict(row['values']).items()}
    except (ValueError, TypeError, KeyError, OverflowError):
      if number < len(lines) and line.strip():
        logging.warning('%s:%d is not a metrics row; skipped', path, number)
      continue
    for name, value in values.items():
      columns.setdefault(name, {})[step] = value
  return {name: _series(path, name, rows) for name, rows in columns.items()}


def _vector(value: Any) -> np.ndarray:
  """A number or a list of numbers (null: NaN) as [S] or [1]."""
  array = np.atleast_1d(np.asarray(value, np.float64))
  if array.ndim != 1:
    raise ValueError('a metric is a number or a list of numbers')
  return array


def _series(
  path: pathlib.Path, name: str, rows: Mapping[int, np.ndarray]
) -> Series:
  """{step: [S]} as one series."""
  if len({value.size for value in rows.values()}) != 1:
    raise ValueError(
      f'{path}: metric {name} changes its number of seeds; the workdir holds '
      'two different runs, use a fresh one'
    )
  steps = sorted(rows)
  return Series(np.array(steps), np.stack([rows[step] for step in steps]))


def _load_json(path: pathlib.Path) -> dict[str, Any]:
  """A JSON object."""
  try:
    fields = disk.read_json(path)
  except (OSError, ValueError) as error:
    raise ValueError(
      f'{path} is not valid JSON ({error}); delete it and run '
      'the same command again'
    ) from error
  if not isinstance(fields, dict):
    raise ValueError(
      f'{path} must hold a JSON object, got {type(fields).__name__}'
    )
  return fields


def _check_returns(path: pathlib.Path, name: str, array: np.ndarray) -> None:
  """Every repetition needs a finite episode; [S, M, R, E]."""
  missing = ~np.isfinite(array).any(-1)
  if np.isinf(array).any() or missing.any():
    seed, task, repetition = np.argwhere(missing | np.isinf(array).any(-1))[
      0
    ].tolist()
    raise ValueError(
      f'{path}: {name} has no finite return for seed {seed}, task {task}, '
      f'repetition {repetition}: training diverged; look at metrics.jsonl '
      'and train again'
    )


def _check_axes(
  evaluations: Mapping[str, Mapping[str, np.ndarray]],
  num_seeds: int,
  folder: pathlib.Path,
) -> None:
  """S equals num_seeds, and M, N and K agree between all arrays."""
  sizes = {'S': (num_seeds, 'run.json')}
  for point, arrays in evaluations.items():
    for name, array in arrays.items():
      for axis, size in zip(_axes(name, array), array.shape):
        if axis not in _AXIS_NAMES:
          continue
        expected, source = sizes.setdefault(axis, (size, f'{point}.npz:{name}'))
        if size != expected:
          raise ValueError(
            f'{folder / point}.npz: {name} has shape {list(array.shape)}, '
            f'that is {size} {_AXIS_NAMES[axis]}, but {source} has '
            f'{expected}; the files come from different runs, run again '
            'with --phases=test,report'
          )
      if name == 'behaviour_test_returns' and len(array) not in (1, num_seeds):
        raise ValueError(
          f'{folder / point}.npz: {name} has {len(array)} seeds, must be 1 '
          f'or {num_seeds}; run again with --phases=collect,report'
        )
