"""`experiments.run` several times in the same processes.

  python several_runs.py COMMANDS CONNECTION...

Starting and connecting processes costs more than most of what they are tested
on. COMMANDS is a JSON file with a list of {'flags': [...], 'stop': [FILE,
PROCESS_ID] or None}: as soon as there is such a file, that process gets a
SIGTERM. Flags keep their values from one command to the next. What a command
prints comes after a line '=== NUMBER', in both streams; what it prints last, on
stdout, are the exit statuses up to then. A command that fails ends its process:
let it be the last.
"""

import json
import os
import pathlib
import signal
import sys
import threading
import time
from unittest import mock

from absl import flags


def _stop_once(path):
  while not path.exists():
    time.sleep(0.01)
  os.kill(os.getpid(), signal.SIGTERM)


def main():
  commands = json.loads(pathlib.Path(sys.argv.pop(1)).read_text())
  connection, statuses = sys.argv[1:], []
  for number, command in enumerate(commands):
    print(f'=== {number}', flush=True)
    print(f'=== {number}', file=sys.stderr, flush=True)
    sys.argv[1:] = command['flags'] + connection
    # Not before there are flags to be defined from.
    from experiments import run
    from experiments.runs import configuration
    from offmeta import processes
    from offmeta.results import panels, plots

    flags.FLAGS.unparse_flags()
    rest = configuration.parse_flags(sys.argv)
    file, process_id = command['stop'] or (None, None)
    if f'--process_id={process_id}' in connection:
      threading.Thread(
        target=_stop_once, args=[pathlib.Path(file)], daemon=True
      ).start()
    connect = (lambda **kw: None) if number else processes.start
    with (
      mock.patch.object(processes, 'start', connect),  # once
      # Reports are drawn in other tests.
      mock.patch.object(plots, 'draw_all', lambda *args: {}),
      mock.patch.object(panels, 'logged', lambda *args: {}),
    ):
      statuses.append(run.main(rest))
    print(json.dumps(statuses), flush=True)


if __name__ == '__main__':
  main()
