"""WORKDIR/run.json: what a run is and was made with."""

from collections.abc import Mapping
import importlib.metadata
import json
import os
import pathlib
import platform
from typing import Any

import jax

from offmeta import disk
from offmeta.training import config as configs

_PACKAGES = (
  'jax',
  'jaxlib',
  'flax',
  'optax',
  'chex',
  'brax',
  'mujoco',
  'mujoco-mjx',
  'orbax-checkpoint',
  'numpy',
  'scipy',
)


def write(
  config: Any,
  workdir: pathlib.Path,
  profile: str,
  command: str,
  config_file: str = '',
  execution: Mapping[str, Any] = {},
) -> None:
  """Writes or checks WORKDIR/run.json.

  Args:
    config: of the run.
    workdir: of the run.
    profile: its size, for readers.
    command: that started it, for readers.
    config_file: FILE or FILE:ARGUMENT that registers the family; '' if none.
    execution: devices, processes and where the replay is, for readers; the
      latest slice of a run.

  Raises:
    ConfigError: the workdir holds a run of another configuration.
  """
  path = workdir / 'run.json'
  record = {
    'config': json.loads(json.dumps(configs.to_dict(config), default=list)),
    'config_hash': configs.config_hash(config),
    'config_file': config_file,
    'command': command,
    'profile': profile,
    'family': config.family.name,
    'algorithm': config.algorithm,
    'num_seeds': config.num_seeds,
    'headline_variant': (
      config.online.headline if config.online.variants else ''
    ),
    'oracle_variant': config.online.oracle if config.online.variants else '',
    'variants': {
      name: changes.get('description', '')
      for name, changes in config.online.variants.items()
    },
    'versions': {'python': platform.python_version()}
    | {name: importlib.metadata.version(name) for name in _PACKAGES},
    'execution': dict(execution),
    'machine': {
      'platform': platform.platform(),
      'processor': _processor(),
      'cores': os.cpu_count(),
      'devices': [str(d.device_kind) for d in jax.local_devices()],
    },
  }
  if path.exists():
    try:
      old = disk.read_json(path)
      known = old['config_hash']
    except (OSError, ValueError, KeyError, TypeError) as error:
      raise configs.ConfigError(
        f'{path}: not readable as a run description ({error}); use another'
        ' --workdir'
      ) from error
    if known != record['config_hash']:
      lines = _differences(old.get('config', {}), record['config'])
      raise configs.ConfigError(
        f'{workdir} holds a run of another configuration'
        f' ({known}, this is {record["config_hash"]}); use another'
        ' --workdir, or the old settings:\n  ' + '\n  '.join(lines[:20])
      )
  disk.write_json(path, record)


def _differences(old: Any, new: Any, prefix: str = '') -> list[str]:
  """Lines 'key: old -> new' for every leaf that differs."""
  if isinstance(old, Mapping) and isinstance(new, Mapping):
    lines = []
    for key in sorted(set(old) | set(new)):
      lines += _differences(
        old.get(key, '(absent)'),
        new.get(key, '(absent)'),
        f'{prefix}.{key}' if prefix else key,
      )
    return lines
  return [] if old == new else [f'{prefix}: {old} -> {new}']


def _processor() -> str:
  try:
    for line in pathlib.Path('/proc/cpuinfo').read_text().splitlines():
      if line.startswith('model name'):
        return line.split(':', 1)[1].strip()
  except OSError:
    pass
  return platform.processor()
