"""Writing files so that they are on the disk, and what is in them."""

import hashlib
import os
import pathlib


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
