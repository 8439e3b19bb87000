"""The files of one checkpoint: their record, and whether they are intact."""

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
import zlib

from offmeta.disk import sync

RECORD = 'record.json'
_SCHEMA_VERSION = 1


class CheckpointError(RuntimeError):
  """A checkpoint cannot be written, or none can be restored."""


class DamagedError(Exception):
  """A checkpoint on disk is not what was written."""


def make_empty(path: pathlib.Path) -> None:
  """Makes a folder, in place of whatever is there."""
  shutil.rmtree(path, ignore_errors=True)
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
  (path / RECORD).write_text(json.dumps(record, indent=1))
  for file in [*path.rglob('*'), path]:
    sync(file)


def read_record(path: pathlib.Path) -> dict[str, Any]:
  """What `write_record` wrote.

  Raises:
    DamagedError: it is not there, or no such record.
    CheckpointError: it has another format.
  """
  try:
    record = json.loads((path / RECORD).read_text())
  except (OSError, ValueError) as error:
    raise DamagedError(f'{RECORD} cannot be read: {error}') from error
  keys = {'schema_version', 'step', 'config_hash', 'leaves', 'files'}
  if not isinstance(record, dict) or not keys <= record.keys():
    raise DamagedError(f'{RECORD} is not the record of a checkpoint')
  if record['schema_version'] != _SCHEMA_VERSION:
    raise CheckpointError(
      f'{path}: checkpoint format {record["schema_version"]}, this version of'
      f' offmeta reads format {_SCHEMA_VERSION}'
    )
  return record


def check_files(path: pathlib.Path, record: dict[str, Any]) -> None:
  """Raises DamagedError unless every file is as the record says."""
  for name, expected in record['files'].items():
    try:
      found = _fingerprint(path / name)
    except OSError as error:
      raise DamagedError(f'{name}: {error.strerror}') from error
    if found['bytes'] != expected['bytes']:
      raise DamagedError(
        f'{name} holds {found["bytes"]} bytes of {expected["bytes"]}'
      )
    if found != expected:
      raise DamagedError(f'{name} was altered')


def is_full(error: Exception) -> bool:
  """Whether a write failed for want of space, here or in another process."""
  number = getattr(error, 'errno', None)
  return any(
    number == code or os.strerror(code) in str(error)
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
  )


def _fingerprint(path: pathlib.Path) -> dict[str, int]:
  size, checksum = 0, 0
  with path.open('rb') as file:
    while block := file.read(1 << 20):
      size += len(block)
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
