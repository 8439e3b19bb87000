"""What tests share: four CPU devices, compiled programs, one finished run.

Must run before jax is imported.
"""

import fcntl
import gc
from importlib import metadata
import os
import pathlib
import re
import shutil
import tempfile
import time

# Tests compile much and compute little: without LLVM's optimisations and
# jaxlib 0.10's new way to emit fusions they take a quarter of the time. One
# module of LLVM per program, and a schedule that nobody searches for, save
# another tenth.
_FLAGS = {
  '--xla_force_host_platform_device_count': '4',
  '--xla_backend_optimization_level': '0',
  '--xla_cpu_parallel_codegen_split_count': '1',
  '--xla_cpu_enable_concurrency_optimized_scheduler': 'false',
}
if metadata.version('jaxlib').startswith('0.10.'):
  _FLAGS['--xla_cpu_use_fusion_emitters'] = 'false'
_others = os.environ.get('XLA_FLAGS', '')
for _flag in _FLAGS:
  _others = re.sub(rf'{_flag}=\S*', '', _others)
os.environ['XLA_FLAGS'] = ' '.join(
  _others.split() + [f'{flag}={value}' for flag, value in _FLAGS.items()]
)
os.environ['JAX_PLATFORMS'] = 'cpu'

# Programs are compiled once in a run of the tests: for both of its processes
# and for the commands that tests start, which inherit this.
_NAME = 'offmeta-tests-xla-'
for _old in pathlib.Path(tempfile.gettempdir()).glob(f'{_NAME}*'):
  if time.time() - _old.stat().st_mtime > 86400:  # its tests were killed
    shutil.rmtree(_old, ignore_errors=True)
_CACHE = tempfile.mkdtemp(prefix=_NAME)
if os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', _CACHE) != _CACHE:
  os.rmdir(_CACHE)
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.2')

import pytest  # noqa: E402

# Seconds of a core that the dearest files take, roughly. A file is one piece of
# work for pytest-xdist: the dearest go first, so that none of its
# processes is left alone with one at the end.
_SECONDS = {
  'test_parallel.py': 95,
  'test_processes.py': 87,
  'training/test_streaming.py': 52,
  'phases/test_phases.py': 50,
  'envs/test_dynamics_families.py': 45,
  'envs/test_brax_families.py': 39,
  'experiments/test_benchmark_parts.py': 39,
  'test_end_to_end.py': 39,
  'test_examples.py': 37,
  'envs/test_humanoid.py': 30,
  'algorithms/test_macaw.py': 28,
  'phases/test_finetune.py': 24,
  'algorithms/test_csro_unicorn.py': 23,
  'experiments/test_benchmark.py': 19,
  'training/test_gather.py': 19,
  'algorithms/test_algorithm_contract.py': 19,
  'experiments/test_benchmark_cases.py': 18,
  'collection/test_single_task.py': 18,
  'envs/test_manipulation.py': 17,
  'algorithms/test_borel.py': 17,
  'experiments/test_render_command.py': 17,
  'phases/test_on_policy.py': 16,
  'experiments/test_compare.py': 16,
  'algorithms/test_focal.py': 15,
  'checkpoints/test_checkpointer_processes.py': 15,
  'networks/test_weight_transform.py': 13,
  'phases/test_budget.py': 12,
  'training/test_loops.py': 12,
  'checkpoints/test_checkpointer.py': 11,
  'experiments/test_references.py': 11,
  'algorithms/test_focal_learns.py': 11,
  'data/test_sampler.py': 10,
  'algorithms/test_ppo.py': 10,
  'training/test_image_replay.py': 10,
  'training/test_precision_of_runs.py': 10,
  'results/test_report.py': 10,
  'networks/test_precision.py': 9,
  'collection/test_source_sac.py': 9,
  'algorithms/test_multitask.py': 9,
  'algorithms/test_borel_learns.py': 9,
  'envs/test_manipulation_script.py': 9,
  'algorithms/test_smac.py': 8,
  'algorithms/test_meta_bc.py': 8,
  'algorithms/test_macaw_learns.py': 8,
  'algorithms/test_smac_settings.py': 8,
}


# These use the programs of the finished run (`tiny_run.shared_programs`): one
# piece of work.
_WHOLE_RUNS = {
  'collection/test_collection.py',
  'phases/test_phases.py',
  'test_end_to_end.py',
  'test_processes.py',
}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
  """A file is a piece of work, and so are whole runs together."""
  from xdist.scheduler import LoadFileScheduling

  class Scheduling(LoadFileScheduling):
    def _split_scope(self, nodeid):
      file = super()._split_scope(nodeid)
      whole = file.removeprefix('tests/') in _WHOLE_RUNS
      return 'whole runs' if whole else file

  return Scheduling(config, log)


def pytest_collection_modifyitems(items):
  """Dearest files first; kept by --no-loadscope-reorder."""
  tests = pathlib.Path(__file__).parent
  items.sort(
    key=lambda item: -_SECONDS.get(item.path.relative_to(tests).as_posix(), 0)
  )


def pytest_collection_finish():
  """Tracing makes many objects, nearly none of them in cycles.

  Without this the collector takes a twentieth of the time, and more the longer
  a process has run.
  """
  gc.collect()
  gc.freeze()
  gc.set_threshold(100_000, 50, 100)


def pytest_unconfigure():
  shutil.rmtree(_CACHE, ignore_errors=True)


@pytest.fixture(scope='session')
def finished_run(tmp_path_factory):
  """The workdir of a tiny run that nothing interrupted; do not write to it.

  The process of pytest-xdist that needs it first makes it for both.
  """
  import tiny_run

  from experiments.runs import record
  from offmeta.phases import run as phases

  folder = tmp_path_factory.getbasetemp()
  if 'PYTEST_XDIST_WORKER' in os.environ:
    folder = folder.parent
  workdir = folder / 'finished_run'
  with (folder / 'finished_run.lock').open('w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not workdir.exists():
      made = folder / 'unfinished_run'
      shutil.rmtree(made, ignore_errors=True)  # the other one failed
      setup = tiny_run.make_setup(made)
      made.mkdir()
      record.write(setup.config, made, 'smoke', 'the command')
      with tiny_run.shared_programs():
        phases.run(setup, tiny_run.PHASES)
      made.rename(workdir)
  return workdir
