"""Asking a run to save and stop."""

import contextlib
import os
import signal

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(Exception):
  """The process was asked to stop; everything needed to go on is saved."""


class StopRequest:
  """Turns SIGTERM and Ctrl-C into a request that the loop honours.

  It does at the next chunk. The second signal ends the process at once.
  """

  def __init__(self):
    self.requested = False

  def install(self):
    """Starts listening (main thread only)."""
    for number in _SIGNALS:
      signal.signal(number, self._on_signal)

  def _on_signal(self, number, frame):
    del frame
    self.requested = True
    for other in _SIGNALS:
      signal.signal(other, signal.SIG_DFL)
    # Not `print`: the signal may have come in the middle of one.
    name = 'SIGTERM' if number == signal.SIGTERM else 'Ctrl-C'
    with contextlib.suppress(OSError):  # nobody listens any more
      os.write(2, f'\n{name}: saving; once more to end at once\n'.encode())
