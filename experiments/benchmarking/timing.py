"""Rates, compile times, and counts of compilations."""

from collections.abc import Callable
import statistics
import time
from typing import Any

import jax

_COMPILE_EVENT = '/jax/core/compile/backend_compile_duration'


def rounded(value: float) -> float:
  """Four significant digits."""
  return float(f'{value:.4g}')


class CompileLog:
  """Counts the programs that XLA compiles, from jax.monitoring."""

  def __init__(self):
    self._programs = 0
    jax.monitoring.register_event_duration_secs_listener(self._listen)

  def _listen(self, event, duration, **unused):
    del duration, unused
    self._programs += event == _COMPILE_EVENT

  def during(self, work: Callable[[], Any]) -> int:
    """Runs `work`; how many programs were compiled in it."""
    before = self._programs
    work()
    return self._programs - before


class EventCount:
  """Counts an event of jax.monitoring from now on.

  Attributes:
    number: so far.
  """

  def __init__(self, event: str):
    self._event = event
    self.number = 0
    jax.monitoring.register_event_listener(self._listen)

  def _listen(self, event, **unused):
    del unused
    self.number += event == self._event


def compile_seconds(call: Callable[[], Any]) -> float:
  """Wall seconds of tracing and compiling: the first call less the second."""
  begin = time.perf_counter()
  call()
  first = time.perf_counter()
  call()
  return max(0.0, 2 * first - begin - time.perf_counter())


class Timed:
  """A repeatable piece of work with its rates.

  Args:
    call: does `units` units of work and waits for the result.
    units: of work per call.
    repeat_s: wall seconds per timing.

  Attributes:
    call: as above.
    rates: units per second of each timing so far.
  """

  def __init__(self, call: Callable[[], Any], units: float, repeat_s: float):
    self.call = call
    self._units = units
    self._repeat_s = repeat_s
    self.rates: list[float] = []

  def measure(self):
    """One more timing."""
    begin = time.perf_counter()
    calls = 0
    while not calls or time.perf_counter() - begin < self._repeat_s:
      self.call()
      calls += 1
    self.rates.append(calls * self._units / (time.perf_counter() - begin))

  @property
  def rate(self) -> float:
    """Median units per second."""
    return statistics.median(self.rates)

  @property
  def spread(self) -> list[float]:
    """Lowest and highest rate, rounded."""
    return [rounded(min(self.rates)), rounded(max(self.rates))]
