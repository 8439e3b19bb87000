"""Checkpoints: a whole pytree on disk, all or nothing.

A checkpoint is `<directory>/<step>/` with the arrays, written by Orbax, and a
`record.json` with the configuration's hash, every leaf's path, shape and dtype,
and the size and CRC-32 of every file. It is written under a temporary name and
renamed when complete, so a directory that is named by a number was once whole;
the record tells whether it still is.

The free functions `ocp.save` and `ocp.load` are used rather than
`ocp.training.Checkpointer` (orbax 0.12): after one failed save, its later saves
raise the first failure again; it reads a damaged metadata file as an absent
one; and it discards old checkpoints before a caller could check the new one.
"""

from collections.abc import Callable, Iterator
import contextlib
import errno
import gc
import json
import logging
import os
import pathlib
import shutil
from typing import Any
import warnings
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

_SCHEMA_VERSION = 1
_RECORD = 'record.json'
_STATE = 'state'
_MISSING = '(no such leaf)'


class CheckpointError(RuntimeError):
  """A checkpoint cannot be written, or none can be restored."""


class _Damaged(Exception):
  """A checkpoint on disk is not what was written."""


class Checkpointer:
  """Saves and restores pytrees under one directory, for one configuration.

  One process at a time may use a directory, and only programs of one process
  are served: it says so if there are several.
  """

  def __init__(
    self, directory: str | os.PathLike[str], config_hash: str, keep: int = 2
  ):
    """Opens a directory, creating it if need be, and clears interrupted writes.

    Args:
      directory: where the checkpoints are.
      config_hash: identifies the configuration; a checkpoint of another one is
        refused.
      keep: how many of the newest checkpoints stay; at least 1. With 2 or more
        there is one to fall back to when the newest gets damaged.

    Raises:
      ValueError: if keep is below 1.
      CheckpointError: if the directory cannot be used.
    """
    if keep < 1:
      raise ValueError(f'keep must be at least 1, got {keep}')
    if jax.process_count() > 1:
      raise CheckpointError(
        'checkpoints serve programs of one process; this one has'
        f' {jax.process_count()}'
      )
    self._directory = pathlib.Path(directory).absolute()
    self._config_hash = config_hash
    self._keep = keep
    try:
      self._directory.mkdir(parents=True, exist_ok=True)
      self._finish_interrupted()
    except OSError as error:
      raise CheckpointError(
        f'{self._directory}: cannot be used for checkpoints: {error}'
      ) from error

  def save(self, step: int, tree: Any) -> None:
    """Writes a checkpoint; when this returns it is on the disk.

    Args:
      step: not below the latest saved step; at the same step it replaces it.
      tree: pytree of jax arrays (typed keys too), numpy arrays and numbers.

    Raises:
      CheckpointError: if it could not be written (a full disk, for one). The
        checkpoints that were there before are untouched.
    """
    latest = self.latest_step()
    if latest is not None and step < latest:
      raise CheckpointError(
        f'{self._directory}: step {step} is before the latest checkpoint,'
        f' {latest}; to branch off an earlier one, use another directory'
      )
    leaves = _flatten(tree)
    temporary = self._directory / f'.tmp-{step}'
    replaced = self._directory / f'.old-{step}'
    final = self._directory / str(step)
    try:
      self._write(temporary, step, leaves)
      if final.exists():
        final.rename(replaced)
      temporary.rename(final)
      _sync(self._directory)
    except Exception as error:
      if replaced.exists() and not final.exists():
        replaced.rename(final)
      raise CheckpointError(self._write_message(step, leaves, error)) from error
    finally:
      shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)
    for old in self._steps()[: -self._keep]:
      shutil.rmtree(self._directory / str(old), ignore_errors=True)

  def latest_step(self) -> int | None:
    """The newest step that was saved completely; None if there is none."""
    steps = self._steps()
    return steps[-1] if steps else None

  def restore(self, template: Any, step: int | None = None) -> Any:
    """Reads a checkpoint back, bit for bit.

    Without a step it takes the newest one that is intact. Damaged newer ones
    are then reported by a warning and renamed to `damaged-<step>`, so that
    `latest_step` and the next `save` agree with what was restored.

    Args:
      template: pytree with the structure, shapes and dtypes to expect. Where a
        leaf is an array committed to a sharding, or a ShapeDtypeStruct with
        one, the result has that sharding, whatever it was saved with; any
        other jax leaf comes back uncommitted, numpy leaves and numbers as such.
      step: which checkpoint; None is the newest intact one.

    Returns:
      A tree like the template.

    Raises:
      CheckpointError: if there is no intact checkpoint, or it belongs to
        another configuration, or its tree is not the template's.
    """
    steps = self._steps()
    if step is not None and step not in steps:
      raise CheckpointError(
        f'{self._directory}: no checkpoint of step {step}; there are'
        f' {steps or "none"}'
      )
    if not steps:
      raise CheckpointError(f'{self._directory}: there is no checkpoint')
    damaged: dict[int, str] = {}
    for candidate in reversed(steps) if step is None else [step]:
      path = self._directory / str(candidate)
      try:
        record = _read_record(path)
        self._check_hash(path, record)
        _check_files(path, record)
      except _Damaged as error:
        damaged[candidate] = str(error)
        continue
      result = _read_tree(path, record, template)
      self._set_aside(damaged, candidate)
      return result
    raise CheckpointError(
      f'{self._directory}: no intact checkpoint: '
      + '; '.join(f'step {s}: {why}' for s, why in damaged.items())
      + '. Move the directory away to start again from the beginning'
    )

  def close(self) -> None:
    """Nothing is pending after `save`; here for the shape of the interface."""

  def _steps(self) -> list[int]:
    return sorted(
      int(path.name)
      for path in self._directory.iterdir()
      if path.name.isdecimal() and path.is_dir()
    )

  def _finish_interrupted(self) -> None:
    """Undoes what a killed process had begun."""
    for path in self._directory.glob('.old-*'):
      final = self._directory / path.name.removeprefix('.old-')
      if final.exists():
        shutil.rmtree(path)
      else:
        path.rename(final)
    for path in self._directory.glob('.tmp-*'):
      shutil.rmtree(path)

  def _write(
    self, path: pathlib.Path, step: int, leaves: dict[str, Any]
  ) -> None:
    """Writes arrays and record into `path` and flushes them to the disk."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    # Orbax has no arrays of size zero; the record is enough to remake them.
    arrays = {k: _storable(v) for k, v in leaves.items() if _size(v)}
    if arrays:
      context = ocp.Context()
      # In the background, a directory that cannot be made shows as a time-out.
      context.async_options.create_directories_asynchronously = False
      with context, _quiet():
        ocp.save(path / _STATE, arrays)
    files = {
      file.relative_to(path).as_posix(): _fingerprint(file)
      for file in sorted(path.rglob('*'))
      if file.is_file()
    }
    record = {
      'schema_version': _SCHEMA_VERSION,
      'step': step,
      'config_hash': self._config_hash,
      'leaves': {k: _describe(v) for k, v in leaves.items()},
      'files': files,
    }
    (path / _RECORD).write_text(json.dumps(record, indent=1))
    for file in [*path.rglob('*'), path]:
      _sync(file)

  def _write_message(
    self, step: int, leaves: dict[str, Any], error: Exception
  ) -> str:
    reason = str(error)
    number = getattr(error, 'errno', None)
    full = any(
      number == code or os.strerror(code) in reason
      for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    )
    if full:
      reason = 'the disk is full, or a quota or file size limit is reached'
      with contextlib.suppress(OSError):
        free = shutil.disk_usage(self._directory).free / 1e6
        need = sum(_storable(x).nbytes for x in leaves.values()) / 1e6
        reason += f' ({need:.0f} MB to write, {free:.0f} MB free)'
      reason += '; make room and run the same command again'
    latest = self.latest_step()
    kept = (
      'no earlier checkpoint exists'
      if latest is None
      else f'the checkpoint of step {latest} is intact'
    )
    return (
      f'{self._directory}: could not write the checkpoint of step {step}:'
      f' {reason}. {kept[0].upper()}{kept[1:]}'
    )

  def _check_hash(self, path: pathlib.Path, record: dict[str, Any]) -> None:
    if record['config_hash'] != self._config_hash:
      raise CheckpointError(
        f'{path}: this checkpoint was written by configuration'
        f' {record["config_hash"]}, the present one is {self._config_hash}.'
        ' Use another --workdir, or the configuration it was started with'
      )

  def _set_aside(self, damaged: dict[int, str], used: int) -> None:
    for step, why in damaged.items():
      target = self._directory / f'damaged-{step}'
      shutil.rmtree(target, ignore_errors=True)
      (self._directory / str(step)).rename(target)
      warnings.warn(
        f'{self._directory}: the checkpoint of step {step} is damaged'
        f' ({why}); moved to {target.name}, continuing from step {used}',
        stacklevel=3,
      )


def _is_key(leaf: Any) -> bool:
  return hasattr(leaf, 'dtype') and jnp.issubdtype(
    leaf.dtype, jax.dtypes.prng_key
  )


def _flatten(tree: Any) -> dict[str, Any]:
  """The leaves by their path, e.g. 'params.critic.0.kernel'."""
  leaves: dict[str, Any] = {}
  for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    name = jax.tree_util.keystr(path, simple=True, separator='.')
    if name in leaves:
      raise CheckpointError(f'two leaves are called {name!r}; rename one')
    if not isinstance(
      leaf,
      jax.Array
      | np.ndarray
      | np.generic
      | jax.ShapeDtypeStruct
      | bool
      | int
      | float,
    ):
      raise CheckpointError(
        f'leaf {name!r} is a {type(leaf).__name__}; only arrays and numbers'
        ' can be in a checkpoint'
      )
    leaves[name] = leaf
  return leaves


def _describe(leaf: Any) -> dict[str, Any]:
  if not hasattr(leaf, 'dtype'):
    leaf = np.asarray(leaf)
  return {'shape': list(leaf.shape), 'dtype': str(leaf.dtype)}


def _storable(leaf: Any) -> jax.Array | np.ndarray:
  """What Orbax can write: keys become their data, numbers arrays."""
  if _is_key(leaf):
    return jax.random.key_data(leaf)
  return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)


def _fingerprint(path: pathlib.Path) -> dict[str, int]:
  size, checksum = 0, 0
  with path.open('rb') as file:
    while block := file.read(1 << 20):
      size += len(block)
      checksum = zlib.crc32(block, checksum)
  return {'bytes': size, 'crc32': checksum}


def _sync(path: pathlib.Path) -> None:
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def _read_record(path: pathlib.Path) -> dict[str, Any]:
  try:
    record = json.loads((path / _RECORD).read_text())
  except (OSError, ValueError) as error:
    raise _Damaged(f'{_RECORD} cannot be read: {error}') from error
  keys = {'schema_version', 'step', 'config_hash', 'leaves', 'files'}
  if not isinstance(record, dict) or not keys <= record.keys():
    raise _Damaged(f'{_RECORD} is not the record of a checkpoint')
  if record['schema_version'] != _SCHEMA_VERSION:
    raise CheckpointError(
      f'{path}: checkpoint format {record["schema_version"]}, this version of'
      f' offmeta reads format {_SCHEMA_VERSION}'
    )
  return record


def _check_files(path: pathlib.Path, record: dict[str, Any]) -> None:
  for name, expected in record['files'].items():
    try:
      found = _fingerprint(path / name)
    except OSError as error:
      raise _Damaged(f'{name}: {error.strerror}') from error
    if found['bytes'] != expected['bytes']:
      raise _Damaged(
        f'{name} holds {found["bytes"]} bytes of {expected["bytes"]}'
      )
    if found != expected:
      raise _Damaged(f'{name} was altered')


def _read_tree(
  path: pathlib.Path, record: dict[str, Any], template: Any
) -> Any:
  """Restores an intact checkpoint into the template's shardings."""
  leaves = _flatten(template)
  expected = {name: _describe(leaf) for name, leaf in leaves.items()}
  stored = record['leaves']
  for name in [*expected, *stored]:
    ours, theirs = expected.get(name), stored.get(name)
    if ours != theirs:
      raise CheckpointError(
        f'{path}: leaf {name!r} is {_show(theirs)} in the checkpoint and'
        f' {_show(ours)} in this program; the code or the configuration has'
        ' changed since it was written'
      )
  abstract = {k: _abstract(v) for k, v in leaves.items() if _size(v)}
  arrays: dict[str, Any] = {}
  if abstract:
    try:
      with _quiet():
        arrays = ocp.load(path / _STATE, abstract)
    except Exception as error:
      raise CheckpointError(
        f'{path}: the files are intact but cannot be read: {error}'
      ) from error
  placed = [_place(arrays.get(k), v) for k, v in leaves.items()]
  return jax.tree.unflatten(jax.tree.structure(template), placed)


