"""Files that are on the disk when written, and safe to read.

Every error of the system names the file: `OSError.filename` is set.
"""

from collections.abc import Iterator
import contextlib
import errno
import hashlib
import json
import os
import pathlib
import shutil
import stat
from typing import Any, BinaryIO

import numpy as np

# No file of ours comes near these; a damaged one must not fill the memory or
# the stack.
_JSON_BYTES = 1 << 26
_JSON_DEPTH = 100


def open_regular(path: pathlib.Path) -> BinaryIO:
  """Opens a file to be read, if it is one that is sure to end.

  Raises:
    OSError: it cannot be opened, or is a folder, a pipe or a device; to read
      from these can fail, wait or go on for ever.
  """
  check_regular(path)  # To open a device can change it.
  flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
  descriptor = os.open(path, flags)
  try:
    _check_regular(path, os.fstat(descriptor))  # It may have been exchanged.
  except OSError:
    os.close(descriptor)
    raise
  return os.fdopen(descriptor, 'rb')


def check_regular(path: pathlib.Path) -> None:
  """Raises OSError unless there is a file (or a link to one) at `path`."""
  _check_regular(path, os.stat(path))


def _check_regular(path: pathlib.Path, found: os.stat_result):
  if not stat.S_ISREG(found.st_mode):
    what = 'a folder' if stat.S_ISDIR(found.st_mode) else 'a pipe or a device'
    raise OSError(errno.EINVAL, f'is {what}, not a file', str(path))


def read_json(path: pathlib.Path) -> Any:
  """What a JSON file holds.

  Raises:
    OSError: it cannot be read, or is not a file.
    ValueError: it is not JSON, or too large or too deeply nested to be ours.
  """
  with open_regular(path) as file:
    content = file.read(_JSON_BYTES + 1)
  if len(content) > _JSON_BYTES:
    raise ValueError(f'more than {_JSON_BYTES >> 20} MiB')
  return parse_json(content.decode())


def parse_json(text: str) -> Any:
  """What a text in JSON says.

  Raises:
    ValueError: it is not JSON, or too deeply nested to be ours.
  """
  too_deep = f'brackets nested more than {_JSON_DEPTH} deep'
  try:
    value = json.loads(text)
  except RecursionError as error:
    raise ValueError(too_deep) from error
  level = [value]
  for _ in range(_JSON_DEPTH + 1):
    level = [
      inner
      for outer in level
      if isinstance(outer, dict | list)
      for inner in (outer.values() if isinstance(outer, dict) else outer)
    ]
  if level:
    raise ValueError(too_deep)
  return value


def sha256(path: pathlib.Path) -> str:
  """Of a file's bytes, in hexadecimal."""
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def remove(path: pathlib.Path) -> None:
  """Deletes a file or a folder as far as possible, and never fails."""
  # `rmtree` opens what it is given, and waits for ever if that is a pipe.
  if os.path.isdir(path) and not os.path.islink(path):
    shutil.rmtree(path, ignore_errors=True)
  else:
    with contextlib.suppress(OSError):
      path.unlink()


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes a file and flushes it to the disk."""
  with naming(path), path.open('w', encoding='utf-8') as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())


def sync(path: pathlib.Path) -> None:
  """Flushes a file or a directory to the disk."""
  with naming(path):
    _sync(path)


def _sync(path: pathlib.Path) -> None:
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def write_json(path: pathlib.Path, value: Any):
  """Writes a file in one step: a crash leaves the old one or the new one."""
  replace_text(path, json.dumps(value, indent=1, default=list) + '\n')


def replace_text(path: pathlib.Path, text: str):
  """Writes a file in one step: a crash leaves the old one or the new one."""
  with _in_one_step(path, f'.{path.name}.tmp') as temporary:
    temporary.write_text(text, encoding='utf-8')


def write_arrays(path: pathlib.Path, arrays: dict[str, Any]):
  """Writes an .npz of plain arrays in one step."""
  with _in_one_step(path, f'.{path.stem}.tmp.npz') as temporary:
    np.savez(temporary, **{k: np.asarray(v) for k, v in arrays.items()})


@contextlib.contextmanager
def _in_one_step(path: pathlib.Path, name: str) -> Iterator[pathlib.Path]:
  """Puts what the block writes in place of `path`, once it is on the disk."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(name)
  try:
    with naming(path):
      yield temporary
      _sync(temporary)
      os.replace(temporary, path)
      _sync(path.parent)
  except OSError:
    with contextlib.suppress(OSError):
      temporary.unlink()  # Half a file takes room on a full disk.
    raise


@contextlib.contextmanager
def naming(path: pathlib.Path) -> Iterator[None]:
  """Errors that do not say which file they are about (a full disk) get it."""
  try:
    yield
  except OSError as error:
    if error.filename is None:
      error.filename = str(path)
    raise
