"""What has to be set before and after jax is imported."""

import os


def prepare_environment(devices: int | None = None):
  """Settings that must be there before jax starts.

  On a CPU every core becomes a device of its own, over which seeds are
  spread; small matrix products use one core each.

  Args:
    devices: how many a CPU is made of, at most 16; None: one per core.
  """
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
  flag = '--xla_force_host_platform_device_count'
  if flag not in os.environ.get('XLA_FLAGS', ''):
    devices = min(devices or os.cpu_count() or 1, 16)
    os.environ['XLA_FLAGS'] = (
      f'{os.environ.get("XLA_FLAGS", "")} {flag}={devices}'.strip()
    )


def configure():
  """Settings of jax for whole runs.

  Compiled programs are kept on disk, so that a second start is fast. Matrix
  products are float32 throughout, which accelerators otherwise round to fewer
  bits; `config.matmul_precision` lowers it in updates only.
  """
  import jax

  jax.config.update('jax_default_matmul_precision', 'float32')
  cache = os.environ.get('JAX_COMPILATION_CACHE_DIR') or os.path.join(
    os.environ.get('XDG_CACHE_HOME', os.path.expanduser('~/.cache')),
    'offmeta',
    'xla',
  )
  jax.config.update('jax_compilation_cache_dir', cache)
  if 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS' not in os.environ:
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