def _show(description: dict[str, Any] | None) -> str:
  if description is None:
    return _MISSING
  return f'{description["dtype"]}{description["shape"]}'


def _size(leaf: Any) -> int:
  return int(np.prod(np.shape(leaf), dtype=np.int64))


def _sharding(leaf: Any) -> jax.sharding.Sharding | None:
  """The sharding that the template insists on, if it does."""
  if isinstance(leaf, jax.Array):
    return leaf.sharding if leaf.committed else None
  return getattr(leaf, 'sharding', None)


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct | np.ndarray:
  """What to ask Orbax for; a numpy array where placement is ours."""
  data = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
  sharding = _sharding(leaf)
  if sharding is not None:
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=sharding)
  if not hasattr(data, 'dtype'):
    return np.asarray(data)
  return np.broadcast_to(np.zeros((), data.dtype), data.shape)


def _place(value: Any, leaf: Any) -> Any:
  """Gives a restored array the type and the sharding of the template leaf."""
  if isinstance(leaf, bool | int | float) and not isinstance(leaf, np.generic):
    return type(leaf)(value)
  if isinstance(leaf, np.generic):
    return value[()]
  if value is None:
    shape = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
    value = np.zeros(shape.shape, shape.dtype)
  if isinstance(leaf, np.ndarray):
    return value
  if not isinstance(value, jax.Array):
    value = jnp.array(value)
  if _is_key(leaf):
    value = jax.random.wrap_key_data(value, impl=_key_impl(leaf))
  sharding = _sharding(leaf)
  return value if sharding is None else jax.device_put(value, sharding)


def _key_impl(leaf: Any) -> Any:
  if isinstance(leaf, jax.Array):
    return jax.random.key_impl(leaf)
  return leaf.dtype._impl.name  # pylint: disable=protected-access


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Mutes what Orbax logs meanwhile; failures reach us as exceptions."""

  def not_orbax(record: logging.LogRecord) -> bool:
    return 'orbax' not in record.pathname

  def none(record: logging.LogRecord) -> bool:
    del record
    return False

  mutes: list[tuple[str, Callable[[logging.LogRecord], bool]]] = [
    ('absl', not_orbax),
    ('asyncio', none),
  ]
  for name, mute in mutes:
    logging.getLogger(name).addFilter(mute)
  failed = True
  try:
    yield
    failed = False
  finally:
    if failed:
      gc.collect()  # Abandoned tasks complain when collected: do it here.
    for name, mute in mutes:
      logging.getLogger(name).removeFilter(mute)
