"""Offline datasets on disk.

On disk a dataset is a directory: `manifest.json` and one `.npy` file per array.
The manifest says what the data are (family, options, tasks, behaviour returns),
how they were made, which arrays there are, and what every file must be (shape,
dtype, size, SHA-256). Everything is validated when saved and again when loaded:
the manifest, each file against it before an array is made of it, and the arrays
against what the manifest says of them. Nothing is unpickled.

Version 1 of the format did not say which extras there are and what shapes one
step's extras and one task's parameters have; it is still read.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import hashlib
import io
import json
import math
import os
import pathlib
import re
from typing import Any, BinaryIO
import warnings

import numpy as np

from offmeta import disk
from offmeta.data.meta_dataset import (
  DTYPES,
  OBSERVATION_DTYPES,
  DatasetError,
  MetaDataset,
  is_name,
  validate,
)
from offmeta.types import Array, EnvSpec, Transition

_SCHEMA_VERSION = 2
_READABLE = (1, 2)
_MANIFEST = 'manifest.json'
_AGAIN = 'restore it from a copy, or collect the data again'
# Differences in these can be forced; see `load`.
_SOFT_FACTS = ('episode_length', 'terminates')
_HARD_FACTS = (
  'name',
  'observation_shape',
  'observation_dtype',
  'action_size',
  'feature_size',
)
_HEADER_BYTES = 10_000  # what numpy is willing to parse
_BLOCK_BYTES = 1 << 20


# What a value must be: whether it is, and in words. In Python True is an
# integer, here it is not.
_Kind = tuple[Callable[[Any], bool], str]


def _whole(least: int) -> _Kind:
  return (
    lambda x: type(x) is int and x >= least,
    f'a whole number of at least {least}',
  )


def _list_of(kind: _Kind, what: str) -> _Kind:
  return (
    lambda x: isinstance(x, list) and all(map(kind[0], x)),
    f'a list {what}',
  )


def _mapping_of(kind: _Kind, what: str) -> _Kind:
  return (
    lambda x: (
      isinstance(x, dict)
      and all(map(is_name, x))
      and all(map(kind[0], x.values()))
    ),
    f'a mapping from names to {what}',
  )


def _or_null(kind: _Kind) -> _Kind:
  return lambda x: x is None or kind[0](x), f'{kind[1]}, or null'


_BOOL = (lambda x: isinstance(x, bool), 'true or false')
_MAPPING = (lambda x: isinstance(x, dict), 'a mapping')
_NUMBER = (lambda x: type(x) in (int, float) and abs(x) < math.inf, '')
_SHAPE = _list_of(_whole(0), 'of sizes')
_SHAPES = _mapping_of(_SHAPE, 'shapes')
_SIZES = _list_of(_whole(1), 'of whole numbers of at least 1')
_FIELDS: dict[str, _Kind] = {
  'spec': _MAPPING,
  'task_parameters': _list_of((is_name, ''), 'of names'),
  'num_tasks': _whole(1),
  'capacity': _whole(1),
  'size': _SIZES,
  'context_size': _or_null(_SIZES),
  'episode_return': _list_of(_NUMBER, 'of finite numbers'),
  'source': _MAPPING,
  'leaves': _MAPPING,
}
_FIELDS_SINCE_2: dict[str, _Kind] = {
  'task_shapes': _SHAPES,
  'extras': _SHAPES,
  'context_extras': _or_null(_SHAPES),
  'frames_once': _BOOL,
}
_LEAF_DTYPES = tuple(sorted({*DTYPES, *OBSERVATION_DTYPES}))
_SPEC_FIELDS: dict[str, _Kind] = {
  'name': (lambda x: isinstance(x, str) and x != '', 'a text'),
  'observation_shape': _list_of(_whole(1), 'of sizes of at least 1'),
  'observation_dtype': (
    lambda x: x in OBSERVATION_DTYPES,
    f'one of {", ".join(OBSERVATION_DTYPES)}',
  ),
  'action_size': _whole(1),
  'feature_size': _whole(0),
  'episode_length': _whole(1),
  'terminates': _BOOL,
  'options': _MAPPING,
}
_SPEC_FIELDS_OF_1 = {  # which knew vectors only
  'observation_size': _whole(1)
} | {k: v for k, v in _SPEC_FIELDS.items() if not k.startswith('observation')}
_LEAF_FIELDS: dict[str, _Kind] = {
  'shape': _SHAPE,
  'dtype': (lambda x: x in _LEAF_DTYPES, f'one of {", ".join(_LEAF_DTYPES)}'),
  'bytes': _whole(0),
  'sha256': (
    lambda x: (
      isinstance(x, str) and re.fullmatch('[0-9a-f]{64}', x) is not None
    ),
    'a SHA-256 of 64 hexadecimal digits',
  ),
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
  try:
    _finish_interrupted(path)
    exists, is_dataset = path.exists(), (path / _MANIFEST).exists()
  except OSError as error:
    raise DatasetError(
      f'{path}: cannot be used: {error.strerror or error}; choose another'
      ' directory'
    ) from error
  if exists and not overwrite:
    raise DatasetError(
      f'{path}: exists already; choose another directory or pass overwrite=True'
    )
  if exists and not is_dataset:
    raise DatasetError(
      f'{path}: exists and is not a dataset, so it is not overwritten;'
      ' choose another directory'
    )
  validate(dataset, spec, where=str(path))
  leaves = {name: np.asarray(leaf) for name, leaf in _leaves(dataset)}
  temporary, replaced = _temporary(path), _replaced(path)
  try:
    disk.remove(temporary)
    temporary.mkdir(parents=True)
    facts = {}
    for name, leaf in leaves.items():
      facts[name] = _write_leaf(temporary / _file_name(name), leaf)
    manifest = _manifest(dataset, spec, source, facts, str(path))
    _check_manifest(path, manifest)
    text = json.dumps(manifest, indent=1) + '\n'
    disk.write_text(temporary / _MANIFEST, text)
    if path.exists():
      path.rename(replaced)
    temporary.rename(path)
    disk.sync(path.parent)
  except OSError as error:
    with contextlib.suppress(OSError):  # Else the next `load` does it.
      _finish_interrupted(path)
    raise DatasetError(
      f'{path}: could not be written: {error.strerror or error}. Nothing was'
      ' left behind; make room or choose another directory'
    ) from error
  finally:
    disk.remove(temporary)
  disk.remove(replaced)


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
      path / _file_name(name), facts, mapped, check_hash
    )
  dataset = _assemble(leaves)
  validate(dataset, spec, where=str(path))
  _check_summary(path, manifest, dataset)
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
  try:
    _finish_interrupted(path)
    manifest = disk.read_json(file)
  except FileNotFoundError as error:
    raise DatasetError(
      f'{file}: no such file, so {path} is not a dataset; check the path, or'
      ' collect the data first'
    ) from error
  except OSError as error:
    raise DatasetError(
      f'{file}: {error.strerror or error}; check the path'
    ) from error
  except ValueError as error:
    raise DatasetError(f'{file}: not valid JSON ({error}); {_AGAIN}') from error
  _check_manifest(path, manifest)
  _upgrade(manifest)
  return manifest


def _check_manifest(path: pathlib.Path, manifest: Any) -> None:
  """Raises DatasetError unless every field is there and what it must be."""
  file = path / _MANIFEST
  if not isinstance(manifest, dict) or 'schema_version' not in manifest:
    raise DatasetError(f'{file}: not the manifest of a dataset; {_AGAIN}')
  version = manifest['schema_version']
  if type(version) is not int or version not in _READABLE:
    raise DatasetError(
      f'{file}: schema version {version!r}, this version of offmeta reads'
      f' {" and ".join(map(str, _READABLE))}; collect the data again, or use'
      ' the version of offmeta that wrote them'
    )
  fields = _FIELDS | (_FIELDS_SINCE_2 if version >= 2 else {})
  for field, (fits, words) in fields.items():
    if field not in manifest or not fits(manifest[field]):
      raise DatasetError(
        f'{file}: field {field!r} is missing or not {words}; {_AGAIN}'
      )
  spec_fields = _SPEC_FIELDS_OF_1 if version == 1 else _SPEC_FIELDS
  if manifest['spec'].keys() != spec_fields.keys():
    raise DatasetError(
      f"{file}: field 'spec' must hold {', '.join(spec_fields)}; {_AGAIN}"
    )
  for field, (fits, words) in spec_fields.items():
    if not fits(manifest['spec'][field]):
      raise DatasetError(
        f"{file}: field 'spec.{field}' is not {words}; {_AGAIN}"
      )
  for name, facts in manifest['leaves'].items():
    broken = f'{file}: the entry of leaf {name!r} is broken: '
    if not all(map(is_name, name.split('.'))):
      raise DatasetError(f'{broken}no array has such a name; {_AGAIN}')
    for field, (fits, words) in _LEAF_FIELDS.items():
      if not isinstance(facts, dict) or not fits(facts.get(field)):
        raise DatasetError(f'{broken}its {field} is not {words}; {_AGAIN}')
  _check_names(path, manifest)


def _check_names(path: pathlib.Path, manifest: Mapping[str, Any]) -> None:
  """Compares the listed leaves with those that the other fields imply."""
  parts = {'transitions': 'extras'}
  if manifest['context_size'] is not None:
    parts['context'] = 'context_extras'
  listed = set(manifest['leaves'])
  implied = {'size', 'episode_return'}
  implied |= {f'tasks.{name}' for name in manifest['task_parameters']}
  for part, field in parts.items():
    implied |= {f'{part}.{name}' for name in Transition._fields[:-1]}
    if manifest.get('frames_once', False):
      implied.remove(f'{part}.next_observation')
    prefix = f'{part}.extras.'
    if field in manifest:
      implied |= {f'{prefix}{name}' for name in manifest[field] or ()}
    else:  # Version 1: only the files tell which extras there were.
      implied |= {name for name in listed if name.startswith(prefix)}
      implied |= {file.stem for file in path.glob(f'{prefix}*.npy')}
  if 'context' in parts:
    implied.add('context_size')
  for name in sorted(implied - listed):
    raise DatasetError(
      f'{path / _MANIFEST}: does not list leaf {name!r}, which belongs to the'
      f' dataset; {_AGAIN}'
    )
  for name in sorted(listed - implied):
    raise DatasetError(
      f'{path / _MANIFEST}: lists leaf {name!r}, which its other fields know'
      f' nothing of; {_AGAIN}'
    )


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


def _assemble(leaves: Mapping[str, np.ndarray]) -> MetaDataset:
  """The inverse of `_leaves`."""

  def group(prefix: str) -> dict[str, np.ndarray]:
    return {
      name.removeprefix(prefix): leaf
      for name, leaf in leaves.items()
      if name.startswith(prefix)
    }

  def part(name: str) -> Transition:
    fields = [
      leaves.get(f'{name}.{field}') for field in Transition._fields[:-1]
    ]
    return Transition(*fields, extras=group(f'{name}.extras.'))

  return MetaDataset(
    transitions=part('transitions'),
    size=leaves['size'],
    context=part('context') if 'context_size' in leaves else None,
    context_size=leaves.get('context_size'),
    tasks=group('tasks.'),
    episode_return=leaves['episode_return'],
  )


def _summary(dataset: MetaDataset) -> dict[str, Any]:
  """What the manifest says of the arrays, apart from their files."""

  def shapes(arrays: Mapping[str, Array], num_lead: int) -> dict[str, Any]:
    return {name: np.shape(x)[num_lead:] for name, x in sorted(arrays.items())}

  context = dataset.context
  return _plain(
    {
      'task_parameters': sorted(dataset.tasks),
      'task_shapes': shapes(dataset.tasks, 1),
      'num_tasks': len(dataset.size),
      'capacity': dataset.transitions.reward.shape[1],
      'frames_once': dataset.transitions.next_observation is None,
      'size': dataset.size,
      'context_size': dataset.context_size,
      'episode_return': dataset.episode_return,
      'extras': shapes(dataset.transitions.extras, 2),
      'context_extras': None if context is None else shapes(context.extras, 2),
    }
  )


def _check_summary(
  path: pathlib.Path, manifest: Mapping[str, Any], dataset: MetaDataset
) -> None:
  """Compares what the manifest says of the arrays with the arrays."""
  for field, held in _summary(dataset).items():
    said = manifest.get(field, held)  # Version 1 lacks some.
    if said == held:
      continue
    where, said_text, held_text = '', repr(said), repr(held)
    if isinstance(said, list) and isinstance(held, list):
      # Lists over tasks are long: show one entry, or how many there are.
      if len(said) == len(held):
        i = [a == b for a, b in zip(said, held)].index(False)
        where, said_text, held_text = f' at {i}', repr(said[i]), repr(held[i])
      else:
        said_text, held_text = f'{len(said)} entries', f'{len(held)} entries'
    raise DatasetError(
      f'{path / _MANIFEST}: field {field!r} contradicts the arrays{where}: it'
      f' says {said_text}, they have {held_text}; {_AGAIN}'
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
      **_summary(dataset),
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
  if replaced.is_dir() and not path.exists():
    replaced.rename(path)
  else:
    disk.remove(replaced)


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
  memory_map: bool = False,
  check_hash: bool = True,
) -> np.ndarray:
  """Reads a file once: checks size and header, then hashes what it reads.

  A memory map is hashed in blocks; without the hash it is not read at all.
  """
  try:
    with disk.open_regular(path) as file:
      size = os.fstat(file.fileno()).st_size
      if size != facts['bytes']:
        raise DatasetError(
          f'{path}: holds {size} bytes, {facts["bytes"]} were written; the file'
          f' is truncated or was replaced; {_AGAIN}'
        )
      shape, is_fortran, dtype, header = _read_header(path, file)
      if [list(shape), str(dtype)] != [facts['shape'], facts['dtype']]:
        raise DatasetError(
          f'{path}: holds {dtype}{list(shape)}, the manifest says'
          f' {facts["dtype"]}{facts["shape"]}; {_AGAIN}'
        )
      expected = len(header) + math.prod(shape) * dtype.itemsize
      if size != expected:
        raise DatasetError(
          f'{path}: holds {size} bytes, {dtype}{list(shape)} takes {expected};'
          f' {_AGAIN}'
        )
      if memory_map and not is_fortran and math.prod(shape):
        if check_hash:
          file.seek(0)
          _check_hash(path, facts, hashlib.file_digest(file, 'sha256'))
        return np.memmap(file, dtype, 'r', len(header), shape)
      try:
        array = np.empty(shape[::-1] if is_fortran else shape, dtype)
      except (MemoryError, ValueError) as error:
        raise DatasetError(
          f'{path}: {dtype}{list(shape)} does not fit into memory ({error});'
          ' use a machine with more, or a smaller dataset'
        ) from error
      digest = hashlib.sha256(header)
      rest = memoryview(array.reshape(-1).view(np.uint8))
      while rest:
        count = file.readinto(rest[:_BLOCK_BYTES])
        if not count:
          raise DatasetError(f'{path}: was cut while it was read; {_AGAIN}')
        digest.update(rest[:count])
        rest = rest[count:]
  except FileNotFoundError as error:
    raise DatasetError(f'{path}: file is missing; {_AGAIN}') from error
  except OSError as error:
    raise DatasetError(
      f'{path}: cannot be read: {error.strerror or error}; {_AGAIN}'
    ) from error
  if check_hash:
    _check_hash(path, facts, digest)
  return array.T if is_fortran else array


def _check_hash(path: pathlib.Path, facts: Mapping[str, Any], digest) -> None:
  if digest.hexdigest() != facts['sha256']:
    raise DatasetError(
      f'{path}: was altered after it was written (its SHA-256 is not the'
      f" manifest's); {_AGAIN}"
    )


def _read_header(
  path: pathlib.Path, file: BinaryIO
) -> tuple[tuple[int, ...], bool, np.dtype, bytes]:
  """Of an .npy file: shape, whether in Fortran order, dtype, and its bytes."""
  start = io.BytesIO(file.read(_HEADER_BYTES))
  npy = np.lib.format
  try:
    read = {
      (1, 0): npy.read_array_header_1_0,
      (2, 0): npy.read_array_header_2_0,
    }[npy.read_magic(start)]
    shape, is_fortran, dtype = read(start)
  except Exception as error:  # Numpy evaluates it as Python: any can come.
    raise DatasetError(
      f'{path}: not an array file ({str(error)[:100]}); {_AGAIN}'
    ) from error
  file.seek(start.tell())
  return shape, is_fortran, dtype, start.getvalue()[: start.tell()]
