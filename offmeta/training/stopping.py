"""Asking a run to save and stop."""

import signal


class Interrupted(Exception):
  """The process was asked to stop; everything needed to go on is saved."""


class StopRequest:
  """Turns SIGTERM into a request that the loop honours at the next chunk."""

  def __init__(self):
    self.requested = False

  def install(self):
    """Starts listening (main thread only)."""
    signal.signal(signal.SIGTERM, self._on_signal)

  def _on_signal(self, number, frame):
    del number, frame
    self.requested = True
