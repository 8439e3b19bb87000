"""The files of one checkpoint: their record, and whether they are intact."""

from collections.abc import Callable, Iterator
import contextlib
import errno
import gc
import hashlib
import json
import logging
import os
import pathlib
from typing import Any
import zlib

from offmeta import disk

RECORD = 'record.json'
# Since version 2 a record has a digest of its own. Of version 1, which is
# still read, only the types of the fields can be checked. Versions to come
# must keep the digest: by it a number that was altered is told from a new one.
_SCHEMA_VERSION = 2
_READABLE = (1, 2)


class CheckpointError(RuntimeError):
  """A checkpoint cannot be written, or none can be restored."""


class DamagedError(Exception):
  """A checkpoint on disk is not what was written."""


def make_empty(path: pathlib.Path) -> None:
  """Makes a folder, in place of whatever is there."""
  disk.remove(path)
  path.mkdir()


def write_record(
  path: pathlib.Path, step: int, config_hash: str, leaves: dict[str, Any]
) -> None:
  """Describes the files that are in `path`, and flushes all to the disk.

  Args:
    path: folder of the checkpoint, which is complete but for this.
    step: of the checkpoint.
    config_hash: of the configuration.
    leaves: path in the tree -> shape and dtype.
  """
  files = {
    file.relative_to(path).as_posix(): _fingerprint(file)
    for file in sorted(path.rglob('*'))
    if file.is_file()
  }
  record = {
    'schema_version': _SCHEMA_VERSION,
    'step': step,
    'config_hash': config_hash,
    'leaves': leaves,
    'files': files,
  }
  record['digest'] = _digest(record)
  disk.write_text(path / RECORD, json.dumps(record, indent=1))
  for file in [*path.rglob('*'), path]:
    disk.sync(file)


def read_record(path: pathlib.Path) -> dict[str, Any]:
  """What `write_record` wrote.

  Raises:
    DamagedError: it is not there, was altered, or is no such record.
    CheckpointError: it has another format.
  """
  try:
    record = disk.read_json(path / RECORD)
  except (OSError, ValueError) as error:
    raise DamagedError(f'{RECORD} cannot be read: {error}') from error
  version = record.get('schema_version') if isinstance(record, dict) else None
  if type(version) is not int:
    raise DamagedError(f'{RECORD} is not the record of a checkpoint')
  digest = record.pop('digest', None)
  if (version != 1 or digest is not None) and digest != _digest(record):
    raise DamagedError(f'{RECORD} was altered')
  if version not in _READABLE:
    raise CheckpointError(
      f'{path}: checkpoint format {version}, this version of offmeta reads'
      f' formats {" and ".join(map(str, _READABLE))}'
    )
  if not _is_record(record):
    raise DamagedError(f'{RECORD} is not the record of a checkpoint')
  return record


def _digest(record: dict[str, Any]) -> str:
  """SHA-256 of the other fields of a record, however they are laid out."""
  text = json.dumps(record, sort_keys=True, separators=(',', ':'))
  return hashlib.sha256(text.encode()).hexdigest()


def _is_record(record: dict[str, Any]) -> bool:
  """Whether all fields are there and have the types that were written."""

  def is_count(x: Any) -> bool:
    return type(x) is int and x >= 0  # True is no number here.

  def is_leaf(x: Any) -> bool:
    return (
      isinstance(x, dict)
      and x.keys() == {'shape', 'dtype'}
      and isinstance(x['dtype'], str)
      and isinstance(x['shape'], list)
      and all(map(is_count, x['shape']))
    )

  def is_file(x: Any) -> bool:
    return (
      isinstance(x, dict)
      and x.keys() == {'bytes', 'crc32'}
      and all(map(is_count, x.values()))
    )

  leaves, files = record.get('leaves'), record.get('files')
  return (
    is_count(record.get('step'))
    and isinstance(record.get('config_hash'), str)
    and isinstance(leaves, dict)
    and all(map(is_leaf, leaves.values()))
    and isinstance(files, dict)
    and all(map(is_file, files.values()))
  )


def check_step(record: dict[str, Any], step: int) -> None:
  """Raises DamagedError unless the record is of this step."""
  if record['step'] != step:
    raise DamagedError(
      f'it is the checkpoint of step {record["step"]}, so its folder was'
      f' renamed; to use it, name it {record["step"]} again'
    )


def check_files(path: pathlib.Path, record: dict[str, Any]) -> None:
  """Raises DamagedError unless every file is as the record says."""
  root = pathlib.Path(os.path.realpath(path))
  for name, expected in record['files'].items():
    try:
      file = pathlib.Path(os.path.realpath(root / name))
      if not file.is_relative_to(root):
        raise DamagedError(f'{name!r} is not inside the checkpoint')
      found = _fingerprint(file, expected['bytes'])
    except (OSError, ValueError) as error:
      reason = getattr(error, 'strerror', None) or error
      raise DamagedError(f'{name!r}: {reason}') from error
    if found['bytes'] != expected['bytes']:
      raise DamagedError(
        f'{name!r} holds {found["bytes"]} bytes of {expected["bytes"]}'
      )
    if found != expected:
      raise DamagedError(f'{name!r} was altered')


def is_whole(path: pathlib.Path, step: int) -> bool:
  """Whether `path` holds the checkpoint of this step, intact."""
  try:
    record = read_record(path)
    check_step(record, step)
    check_files(path, record)
  except (DamagedError, CheckpointError):
    return False
  return True


def is_full(error: Exception) -> bool:
  """Whether a write failed for want of space, here or in another process."""
  number = getattr(error, 'errno', None)
  return any(
    number == code or os.strerror(code) in str(error)
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
  )


def _fingerprint(
  path: pathlib.Path, expected_bytes: int | None = None
) -> dict[str, int]:
  """Size and CRC-32; only the size where it is not the expected one."""
  with disk.open_regular(path) as file:
    size, checksum = os.fstat(file.fileno()).st_size, 0
    if expected_bytes not in (None, size):
      return {'bytes': size}
    while block := file.read(1 << 20):
      checksum = zlib.crc32(block, checksum)
  return {'bytes': size, 'crc32': checksum}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
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
