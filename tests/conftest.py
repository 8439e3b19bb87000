"""Four CPU devices in every test; must run before jax is imported."""

from importlib import metadata
import os
import re

# Tests compile much and compute little: without LLVM's optimisations and
# jaxlib 0.10's new way to emit fusions they take a quarter of the time.
_FLAGS = {
    '--xla_force_host_platform_device_count': '4',
    '--xla_backend_optimization_level': '0',
}
if metadata.version('jaxlib').startswith('0.10.'):
  _FLAGS['--xla_cpu_use_fusion_emitters'] = 'false'
_others = os.environ.get('XLA_FLAGS', '')
for _flag in _FLAGS:
  _others = re.sub(rf'{_flag}=\S*', '', _others)
os.environ['XLA_FLAGS'] = ' '.join(
    _others.split() + [f'{flag}={value}' for flag, value in _FLAGS.items()])
os.environ['JAX_PLATFORMS'] = 'cpu'

import pytest  # noqa: E402


@pytest.fixture(scope='session')
def compilation_cache_dir(tmp_path_factory):
  """Where tests of whole runs keep compiled programs."""
  return str(tmp_path_factory.mktemp('xla'))


@pytest.fixture(scope='module')
def compile_once(compilation_cache_dir):
  """A compilation cache for the tests of one module; they share its folder."""
  import jax
  from jax.experimental.compilation_cache import compilation_cache

  settings = {
      'jax_compilation_cache_dir': compilation_cache_dir,
      'jax_persistent_cache_min_compile_time_secs': 0.0,
      'jax_persistent_cache_min_entry_size_bytes': -1,
  }
  before = {name: getattr(jax.config, name) for name in settings}
  for name, value in settings.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()
  yield
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


@pytest.fixture(scope='session')
def finished_run(tmp_path_factory):
  """The workdir of a tiny run that nothing interrupted; do not write to it.

  Its test must use `compile_once` first.
  """
  import tiny_run
  from experiments import launch
  from offmeta.training import phases

  workdir = tmp_path_factory.mktemp('finished') / 'run'
  setup = tiny_run.make_setup(workdir)
  workdir.mkdir()
  launch.describe_run(setup.config, workdir, 'smoke', 'the command')
  with tiny_run.shared_programs():
    phases.run(setup, tiny_run.PHASES)
  return workdir
