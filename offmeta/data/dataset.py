"""Offline datasets on disk.

On disk a dataset is a directory: `manifest.json` and one `.npy` file per array.
The manifest says what the data are (family, options, tasks, behaviour returns),
how they were made, and what every file must be (shape, dtype, size, SHA-256).
Everything is validated when saved and again when loaded; nothing is unpickled.
"""

from collections.abc import Iterator, Mapping
import json
import os
import pathlib
import shutil
from typing import Any
import warnings

import numpy as np

from offmeta import disk
from offmeta.data.meta_dataset import (
  DatasetError,
  MetaDataset,
  is_name,
  validate,
)
from offmeta.types import Array, EnvSpec, Transition

_SCHEMA_VERSION = 2
_MANIFEST = 'manifest.json'
# Differences in these can be forced; see `load`.
_SOFT_FACTS = ('episode_length', 'terminates')
_HARD_FACTS = (
  'name',
  'observation_shape',
  'observation_dtype',
  'action_size',
  'feature_size',
)
_MANIFEST_FIELDS: dict[str, type] = {
  'spec': dict,
  'task_parameters': list,
  'num_tasks': int,
  'capacity': int,
  'size': list,
  'episode_return': list,
  'source': dict,
  'leaves': dict,
}


def save(
  path: str | os.PathLike[str],
  dataset: MetaDataset,
  spec: EnvSpec,
  source: Mapping[str, Any],
  *,
  overwrite: bool = False,
) -> None:
  """Validates a dataset and writes it, all or nothing.

  Args:
    path: directory to create.
    dataset: what to write; jax or numpy arrays.
    spec: of the family that the data come from.
    source: how the data were made (command, seed, ...), anything that JSON can
      hold; kept in the manifest.
    overwrite: replace a dataset that is there already.

  Raises:
    DatasetError: if the dataset is not valid, something is at `path` already,
      or it cannot be written; what was there before is then untouched.
  """
  path = pathlib.Path(path).absolute()
  _finish_interrupted(path)
  if path.exists() and not overwrite:
    raise DatasetError(
      f'{path}: exists already; choose another directory or pass overwrite=True'
    )
  if path.exists() and not (path / _MANIFEST).exists():
    raise DatasetError(
      f'{path}: exists and is not a dataset, so it is not overwritten;'
      ' choose another directory'
    )
  validate(dataset, spec, where=str(path))
  leaves = {name: np.asarray(leaf) for name, leaf in _leaves(dataset)}
  temporary, replaced = _temporary(path), _replaced(path)
  try:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    facts = {}
    for name, leaf in leaves.items():
      facts[name] = _write_leaf(temporary / _file_name(name), leaf)
    manifest = _manifest(dataset, spec, source, facts, str(path))
    text = json.dumps(manifest, indent=1) + '\n'
    disk.write_text(temporary / _MANIFEST, text)
    if path.exists():
      path.rename(replaced)
    temporary.rename(path)
    disk.sync(path.parent)
  except OSError as error:
    if replaced.exists() and not path.exists():
      replaced.rename(path)
    raise DatasetError(
      f'{path}: could not be written: {error.strerror or error}. Nothing was'
      ' left behind; make room or choose another directory'
    ) from error
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
  shutil.rmtree(replaced, ignore_errors=True)


def load(
  path: str | os.PathLike[str],
  expected_spec: EnvSpec | None = None,
  *,
  force: bool = False,
  memory_map: bool = False,
  check_hash: bool = True,
) -> MetaDataset:
  """Reads a dataset and checks that it is whole, valid and the right one.

  Args:
    path: directory written by `save`.
    expected_spec: of the family in use; None accepts any family.
    force: warn, rather than fail, where the data were made with other options
      (simulator backend, versions, episode length). Another family or other
      sizes always fail.
    memory_map: leave transitions on disk; their arrays are read where they
      are indexed.
    check_hash: compare the content of the files with the manifest, not only
      their sizes and headers. It reads them once.

  Returns:
    The dataset, as numpy arrays.

  Raises:
    DatasetError: says which file or array, where in it, and what to do.
  """
  path = pathlib.Path(path).absolute()
  manifest = load_manifest(path)
  spec = _spec(manifest)
  if expected_spec is not None:
    _check_spec(path, spec, expected_spec, force)
  leaves = {}
  for name, facts in manifest['leaves'].items():
    mapped = memory_map and name.startswith(('transitions.', 'context.'))
    leaves[name] = _read_leaf(
      path / _file_name(name), facts, 'r' if mapped else None, check_hash
    )
  dataset = _assemble(path, leaves, manifest.get('frames_once', False))
  validate(dataset, spec, where=str(path))
  return dataset


