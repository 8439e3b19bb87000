"""Metric writers: JSON lines, TensorBoard, the console.

Every writer takes `write(step, values, iteration=..., env_steps=...)`, where a
value is a number or one number per seed [S]; a metric may appear in any row.
`truncate_after(step)` forgets what a killed run wrote after the checkpoint that
it resumes from; call it before the first `write`. `close()` ends it.
"""

import collections
from collections.abc import Mapping, Sequence
import contextlib
import json
import math
import os
import pathlib
import sys
import time
from typing import Any, Protocol, TextIO

import numpy as np
import tensorboardX

from offmeta import disk
from offmeta.results import records

Values = Mapping[str, Any]  # name -> [] or [S], anything numpy can read

_RATE_WINDOW = 20  # writes over which the console averages the rate


class DivergenceError(RuntimeError):
  """A metric is NaN or infinite: going on would waste the run."""


class MetricsFileError(ValueError):
  """A file of metrics from before that cannot be read."""


class MetricWriter(Protocol):
  """What the training loop needs from a writer."""

  def write(
    self, step: int, values: Values, *, iteration: int = 0, env_steps: int = 0
  ) -> None:
    """Records one row.

    Args:
      step: updates so far, over all stages.
      values: name -> number or [S].
      iteration: online iterations so far.
      env_steps: environment steps so far.

    Raises:
      ValueError: if a value is neither a number nor a vector of them.
    """

  def truncate_after(self, step: int) -> None:
    """Forgets rows later than the step."""

  def close(self) -> None:
    """Flushes and releases everything."""


class JsonlWriter:
  """One JSON object per line, flushed line by line.

  A row is {"step", "iteration", "env_steps", "wall_time_s", "values": {name:
  number or [S numbers]}}; NaN and infinities are null. The wall time counts the
  seconds during which a writer was open, over all resumptions of the run.
  """

  def __init__(self, path: str | os.PathLike[str]):
    """Opens a file for appending and drops a last line cut off by a kill.

    Args:
      path: the file; it and its directory are created if need be.

    Raises:
      MetricsFileError: if an earlier line is not a row of metrics.
      OSError: the file is a folder, a pipe or a device, or cannot be written.
    """
    self._path = pathlib.Path(path)
    self._path.parent.mkdir(parents=True, exist_ok=True)
    self._start = time.monotonic()
    self._file: TextIO | None = None
    self._keep_rows(None)

  def write(
    self, step: int, values: Values, *, iteration: int = 0, env_steps: int = 0
  ) -> None:
    """Appends a row; see `MetricWriter.write`."""
    if self._file is None:
      raise ValueError(f'{self._path}: written to after close()')
    row = {
      'step': int(step),
      'iteration': int(iteration),
      'env_steps': int(env_steps),
      'wall_time_s': round(self._offset + time.monotonic() - self._start, 3),
      'values': {k: _jsonable(_as_array(k, v)) for k, v in values.items()},
    }
    line = json.dumps(row, allow_nan=False) + '\n'
    with disk.naming(self._path):
      self._file.write(line)
      self._file.flush()

  def truncate_after(self, step: int) -> None:
    """Drops the rows whose step is greater."""
    self._keep_rows(step)

  def close(self) -> None:
    """Closes the file."""
    file, self._file = self._file, None
    if file is not None:
      with disk.naming(self._path):  # What could not be flushed is tried again.
        file.close()

  def _keep_rows(self, last_step: int | None) -> None:
    """Rewrites the file with its good rows up to a step, and opens it."""
    self.close()
    lines = []
    if self._path.exists():
      # A killed write can end inside a multi-byte character.
      with disk.open_regular(self._path) as file:
        text = file.read().decode(errors='replace')
      lines = text.splitlines(keepends=True)
    kept, seconds = [], 0.0
    for number, line in enumerate(lines, 1):
      row = _parse_row(line)
      if row is None:
        if number == len(lines):
          break
        raise MetricsFileError(
          f'{self._path}: line {number} is not a row of metrics; repair the'
          ' file or move it away'
        )
      if last_step is None or row['step'] <= last_step:
        kept.append(line)
        seconds = max(seconds, float(row['wall_time_s']))
    if len(kept) != len(lines):
      disk.replace_text(self._path, ''.join(kept))
    self._offset = seconds
    self._file = self._path.open('a', encoding='utf-8')


