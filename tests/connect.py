"""The frame of a program that `processes.run_processes` runs several times."""

import argparse
from collections.abc import Callable
import os
import pathlib
import traceback

from offmeta import processes


def run(main: Callable[[pathlib.Path], None]):
  """Connects the processes and calls `main` with the folder of the test."""
  parser = argparse.ArgumentParser()
  parser.add_argument('folder', type=pathlib.Path)
  for name, kind in (
    ('coordinator', str),
    ('num_processes', int),
    ('process_id', int),
  ):
    parser.add_argument(f'--{name}', type=kind)
  args = parser.parse_args()
  try:
    processes.start(args.coordinator, args.num_processes, args.process_id)
    main(args.folder)
  except BaseException:
    traceback.print_exc()
    os._exit(1)  # At a normal exit jax waits for the other process.