def load_manifest(path: str | os.PathLike[str]) -> dict[str, Any]:
  """The manifest of a dataset: what it is and how it was made.

  Args:
    path: directory written by `save`.

  Returns:
    The manifest; 'spec', 'size', 'episode_return', 'source' and so on.

  Raises:
    DatasetError: if there is none, or it is not one of this version.
  """
  path = pathlib.Path(path).absolute()
  file = path / _MANIFEST
  again = 'collect the data again, or restore the directory from a copy'
  try:
    _finish_interrupted(path)
    manifest = json.loads(file.read_text(encoding='utf-8'))
  except FileNotFoundError as error:
    raise DatasetError(
      f'{file}: no such file, so {path} is not a dataset; check the path, or'
      ' collect the data first'
    ) from error
  except OSError as error:
    raise DatasetError(f'{file}: {error.strerror}; check the path') from error
  except ValueError as error:
    raise DatasetError(f'{file}: not valid JSON ({error}); {again}') from error
  if not isinstance(manifest, dict) or 'schema_version' not in manifest:
    raise DatasetError(f'{file}: not the manifest of a dataset; {again}')
  if manifest['schema_version'] not in (1, _SCHEMA_VERSION):
    raise DatasetError(
      f'{file}: schema version {manifest["schema_version"]!r}, this version'
      f' of offmeta reads 1 and {_SCHEMA_VERSION}; collect the data again, or'
      ' use the version of offmeta that wrote them'
    )
  for field, kind in _MANIFEST_FIELDS.items():
    if not isinstance(manifest.get(field), kind):
      raise DatasetError(
        f'{file}: field {field!r} is missing or not a {kind.__name__}; {again}'
      )
  if manifest['schema_version'] == 1:
    _upgrade(manifest)
  if manifest['spec'].keys() != set(EnvSpec._fields):
    raise DatasetError(
      f"{file}: field 'spec' must hold {', '.join(EnvSpec._fields)}; {again}"
    )
  for name, facts in manifest['leaves'].items():
    named = all(is_name(part) for part in name.split('.'))
    fields = {'shape', 'dtype', 'bytes', 'sha256'}
    if not named or not isinstance(facts, dict) or not fields <= facts.keys():
      raise DatasetError(
        f'{file}: the entry of leaf {name!r} is broken; {again}'
      )
  return manifest


def _upgrade(manifest: dict[str, Any]) -> None:
  """From version 1, which knew vectors only."""
  spec = manifest['spec']
  if 'observation_size' in spec:
    spec['observation_shape'] = [spec.pop('observation_size')]
    spec['observation_dtype'] = 'float32'


def _spec(manifest: Mapping[str, Any]) -> EnvSpec:
  spec = EnvSpec(**manifest['spec'])
  return spec._replace(observation_shape=tuple(spec.observation_shape))


def _leaves(dataset: MetaDataset) -> Iterator[tuple[str, Array]]:
  """Every array with its dotted name, which is also its file's stem."""
  for part in ('transitions', 'context'):
    transition = getattr(dataset, part)
    if transition is None:
      continue
    for field in Transition._fields[:-1]:
      if getattr(transition, field) is not None:
        yield f'{part}.{field}', getattr(transition, field)
    for name, leaf in transition.extras.items():
      yield f'{part}.extras.{name}', leaf
  yield 'size', dataset.size
  if dataset.context_size is not None:
    yield 'context_size', dataset.context_size
  for name, leaf in dataset.tasks.items():
    yield f'tasks.{name}', leaf
  yield 'episode_return', dataset.episode_return


def _assemble(
  path: pathlib.Path, leaves: Mapping[str, np.ndarray], frames_once: bool
) -> MetaDataset:
  """The inverse of `_leaves`."""

  def get(name: str) -> np.ndarray:
    if name not in leaves:
      raise DatasetError(
        f'{path / _MANIFEST}: does not list leaf {name!r}; collect the data'
        ' again, or restore the directory from a copy'
      )
    return leaves[name]

  def group(prefix: str) -> dict[str, np.ndarray]:
    return {
      name.removeprefix(prefix): leaf
      for name, leaf in leaves.items()
      if name.startswith(prefix)
    }

  def part(name: str) -> Transition:
    fields = {
      field: get(f'{name}.{field}')
      for field in Transition._fields[:-1]
      if not (frames_once and field == 'next_observation')
    }
    fields = {'next_observation': None, **fields}
    return Transition(**fields, extras=group(f'{name}.extras.'))

  has_context = any(name.startswith('context.') for name in leaves)
  return MetaDataset(
    transitions=part('transitions'),
    size=get('size'),
    context=part('context') if has_context else None,
    context_size=get('context_size') if has_context else None,
    tasks=group('tasks.'),
    episode_return=get('episode_return'),
  )