class TensorBoardWriter:
  """Scalars for TensorBoard: the mean over seeds, and their spread.

  Metric `name` becomes `name` (mean of the finite seeds) and, if there are
  several seeds, `name/seed_std`.
  """

  def __init__(self, directory: str | os.PathLike[str]):
    """Remembers the directory; files appear with the first row."""
    self._directory = os.fspath(directory)
    self._writer: tensorboardX.SummaryWriter | None = None
    self._purge_step: int | None = None

  def write(
    self, step: int, values: Values, *, iteration: int = 0, env_steps: int = 0
  ) -> None:
    """Adds scalars at a step; see `MetricWriter.write`."""
    if self._writer is None:
      self._writer = tensorboardX.SummaryWriter(
        self._directory, purge_step=self._purge_step
      )
    progress = {
      'progress/iteration': iteration,
      'progress/env_steps': env_steps,
    }
    for name, value in {**values, **progress}.items():
      array = _as_array(name, value)
      finite = array[np.isfinite(array)]
      if finite.size:
        self._writer.add_scalar(name, float(finite.mean()), step)
      if finite.size and array.ndim and array.size > 1:
        self._writer.add_scalar(f'{name}/seed_std', float(finite.std()), step)

  def truncate_after(self, step: int) -> None:
    """Tells TensorBoard to hide the points after a step.

    Raises:
      ValueError: after the first row.
    """
    if self._writer is not None:
      raise ValueError('truncate_after must come before the first write')
    self._purge_step = step + 1

  def close(self) -> None:
    """Flushes and closes the event file."""
    if self._writer is not None:
      self._writer.close()
      self._writer = None


class ConsoleWriter:
  """One line of progress: step, rate, elapsed time, time left.

  On a terminal the line is redrawn in place; elsewhere (a log file) a new line
  comes at most once per interval, plus the last one at the end.
  """

  def __init__(
    self,
    total_steps: int,
    label: str,
    *,
    show: Sequence[str] = (),
    stream: TextIO | None = None,
    interval: float = 10.0,
  ):
    """Starts the clock.

    Args:
      total_steps: the step at which the work is done.
      label: what is being done, e.g. 'offline'.
      show: metrics to show beside the progress, as means over seeds.
      stream: where to print; None is standard error.
      interval: least seconds between lines where there is no terminal.
    """
    self._total = total_steps
    self._label = label
    self._show = tuple(show)
    self._stream = sys.stderr if stream is None else stream
    self._tty = self._stream.isatty()
    self._interval = 0.1 if self._tty else interval
    self._start = time.monotonic()
    self._printed = -math.inf
    self._pending: str | None = None
    self._width = 0
    self._history: collections.deque[tuple[float, int]] = collections.deque(
      maxlen=_RATE_WINDOW
    )

  def write(
    self, step: int, values: Values, *, iteration: int = 0, env_steps: int = 0
  ) -> None:
    """Shows the progress if it is time to; see `MetricWriter.write`."""
    del iteration, env_steps
    now = time.monotonic()
    self._history.append((now, step))
    self._pending = self._line(now, step, values)
    if now - self._printed >= self._interval:
      self._print(now)

  def truncate_after(self, step: int) -> None:
    """What was printed stays; the rate counts from the next row on."""
    del step
    self._history.clear()

  def close(self) -> None:
    """Prints the last row if it was held back, and ends the line."""
    if self._pending is not None:
      self._print(time.monotonic())
    if self._tty and self._width:
      self._stream.write('\n')
      self._width = 0
    self._stream.flush()

  def _line(self, now: float, step: int, values: Values) -> str:
    (first_time, first_step), *_ = self._history
    rate = None
    if now > first_time and step > first_step:
      rate = (step - first_step) / (now - first_time)
    parts = [
      f'{self._label} {step}/{self._total}',
      f'{100 * step / max(self._total, 1):.0f}%',
      '-- updates/s' if rate is None else f'{rate:.4g} updates/s',
      f'{_duration(now - self._start)} elapsed',
    ]
    if rate is not None:
      left = max(self._total - step, 0) / rate
      parts.append(f'{_duration(left)} left')
    for name in self._show:
      if name in values:
        mean = float(np.mean(_as_array(name, values[name])))
        parts.append(f'{name} {mean:.4g}')
    return '  '.join(parts)

  def _print(self, now: float) -> None:
    line, self._pending = self._pending, None
    if self._tty:
      self._stream.write('\r' + line.ljust(self._width))
      self._width = len(line)
    else:
      self._stream.write(line + '\n')
    self._stream.flush()
    self._printed = now


