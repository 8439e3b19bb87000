"""Writing files so that they are on the disk, and what is in them."""

import hashlib
import json
import os
import pathlib
from typing import Any

import numpy as np


def sha256(path: pathlib.Path) -> str:
  """Of a file's bytes, in hexadecimal."""
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes a file and flushes it to the disk."""
  with path.open('w', encoding='utf-8') as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())


def sync(path: pathlib.Path) -> None:
  """Flushes a file or a directory to the disk."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def write_json(path: pathlib.Path, value: Any):
  """Writes a file in one step: a crash leaves the old one or the new one."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f'.{path.name}.tmp')
  write_text(temporary, json.dumps(value, indent=1, default=list) + '\n')
  _put_in_place(temporary, path)


def write_arrays(path: pathlib.Path, arrays: dict[str, Any]):
  """Writes an .npz of plain arrays in one step."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f'.{path.stem}.tmp.npz')
  np.savez(temporary, **{k: np.asarray(v) for k, v in arrays.items()})
  sync(temporary)
  _put_in_place(temporary, path)


def _put_in_place(temporary: pathlib.Path, path: pathlib.Path):
  os.replace(temporary, path)
  sync(path.parent)