def _manifest(
  dataset: MetaDataset,
  spec: EnvSpec,
  source: Mapping[str, Any],
  facts: Mapping[str, Any],
  where: str,
) -> dict[str, Any]:
  try:
    return {
      'schema_version': _SCHEMA_VERSION,
      'spec': _plain(spec._asdict()),
      'task_parameters': sorted(dataset.tasks),
      'num_tasks': len(dataset.size),
      'capacity': dataset.transitions.reward.shape[1],
      'frames_once': dataset.transitions.next_observation is None,
      'size': _plain(dataset.size),
      'context_size': _plain(dataset.context_size),
      'episode_return': _plain(dataset.episode_return),
      'source': _plain(source),
      'leaves': dict(facts),
    }
  except TypeError as error:
    raise DatasetError(
      f'{where}: spec.options and source must be plain values: {error}'
    ) from error


def _plain(value: Any) -> Any:
  """The value as JSON gives it back: tuples are lists, arrays are lists."""

  def convert(x: Any) -> Any:
    if hasattr(x, 'tolist'):
      return np.asarray(x).tolist()
    raise TypeError(f'{x!r} is a {type(x).__name__}')

  if isinstance(value, Mapping):
    value = dict(value)
  return json.loads(json.dumps(value, default=convert))


def _check_spec(
  path: pathlib.Path, spec: EnvSpec, expected: EnvSpec, force: bool
) -> None:
  for field in _HARD_FACTS:
    ours, theirs = getattr(expected, field), getattr(spec, field)
    if ours != theirs:
      what = 'family' if field == 'name' else field
      raise DatasetError(
        f'{path}: {what} of the data is {theirs!r}, this program uses'
        f' {ours!r}; give the dataset of this family, or choose the family of'
        ' the dataset'
      )
  theirs = {**spec.options, **{k: getattr(spec, k) for k in _SOFT_FACTS}}
  ours = _plain(
    {**expected.options, **{k: getattr(expected, k) for k in _SOFT_FACTS}}
  )
  absent = '(absent)'
  differing = [
    f'{key}: {theirs.get(key, absent)!r} in the data,'
    f' {ours.get(key, absent)!r} here'
    for key in sorted(theirs.keys() | ours.keys())
    if theirs.get(key, absent) != ours.get(key, absent)
  ]
  if not differing:
    return
  message = f'{path}: made with other options: {"; ".join(differing)}'
  if not force:
    raise DatasetError(
      f'{message}. Collect the data again with these options, use the'
      ' options of the data, or pass force=True to use them all the same'
    )
  warnings.warn(message, stacklevel=3)


def _file_name(leaf: str) -> str:
  return f'{leaf}.npy'


def _temporary(path: pathlib.Path) -> pathlib.Path:
  """Where a dataset is while it is being written."""
  return path.with_name(f'.{path.name}.tmp')


def _replaced(path: pathlib.Path) -> pathlib.Path:
  """Where the old dataset is while the new one takes its place."""
  return path.with_name(f'.{path.name}.old')


def _finish_interrupted(path: pathlib.Path) -> None:
  """Cleans up after a `save` that was killed while replacing a dataset."""
  replaced = _replaced(path)
  if replaced.exists() and not path.exists():
    replaced.rename(path)
  elif replaced.exists():
    shutil.rmtree(replaced)


def _write_leaf(path: pathlib.Path, leaf: np.ndarray) -> dict[str, Any]:
  with path.open('wb') as file:
    np.save(file, leaf, allow_pickle=False)
    file.flush()
    os.fsync(file.fileno())
  return {
    'shape': list(leaf.shape),
    'dtype': str(leaf.dtype),
    'bytes': path.stat().st_size,
    'sha256': disk.sha256(path),
  }


def _read_leaf(
  path: pathlib.Path,
  facts: Mapping[str, Any],
  mmap_mode: str | None,
  check_hash: bool,
) -> np.ndarray:
  again = 'restore it from a copy, or collect the data again'
  try:
    size = path.stat().st_size
    if size != facts['bytes']:
      raise DatasetError(
        f'{path}: holds {size} bytes, {facts["bytes"]} were written; the file'
        f' is truncated or was replaced; {again}'
      )
    if check_hash and disk.sha256(path) != facts['sha256']:
      raise DatasetError(
        f'{path}: was altered after it was written (its SHA-256 is not the'
        f" manifest's); {again}"
      )
    array = np.load(path, mmap_mode, allow_pickle=False)
  except FileNotFoundError as error:
    raise DatasetError(f'{path}: file is missing; {again}') from error
  except OSError as error:
    raise DatasetError(
      f'{path}: cannot be read: {error.strerror or error}; {again}'
    ) from error
  except (ValueError, EOFError) as error:
    if isinstance(error, DatasetError):
      raise
    raise DatasetError(
      f'{path}: not an array file: {error}; {again}'
    ) from error
  found = [list(array.shape), str(array.dtype)]
  if found != [facts['shape'], facts['dtype']]:
    raise DatasetError(
      f'{path}: holds {found[1]}{found[0]}, the manifest says'
      f' {facts["dtype"]}{facts["shape"]}; {again}'
    )
  return array
