"""`experiments.run`, one process of which gets a SIGTERM on the way.

  python stopped_run.py FILE PROCESS_ID FLAGS...

The signal comes as soon as there is such a file.
"""

import os
import pathlib
import runpy
import signal
import sys
import threading
import time


def _stop_once(path):
  while not path.exists():
    time.sleep(0.01)
  os.kill(os.getpid(), signal.SIGTERM)


if __name__ == '__main__':
  file, process_id = sys.argv[1:3]
  del sys.argv[1:3]
  if f'--process_id={process_id}' in sys.argv:
    threading.Thread(
      target=_stop_once, args=[pathlib.Path(file)], daemon=True
    ).start()
  runpy.run_module('experiments.run', run_name='__main__', alter_sys=True)