class MultiWriter:
  """Several writers as one."""

  def __init__(self, writers: Sequence[MetricWriter]):
    """Takes the writers over; `close` closes them all."""
    self._writers = tuple(writers)

  def write(
    self, step: int, values: Values, *, iteration: int = 0, env_steps: int = 0
  ) -> None:
    """Writes the row to each, fetching it from the device once."""
    host = {name: _as_array(name, value) for name, value in values.items()}
    for writer in self._writers:
      writer.write(step, host, iteration=iteration, env_steps=env_steps)

  def truncate_after(self, step: int) -> None:
    """Truncates each."""
    for writer in self._writers:
      writer.truncate_after(step)

  def close(self) -> None:
    """Closes each, also when one of them fails."""
    with contextlib.ExitStack() as stack:
      for writer in reversed(self._writers):
        stack.callback(writer.close)


def read_series(path: pathlib.Path) -> dict[str, records.Series]:
  """What a `JsonlWriter` wrote, by metric.

  Raises:
    MetricsFileError: the file cannot be read.
  """
  try:
    return records.load_metrics(path)
  except ValueError as error:
    raise MetricsFileError(str(error)) from error


def assert_finite(
  values: Values, where: str, *, step: int | None = None
) -> None:
  """Stops a run that has diverged.

  Args:
    values: name -> number or [S].
    where: what was running, for the message, e.g. 'offline phase smac'.
    step: the update at which it was seen; None if `where` says so.

  Raises:
    DivergenceError: if a value is NaN or infinite; names every such metric and
      the seeds.
    ValueError: if a value is neither a number nor a vector of them.
  """
  bad = []
  for name, value in values.items():
    array = _as_array(name, value)
    finite = np.isfinite(array)
    if finite.all():
      continue
    if array.ndim == 0:
      bad.append(f'{name} is {array}')
    else:
      seeds = np.flatnonzero(~finite)
      kind = 'NaN' if np.isnan(array).any() else 'infinite'
      bad.append(
        f'{name} is {kind} in seed{"s" if seeds.size > 1 else ""}'
        f' {", ".join(map(str, seeds))} of {array.size}'
      )
  if bad:
    at = where if step is None else f'{where}, step {step}'
    raise DivergenceError(
      f'training diverged at {at}: {"; ".join(bad)}. The last checkpoint,'
      ' written before this, is intact. Lower the learning rate or clip'
      ' gradients and start in another --workdir, or leave these seeds out'
    )


def _as_array(name: str, value: Any) -> np.ndarray:
  """A metric as a float array, [] or [S]."""
  try:
    array = np.asarray(value, np.float64)
  except (TypeError, ValueError) as error:
    raise ValueError(f'metric {name!r} is not numeric: {error}') from error
  if array.ndim > 1:
    raise ValueError(
      f'metric {name!r} has shape {array.shape}; write a number or one per seed'
    )
  return array


def _jsonable(array: np.ndarray) -> float | None | list[float | None]:
  values = [float(x) if math.isfinite(x) else None for x in array.reshape(-1)]
  return values if array.ndim else values[0]


def _parse_row(line: str) -> dict[str, Any] | None:
  """A complete row, or None."""
  if not line.endswith('\n'):
    return None
  try:
    row = disk.parse_json(line)
    is_row = (
      type(row['step']) is int
      and isinstance(row['values'], dict)
      and math.isfinite(row['wall_time_s'])
    )
  except (ValueError, TypeError, KeyError, OverflowError):
    return None
  return row if is_row else None


def _duration(seconds: float) -> str:
  """Seconds as 4:05 or 1:04:05."""
  minutes, second = divmod(round(seconds), 60)
  hour, minute = divmod(minutes, 60)
  if hour:
    return f'{hour}:{minute:02d}:{second:02d}'
  return f'{minute}:{second:02d}'
