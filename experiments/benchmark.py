"""Measures speed: updates, environment steps, and where a run's time went.

  python -m experiments.benchmark --out=benchmark.json
  python -m experiments.benchmark --only=smac,pearl --out=benchmark.json
  python -m experiments.benchmark --only=env --out=environments.json
  python -m experiments.benchmark --only=workdir --workdir=runs/cheetah

Updates go through `offmeta.training.updates.make_update`, as those of runs do:
sampling included, one compiled scan over updates. The data are synthetic, the
sizes those of a profile: 'paper' (published networks and batches, cheetah_vel
observations), 'cpu' (the main job of experiments/configs/) or 'smoke'.
The ceiling is the rate of matrix products on the same device, at the same
--matmul_precision, measured in between the updates, because shared machines
drift by 20%. Both use one device. FLOPs are those of the matrix products in
the program of one update (`benchmarking/flops.py`).

These parts take long and run only when named:

  scaling  the same update on --devices: 8 seeds spread over them, and one
           seed that shares its meta-batch out. A CPU is made of as many
           devices as wanted, which share its cores.
  growth   time per update against tasks, batch and seeds, one at a time.
  startup  from the start of a process to its first finished update, with an
           empty and a filled cache of compiled programs.

  --only=scaling,growth --algorithms=smac --out=sizes.json --plot=sizes.png

--overhead and --trace_dir say more about updates. Results are compared with
--compare; --load takes a file instead of measuring:

  --only=smac --out=new.json --compare=old.json
  --load=new.json --compare=old.json
  --load=sizes.json --plot=sizes.png

Environments: speed, stability and, on MJX, agreement with C MuJoCo, for every
family and backend. That takes long, so the file is written after each row,
and --resume goes on with it; a second command may add rows. This measures all
sizes on each family's own backend and one size on the others:

  --only=env --env_backends=default --out=environments.json
  --only=env --num_envs=64 --resume --out=environments.json
"""

from collections.abc import Callable
import dataclasses
import os
import resource
import sys

# Quiet before jax and its friends are imported.
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')

from absl import app, logging  # pylint: disable=g-import-not-at-top
import jax

from experiments.benchmarking import (
  BenchmarkError,
  environments,
  growth,
  machine as machines,
  options as option_flags,
  plots,
  report,
  results,
  scaling,
  startup,
  tracing,
  updates,
  workdir,
)
from experiments.benchmarking.options import Options
from experiments.benchmarking.results import Result
from experiments.benchmarking.timing import rounded
from offmeta import disk


def run(
  options: Options,
  begin: Callable[[], Result] = results.new_result,
  save: Callable[[Result], None] = lambda result: None,
) -> Result:
  """Measures and prints; returns what goes to the JSON file.

  Args:
    options: what to measure.
    begin: gives the result to go on with.
    save: called whenever there is something new.

  Raises:
    BenchmarkError: an option cannot be served; nothing but `startup` was
      measured.
  """
  option_flags.validate(options)
  if options.trace_dir:
    tracing.make_folder(options.trace_dir)
  # Before this process takes the device, which may serve one at a time.
  starts = 'startup' in options.parts and startup.measure_startup(options)
  option_flags.validate_device(options)
  result = begin()
  result['options'] = dataclasses.asdict(options)

  def finish(**tables):
    result.update(tables)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    result['peak_memory_mb'] = rounded(usage.ru_maxrss / 1024)
    result['device_peak_memory_mb'] = machines.device_peak_memory_mb()
    result['load_average_at_end'] = machines.load_average()
    save(result)

  if starts:
    finish(startup=starts)
  if options.updates:
    ceiling, rows = updates.measure_updates(options, options.updates)
    finish(
      ceiling=ceiling,
      updates=rows,
      ceiling_gflops=ceiling['gflops'][ceiling['best']],
    )
  if 'scaling' in options.parts:
    finish(scaling=scaling.measure_scaling(options))
  if 'growth' in options.parts:
    finish(growth=growth.measure_growth(options))
  if 'env' in options.parts:
    for name, backend in environments.cases(options):
      for _ in environments.measure(result, name, backend, options):
        finish()
  if 'workdir' in options.parts:
    finish(workdir=workdir.read_workdir(options.workdir))
  report.print_result(result)
  return result


def _main():
  holders = option_flags.define_flags()
  file_holders = option_flags.define_file_flags()

  def main(argv):
    logging.set_verbosity(logging.WARNING)
    # A cached program would pass for a fast compilation.
    jax.config.update('jax_enable_compilation_cache', False)
    jax.config.update('jax_default_matmul_precision', 'float32')
    try:
      if len(argv) > 1:
        raise BenchmarkError(f'unexpected arguments: {" ".join(argv[1:])}')
      options = option_flags.from_flags(holders)
      _serve(options, option_flags.files_from_flags(file_holders, options))
    except BenchmarkError as error:
      print(f'error: {error}', file=sys.stderr)
      return 1
    return 0

  app.run(main)


def _serve(options: Options, files: option_flags.Files):
  """Measures or loads, then compares and draws.

  Raises:
    BenchmarkError: an option or a file is wrong.
  """
  old = files.compare and results.read_result(files.compare, 'compare')
  if files.load:
    result = results.read_result(files.load, 'load')
    report.print_result(result)
  else:
    begin, save = results.new_result, lambda result: None
    if files.resume:
      begin = lambda: results.resume_result(files.out)
    if files.out:
      save = lambda result: disk.write_json(files.out, result)
    result = run(options, begin, save)
  if old:
    results.print_comparison(old, result, str(files.compare))
  if files.plot:
    plots.save(result, files.plot)
  for path in (files.out, files.plot):
    if path:
      print(f'\nwritten: {path}')


if __name__ == '__main__':
  _main()
