"""What was measured on, and with which versions."""

from importlib import metadata
import os
import platform
from typing import Any

import jax

from experiments.benchmarking.timing import rounded

_PACKAGES = (
  'jax',
  'jaxlib',
  'brax',
  'mujoco',
  'mujoco-mjx',
  'flax',
  'optax',
  'numpy',
)


def load_average() -> list[float]:
  """Of the last 1, 5 and 15 minutes."""
  return [round(x, 2) for x in os.getloadavg()]


def machine() -> dict[str, Any]:
  """Processor, device and load; no host name."""
  affinity = getattr(os, 'sched_getaffinity', None)
  return {
    'cpu': _cpu_model(),
    'cores': len(affinity(0)) if affinity else os.cpu_count(),
    'platform': f'{platform.system()} {platform.machine()}',
    'backend': jax.default_backend(),
    'device_kind': jax.devices()[0].device_kind,
    'devices': jax.local_device_count(),
    'load_average': load_average(),
  }


def device_peak_memory_mb() -> float | None:
  """Largest use so far of any device's memory, MiB; None on a CPU."""
  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  peaks = [s['peak_bytes_in_use'] for s in stats if 'peak_bytes_in_use' in s]
  return rounded(max(peaks) / 2**20) if peaks else None


def _cpu_model() -> str:
  try:
    with open('/proc/cpuinfo', encoding='utf-8') as file:
      for line in file:
        if line.startswith('model name'):
          return line.partition(':')[2].strip()
  except OSError:
    pass
  return platform.processor() or platform.machine()


def versions() -> dict[str, str | None]:
  """Of Python and the packages that matter; None where not installed."""

  def version(name):
    try:
      return metadata.version(name)
    except metadata.PackageNotFoundError:
      return None

  return {
    'python': platform.python_version(),
    **{name: version(name) for name in _PACKAGES},
  }
