"""Writes the report of a run: numbers, tables, pictures, one HTML page."""

import io
import json
import os
import pathlib
import tempfile
from typing import Any

from offmeta import disk
from offmeta.results import (
  drawing,
  page,
  panels,
  plots,
  records,
  summary as summary_lib,
  tables,
)

text_table = tables.text_table


def build(workdir: str | pathlib.Path) -> dict[str, Any]:
  """Writes WORKDIR/report/ and returns the summary.

  Numbers and tables are written before pictures, so that a failure to draw
  leaves them in place. Each file is replaced in one step.

  Args:
    workdir: what `experiments.run --workdir` was given.

  Returns:
    The contents of summary.json.

  Raises:
    ValueError: the workdir is no run, or its files are damaged; the message
      says what, where and what to do.
    ImportError: matplotlib is missing.
  """
  record = records.load(workdir)
  summary = summary_lib.summarize(record)
  folder = record.workdir / 'report'
  folder.mkdir(parents=True, exist_ok=True)
  text = json.dumps(summary, indent=2, allow_nan=False) + '\n'
  write_atomic(folder / 'summary.json', text.encode())
  for name, render in (
    ('table.txt', tables.text_table),
    ('table.csv', tables.csv_table),
    ('table.md', tables.markdown_table),
  ):
    write_atomic(folder / name, render(summary).encode())
  pictures = {
    name: drawing.to_png(figure)
    for name, figure in plots.draw_all(record, summary).items()
  }
  # There are many: they should weigh little.
  logged = {
    name: drawing.to_png(figure, dpi=80)
    for name, figure in panels.logged(record).items()
  }
  for name, png in pictures.items():
    write_atomic(folder / f'{name}.png', png)
  for name, png in logged.items():
    write_atomic(folder / f'metrics-{name.replace("/", "-")}.png', png)
  write_atomic(
    folder / 'index.html',
    page.render(record, summary, pictures, logged).encode(),
  )
  return summary


def write_atomic(path: pathlib.Path, data: bytes) -> None:
  """Writes a file so that a reader sees the old or the new, never a part."""
  handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.')
  try:
    with disk.naming(path), io.open(handle, 'wb') as stream:
      stream.write(data)
      stream.flush()
      os.fsync(stream.fileno())
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)
  except BaseException:
    pathlib.Path(temporary).unlink(missing_ok=True)
    raise
