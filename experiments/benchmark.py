"""Measures speed: updates, environment steps, and where a run's time went.

  python -m experiments.benchmark --out=benchmark.json
  python -m experiments.benchmark --only=smac,pearl --out=benchmark.json
  python -m experiments.benchmark --only=env --out=environments.json
  python -m experiments.benchmark --only=workdir --workdir=runs/cheetah

Updates go through `offmeta.training.loop.make_update`, the code of real runs:
sampling included, one compiled scan over updates. The data are synthetic, the
sizes those of a profile: 'paper' (published networks and batches, cheetah_vel
observations), 'cpu' (the main job of experiments/configs/smac.py) or 'smoke'.
The ceiling is the rate of float32 matrix products on the same device,
measured in between the updates, because shared machines drift by 20%. FLOPs
are counted by formula (`benchmarking/flops.py`).

Environments: speed, stability and, on MJX, agreement with C MuJoCo, for every
family and backend. That takes long, so the file is written after each row,
and --resume goes on with it; a second command may add rows. This measures all
sizes on each family's own backend and one size on the others:

  --only=env --env_backends=default --out=environments.json
  --only=env --num_envs=64 --resume --out=environments.json
"""

from collections.abc import Callable
import dataclasses
import json
import os
import pathlib
import resource
import sys
from typing import Any

# Quiet before jax and its friends are imported.
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')

from absl import app, flags, logging  # pylint: disable=g-import-not-at-top
import jax

from experiments.benchmarking import BenchmarkError
from experiments.benchmarking import environments
from experiments.benchmarking import machine as machines
from experiments.benchmarking import options as option_flags
from experiments.benchmarking import report, updates, workdir
from experiments.benchmarking.flops import EVALUATIONS
from experiments.benchmarking.options import Options, PARTS
from experiments.benchmarking.timing import rounded
from offmeta.training.setup import write_json

Result = dict[str, Any]


def new_result() -> Result:
  """Nothing measured so far, on this machine."""
  return {
      'machine': machines.machine(),
      'versions': machines.versions(),
      'ceiling_gflops': None,
      'updates': [],
      'ceiling': {},
      **{table: [] for table in environments.TABLES},
  }


def load_result(path: pathlib.Path) -> Result:
  """An earlier result to go on with; a new one if there is no file.

  Raises:
    BenchmarkError: not a result, or of another machine or other versions.
  """
  new = new_result()
  if not path.is_file():
    return new
  try:
    old = json.loads(path.read_text())
    different = [
        f'{part}.{name}'
        for part in ('machine', 'versions') for name, value in new[part].items()
        if name != 'load_average' and old[part].get(name) != value]
  except (ValueError, TypeError, KeyError, AttributeError) as error:
    raise BenchmarkError(f'--resume: {path}: no result: {error!r}') from error
  if different:
    raise BenchmarkError(
        f'--resume: {path} was measured with another'
        f' {", ".join(different)}; give another --out')
  return {**new, **old}


def run(
    options: Options,
    result: Result | None = None,
    save: Callable[[Result], None] = lambda result: None,
) -> Result:
  """Measures and prints; returns what goes to the JSON file.

  Args:
    options: what to measure.
    result: of an earlier run, to go on with.
    save: called whenever there is something new.

  Raises:
    BenchmarkError: an option cannot be served; nothing was measured.
  """
  option_flags.validate(options)
  only = options.only or tuple(
      part for part in PARTS if part != 'workdir' or options.workdir)
  result = new_result() if result is None else result
  result['options'] = dataclasses.asdict(options)

  def finish():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    result['peak_memory_mb'] = rounded(usage.ru_maxrss / 1024)
    result['load_average_at_end'] = machines.load_average()
    save(result)

  algorithms = [name for name in EVALUATIONS if name in only]
  if algorithms:
    ceiling, rows = updates.measure_updates(options, algorithms)
    result.update(
        ceiling=ceiling, updates=rows,
        ceiling_gflops=ceiling['gflops'][ceiling['best']])
    finish()
  if 'env' in only:
    for name, backend in environments.cases(options):
      for _ in environments.measure(result, name, backend, options):
        finish()
  if 'workdir' in only:
    result['workdir'] = workdir.read_workdir(options.workdir)
    finish()
  report.print_result(result)
  return result


def _main():
  holders = option_flags.define_flags()
  out = flags.DEFINE_string('out', '', 'JSON file to write.')
  resume = flags.DEFINE_bool(
      'resume', False, 'Keep what --out has, and skip the environments that it'
      ' has. Only on the same machine with the same versions; use it only if'
      ' the code has not changed.')

  def main(argv):
    logging.set_verbosity(logging.WARNING)
    # A cached program would pass for a fast compilation.
    jax.config.update('jax_enable_compilation_cache', False)
    path = pathlib.Path(out.value)
    save = lambda result: write_json(path, result) if out.value else None
    try:
      if len(argv) > 1:
        raise BenchmarkError(f'unexpected arguments: {" ".join(argv[1:])}')
      if out.value and not path.absolute().parent.is_dir():
        raise BenchmarkError(f'--out: no folder for {out.value}')
      if resume.value and not out.value:
        raise BenchmarkError('--resume needs --out')
      earlier = load_result(path) if resume.value else None
      run(option_flags.from_flags(holders), earlier, save)
    except BenchmarkError as error:
      print(f'error: {error}', file=sys.stderr)
      return 1
    if out.value:
      print(f'\nwritten: {out.value}')
    return 0

  app.run(main)


if __name__ == '__main__':
  _main()
