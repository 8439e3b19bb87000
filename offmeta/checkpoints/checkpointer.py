"""Checkpoints: a whole pytree on disk, all or nothing.

A checkpoint is `<directory>/<step>/` with the arrays, written by Orbax, and a
`record.json` with the step, the configuration's hash, every leaf's path, shape
and dtype, the size and CRC-32 of every file, and a digest of all this. It is
written under a temporary name and renamed when complete, so a directory that is
named by a number was once whole; the record tells whether it still is. Whoever
restores an older checkpoint than the newest that can be seen is warned.

Of several processes each writes its part of the arrays into the same files;
all else is done by the main process, and the others do what it has decided. A
checkpoint does not depend on how many processes wrote it.

The free functions `ocp.save` and `ocp.load` are used rather than
`ocp.training.Checkpointer` (orbax 0.12): after one failed save, its later saves
raise the first failure again; it reads a damaged metadata file as an absent
one; and it discards old checkpoints before a caller could check the new one.
"""

from collections.abc import Callable, Iterator
import contextlib
import operator
import os
import pathlib
import re
import shutil
from typing import Any
import warnings

import jax
from orbax.checkpoint import v1 as ocp

from offmeta import disk, parallel, processes
from offmeta.checkpoints import files, leaves as leaves_lib
from offmeta.checkpoints.files import CheckpointError

_STATE = 'state'
# Before the step in names of what is being written, is being replaced, or was
# found damaged.
_TEMPORARY = '.tmp-'
_REPLACED = '.old-'
_DAMAGED = 'damaged-'

# How long a process waits for the others: so many seconds, and what a slow
# file system takes for the data.
_PATIENCE_S = 120.0
_SLOW_BYTES_PER_S = 10e6


