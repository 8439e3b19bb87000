"""The start of a program that `processes.run_processes` runs several times."""

import argparse
import pathlib

from offmeta import processes


def folder() -> pathlib.Path:
  """Connects the processes; returns the folder that the test gave them."""
  parser = argparse.ArgumentParser()
  parser.add_argument('folder', type=pathlib.Path)
  for name, kind in (
      ('coordinator', str), ('num_processes', int), ('process_id', int)):
    parser.add_argument(f'--{name}', type=kind)
  args = parser.parse_args()
  processes.start(args.coordinator, args.num_processes, args.process_id)
  return args.folder