class Checkpointer:
  """Saves and restores pytrees under one directory, for one configuration.

  One program at a time may use a directory. If it has several processes, the
  directory must be on a file system that they share, and all of them call the
  same methods in the same order; each holds what `layout` says of the arrays.
  """

  def __init__(
    self,
    directory: str | os.PathLike[str],
    config_hash: str,
    keep: int = 2,
    layout: parallel.Layout | None = None,
  ):
    """Opens a directory, creating it if need be, and clears interrupted writes.

    Args:
      directory: where the checkpoints are.
      config_hash: identifies the configuration; a checkpoint of another one is
        refused.
      keep: how many of the newest checkpoints stay; at least 1. With 2 or more
        there is one to fall back to when the newest gets damaged.
      layout: which seeds this process has; one process needs none.

    Raises:
      ValueError: if keep is below 1, or several processes have no layout.
      CheckpointError: if the directory cannot be used.
    """
    if keep < 1:
      raise ValueError(f'keep must be at least 1, got {keep}')
    several = jax.process_count() > 1
    if several and layout is None:
      raise ValueError('with several processes, say who has what: layout')
    self._directory = pathlib.Path(directory).absolute()
    self._config_hash = config_hash
    self._keep = keep
    self._layout = layout if several else None
    try:
      processes.on_main(self._open)
      processes.in_all(
        lambda: processes.await_directory(self._directory, _PATIENCE_S)
      )
    except (OSError, processes.ProcessError) as error:
      raise CheckpointError(
        f'{self._directory}: cannot be used for checkpoints: {error}'
      ) from error

  def save(self, step: int, tree: Any) -> None:
    """Writes a checkpoint; when this returns it is on the disk.

    Args:
      step: at least 0 and not below the latest saved step; at the same step it
        replaces it.
      tree: pytree of jax arrays (typed keys too), numpy arrays and numbers.
        Of several processes that serve different seeds, each gives leaves
        [S, ...] of its own; what has no axis is the same in all.

    Raises:
      ValueError: if the step is below 0.
      CheckpointError: if it could not be written (a full disk, for one), by
        whichever process. The checkpoints that were there before are
        untouched.
    """
    step = operator.index(step)
    if step < 0:
      raise ValueError(f'step must be at least 0, got {step}')
    steps = self._on_main(self._steps)
    if steps and step < steps[-1]:
      raise CheckpointError(
        f'{self._directory}: step {step} is before the latest checkpoint,'
        f' {steps[-1]}; to branch off an earlier one, use another directory'
      )
    leaves = leaves_lib.flatten(tree)
    temporary = self._path(step, _TEMPORARY)
    try:
      self._write(temporary, step, leaves)
      processes.on_main(lambda: self._put_in_place(temporary, step))
    except Exception as error:
      message = self._write_message(temporary, step, leaves, error)
      raise CheckpointError(message) from error
    finally:
      if processes.is_main():
        disk.remove(temporary)

  def latest_step(self) -> int | None:
    """The newest step that was saved completely; None if there is none.

    If there is none, but something that looks like one under another name, a
    warning says so: what starts from the beginning now could perhaps go on.

    Raises:
      CheckpointError: if the directory cannot be read.
    """
    found = self._on_main(self._look)
    if found['steps']:
      return found['steps'][-1]
    for unused in found['unused'] if processes.is_main() else []:
      warnings.warn(
        f'{self._directory}: there is no checkpoint; {unused}', stacklevel=2
      )
    return None

  def restore(self, template: Any, step: int | None = None) -> Any:
    """Reads a checkpoint back, bit for bit.

    Without a step it takes the newest one that is intact. Damaged newer ones
    are then reported by a warning and renamed to `damaged-<step>`, so that
    `latest_step` and the next `save` agree with what was restored. So are
    newer ones that have another name than their step, which are left alone.

    Args:
      template: pytree with the structure, shapes and dtypes to expect, of this
        process. Where a leaf is an array committed to a sharding, or a
        ShapeDtypeStruct with one, the result has that sharding, whatever it
        was saved with; any other jax leaf comes back uncommitted, numpy leaves
        and numbers as such.
      step: which checkpoint; None is the newest intact one.

    Returns:
      A tree like the template.

    Raises:
      CheckpointError: if there is no intact checkpoint, or it belongs to
        another configuration, or its tree is not the template's.
    """
    chosen = self._on_main(lambda: self._choose(step))
    used, damaged = chosen['step'], chosen['damaged']
    try:
      result = processes.in_all(
        lambda: self._read_tree(used, chosen['leaves'], template)
      )
    except processes.ProcessError as error:
      raise CheckpointError(str(error)) from error
    self._on_main(lambda: self._set_aside([number for number, _ in damaged]))
    reasons = chosen['unused'] + [
      f'the checkpoint of step {number} is damaged ({why}); moved to'
      f' {_DAMAGED}{number}'
      for number, why in damaged
    ]
    for reason in reasons if processes.is_main() else []:
      warnings.warn(
        f'{self._directory}: {reason}, continuing from step {used}',
        stacklevel=2,
      )
    return result

  def close(self) -> None:
    """Nothing is pending after `save`; here for the shape of the interface."""

  def _on_main(self, work: Callable[[], Any]) -> Any:
    """`processes.on_main`, whose failures are CheckpointErrors."""
    try:
      return processes.on_main(work)
    except OSError as error:
      raise CheckpointError(
        f'{self._directory}: cannot be used for checkpoints: {error}'
      ) from error
    except processes.ProcessError as error:
      raise CheckpointError(str(error)) from error

  # In the main process.

  def _path(self, step: int, prefix: str = '') -> pathlib.Path:
    return self._directory / f'{prefix}{step}'

  def _open(self) -> None:
    """Makes the directory and completes what a killed process had begun."""
    self._directory.mkdir(parents=True, exist_ok=True)
    for step, replaced in self._leftovers(_REPLACED):
      final = self._path(step)
      if not final.exists():
        replaced.rename(final)
      elif not files.is_whole(final, step) and files.is_whole(replaced, step):
        self._set_aside([step])
        replaced.rename(final)
        warnings.warn(
          f'{self._directory}: the checkpoint of step {step} is damaged; moved'
          f' to {_DAMAGED}{step}, what it had replaced is in its place again',
          stacklevel=3,
        )
      else:
        disk.remove(replaced)
    for step, temporary in self._leftovers(_TEMPORARY):
      if self._path(step).exists() or not _has_record(temporary):
        disk.remove(temporary)  # It was never complete, or not needed.
      else:  # All that it lacked was its name.
        temporary.rename(self._path(step))

  def _leftovers(self, prefix: str) -> Iterator[tuple[int, pathlib.Path]]:
    """What is called by the prefix and a step."""
    for path in sorted(self._directory.glob(f'{prefix}*')):
      step = _step_of_name(path.name.removeprefix(prefix))
      if step is not None:
        yield step, path

  def _steps(self) -> list[int]:
    """The steps, ascending, whose checkpoints were once complete."""
    steps = [_step_of_name(path.name) for path in self._directory.iterdir()]
    return sorted(step for step in steps if step is not None)

  def _look(self) -> dict[str, Any]:
    steps = self._steps()
    return {'steps': steps, 'unused': [] if steps else self._unused(-1)}

  def _unused(self, step: int) -> list[str]:
    """In words, what looks newer than this step and has another name."""
    found = []
    for path in sorted(self._directory.iterdir()):
      if _step_of_name(path.name) is not None:
        continue
      number = _step_of_content(path)
      if number is not None and number > step:
        found.append(
          f'{path.name!r} looks like the checkpoint of step {number} and is not'
          f' used under this name (if it is whole, rename it to {number} and'
          ' run the same command again; else move it away)'
        )
    return found

  def _write_record(
    self, path: pathlib.Path, step: int, leaves: dict[str, Any]
  ) -> None:
    described = {
      k: leaves_lib.describe(v, self._layout) for k, v in leaves.items()
    }
    files.write_record(path, step, self._config_hash, described)

  def _put_in_place(self, temporary: pathlib.Path, step: int) -> None:
    """Gives a complete checkpoint its name, and deletes what it replaces."""
    replaced, final = self._path(step, _REPLACED), self._path(step)
    try:
      if final.exists():
        final.rename(replaced)
      temporary.rename(final)
      disk.sync(self._directory)
    except Exception:
      if replaced.exists() and not final.exists():
        replaced.rename(final)
      raise
    disk.remove(replaced)
    for old in self._steps()[: -self._keep]:
      disk.remove(self._path(old))

  def _choose(self, step: int | None) -> dict[str, Any]:
    """The checkpoint to restore, its leaves, and which newer are not used."""
    steps = self._steps()
    if step is not None and step not in steps:
      raise CheckpointError(
        f'{self._directory}: no checkpoint of step {step}; there are'
        f' {steps or "none"}'
      )
    if not steps:
      raise CheckpointError(
        '; '.join(
          [f'{self._directory}: there is no checkpoint', *self._unused(-1)]
        )
      )
    damaged: list[tuple[int, str]] = []
    for candidate in reversed(steps) if step is None else [step]:
      path = self._path(candidate)
      try:
        record = files.read_record(path)
        files.check_step(record, candidate)
        self._check_hash(path, record)
        files.check_files(path, record)
      except files.DamagedError as error:
        damaged.append((candidate, str(error)))
        continue
      return {
        'step': candidate,
        'leaves': record['leaves'],
        'damaged': damaged,
        'unused': self._unused(candidate) if step is None else [],
      }
    reasons = [f'step {s}: {why}' for s, why in damaged] + self._unused(-1)
    raise CheckpointError(
      f'{self._directory}: no intact checkpoint: {"; ".join(reasons)}. Move the'
      ' directory away to start again from the beginning'
    )

  def _check_hash(self, path: pathlib.Path, record: dict[str, Any]) -> None:
    if record['config_hash'] != self._config_hash:
      raise CheckpointError(
        f'{path}: this checkpoint was written by configuration'
        f' {record["config_hash"]}, the present one is {self._config_hash}.'
        ' Use another --workdir, or the configuration it was started with'
      )

  def _set_aside(self, steps: list[int]) -> None:
    for step in steps:
      target = self._path(step, _DAMAGED)
      disk.remove(target)
      self._path(step).rename(target)

  def _kept(self) -> str:
    """In words, what there is when a checkpoint could not be written."""
    try:
      known = [(step, self._path(step)) for step in self._steps()]
      known += self._leftovers(_REPLACED)  # The next start puts these back.
    except OSError as error:
      return f'Whether an earlier checkpoint is intact is unknown: {error}'
    for step, path in sorted(known, reverse=True):
      if files.is_whole(path, step):
        return f'The checkpoint of step {step} is intact'
    if known:
      return f'No earlier checkpoint in {self._directory} is intact'
    return (
      f'{self._directory} has no earlier checkpoint; what other folders hold is'
      ' untouched'
    )

  # In every process.

  def _write(
    self, path: pathlib.Path, step: int, leaves: dict[str, Any]
  ) -> None:
    """Writes arrays and record into `path` and flushes them to the disk."""
    processes.on_main(lambda: files.make_empty(path))
    processes.in_all(lambda: self._write_arrays(path, leaves))
    processes.on_main(lambda: self._write_record(path, step, leaves))

  def _write_arrays(self, path: pathlib.Path, leaves: dict[str, Any]) -> None:
    # Orbax has no arrays of size zero; the record is enough to remake them.
    arrays = {
      k: leaves_lib.to_disk(v, self._layout)
      for k, v in leaves.items()
      if leaves_lib.size(v)
    }
    if not arrays:
      return
    context = ocp.Context()
    # In the background, a directory that cannot be made shows as a time-out.
    context.async_options.create_directories_asynchronously = False
    if self._layout is not None:
      # When one process fails, the others learn of it after this time.
      total = leaves_lib.total_bytes(leaves, self._layout)
      context.async_options.timeout_secs = int(
        _PATIENCE_S + total / _SLOW_BYTES_PER_S
      )
    with context, files.quiet():
      ocp.save(path / _STATE, arrays)

  def _write_message(
    self,
    path: pathlib.Path,
    step: int,
    leaves: dict[str, Any],
    error: Exception,
  ) -> str:
    where = str(getattr(error, 'filename', None) or path)
    reason = str(error)
    if where not in reason:
      reason = f'{where}: {reason}'
    if files.is_full(error):
      reason = (
        'the disk is full, or a quota or file size limit is reached, at'
        f' {where}'
      )
      with contextlib.suppress(OSError):
        free = shutil.disk_usage(self._directory).free / 1e6
        need = leaves_lib.total_bytes(leaves, self._layout) / 1e6
        reason += f' ({need:.0f} MB to write, {free:.0f} MB free)'
      reason += '; make room and run the same command again'
    return (
      f'{self._directory}: could not write the checkpoint of step {step}:'
      f' {reason}. {processes.on_main(self._kept)}'
    )

  def _read_tree(self, step: int, stored: dict[str, Any], template: Any) -> Any:
    """Restores an intact checkpoint into the template's shardings."""
    path = self._path(step)
    leaves = leaves_lib.flatten(template)
    wrong = leaves_lib.mismatch(leaves, stored, self._layout)
    if wrong is not None:
      raise CheckpointError(f'{path}: {wrong}')
    abstract = {
      k: leaves_lib.abstract(v, self._layout)
      for k, v in leaves.items()
      if leaves_lib.size(v)
    }
    arrays: dict[str, Any] = {}
    if abstract:
      try:
        with files.quiet():
          arrays = ocp.load(path / _STATE, abstract)
      except Exception as error:
        raise CheckpointError(
          f'{path}: the files are intact but cannot be read: {error}'
        ) from error
    placed = [
      leaves_lib.from_disk(arrays.pop(k, None), v, self._layout)
      for k, v in leaves.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(template), placed)


def _step_of_name(name: str) -> int | None:
  """The step whose checkpoint has this name; only one name is its own."""
  return int(name) if re.fullmatch('0|[1-9][0-9]*', name) else None


def _step_of_content(path: pathlib.Path) -> int | None:
  """The step of what is, or was, a checkpoint under whatever name."""
  with contextlib.suppress(files.DamagedError, CheckpointError):
    return files.read_record(path)['step']
  name = path.name.removeprefix(_DAMAGED)
  return int(name) if name.isdecimal() else None


def _has_record(path: pathlib.Path) -> bool:
  """Whether a checkpoint was written to its end; it may be damaged since."""
  try:
    files.read_record(path)
  except files.DamagedError:
    return False
  except CheckpointError:  # Of another version: not ours to delete.
    return True
  return True
