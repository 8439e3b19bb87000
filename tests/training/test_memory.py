"""Memory: sizes against real arrays, limits from fake machines, messages."""

import os

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from offmeta.data import buffer as buffers
from offmeta.training import memory

_GB = 1000**3


class _Accelerator:
  """A device that says how full it is."""

  platform = 'gpu'

  def __init__(self, stats):
    self._stats = stats

  def memory_stats(self):
    if isinstance(self._stats, Exception):
      raise self._stats
    return self._stats


def _holds(limit, used):
  return _Accelerator({'bytes_limit': limit, 'bytes_in_use': used})


def _machine(root, files):
  """The files of an operating system under `root`."""
  for name, text in files.items():
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)
  return root


# Sizes.


@pytest.mark.parametrize('extras', [False, True])
def test_replay_demand_is_the_size_of_a_real_buffer(extras):
  example = helpers.random_transitions(0, helpers.SPEC, ())
  if extras:
    example = example._replace(
      extras={'features': jnp.zeros((2,)), 'diverged': jnp.zeros((), jnp.int8)}
    )
  real = buffers.empty(example, 3, 50, 7)
  expected = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(real))
  assert memory.nbytes(real) == expected
  for form in (example, jax.eval_shape(lambda x: x, example)):
    demand = memory.replay_demand(form, 3, 50, 4, 'replay', 7)
    assert demand.nbytes == 4 * expected
    # 3 + 2 + 1 + 1 + 3 floats; 2 more and a byte.
    row = 49 if extras else 40
    assert demand.what == 'replay' and demand.detail == (
      f'4 seeds x 3 tasks x 50 transitions x {row} B'
    )


def test_replay_demand_makes_no_buffer():
  example = helpers.random_transitions(0, helpers.SPEC, ())
  demand = memory.replay_demand(example, 10**5, 10**6, 10, 'replay')
  # 40 TB of rows; per task two sizes and the number of sequences.
  assert demand.nbytes == 10 * 10**5 * (10**6 * 40 + 12)
  assert '100,000 tasks x 1,000,000 transitions' in demand.detail


def test_nbytes_of_keys_and_dtypes():
  keys = jax.random.split(jax.random.key(0), 5)
  key_bytes = np.asarray(jax.random.key_data(keys)).nbytes
  tree = {
    'key': keys,
    'half': jnp.zeros((3, 2), jnp.bfloat16),
    'flag': np.zeros((7,), bool),
    'scalar': jnp.int32(1),
  }
  assert memory.nbytes(tree) == key_bytes + 12 + 7 + 4
  assert memory.nbytes(jax.eval_shape(lambda t: t, tree)) == key_bytes + 23
  assert memory.nbytes({}) == 0


# What is available.


def test_accelerators_are_asked(tmp_path):
  gpus = [_holds(80 * _GB, 5 * _GB), _holds(80 * _GB, 5 * _GB)]
  # No file of the machine is there: its RAM is not asked for.
  assert memory.available_bytes(gpus[:1], tmp_path) == 75 * _GB
  assert memory.available_bytes(gpus, tmp_path) == 150 * _GB
  # An even spread does not fit once the fullest is full.
  assert (
    memory.available_bytes([gpus[0], _holds(80 * _GB, 70 * _GB)], tmp_path)
    == 20 * _GB
  )


@pytest.mark.parametrize(
  'stats',
  [
    None,
    {'bytes_in_use': 3},
    {'bytes_limit': 3},
    jax.errors.JaxRuntimeError('UNIMPLEMENTED'),
  ],
  ids=repr,
)
def test_an_accelerator_that_does_not_tell(stats, tmp_path):
  devices = [_holds(80 * _GB, 0), _Accelerator(stats)]
  assert memory.available_bytes(devices, tmp_path) is None


def test_cpu_devices_share_the_memory_of_the_machine(tmp_path):
  root = _machine(
    tmp_path,
    {
      'proc/meminfo': 'MemTotal:       9000000 kB\nMemAvailable:   5000000 kB\n'
    },
  )
  devices = jax.local_devices()
  assert len(devices) == 4 and devices[0].platform == 'cpu'
  assert memory.available_bytes(devices, root) == 5_120_000_000
  assert memory.available_bytes(devices[:1], root) == 5_120_000_000


def test_this_machine():
  total = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
  assert 0 < memory.available_bytes(jax.local_devices()) <= total


def test_without_meminfo_the_installed_memory_counts(tmp_path, monkeypatch):
  sizes = {'SC_PHYS_PAGES': 1000, 'SC_PAGE_SIZE': 4096}
  monkeypatch.setattr(os, 'sysconf', sizes.__getitem__)
  assert memory.available_bytes(jax.devices(), tmp_path) == 4_096_000

  def unknown(name):
    raise ValueError('unrecognized configuration name')

  monkeypatch.setattr(os, 'sysconf', unknown)
  assert memory.available_bytes(jax.devices(), tmp_path) is None
  monkeypatch.delattr(os, 'sysconf')
  assert memory.available_bytes(jax.devices(), tmp_path) is None


_MEMINFO = {'proc/meminfo': 'MemAvailable:   8000000 kB\n'}
_V2 = {
  **_MEMINFO,
  'proc/self/cgroup': '0::/slurm/job\n',
  'sys/fs/cgroup/slurm/memory.max': '3000000000\n',
  'sys/fs/cgroup/slurm/memory.current': '1000000000\n',
  'sys/fs/cgroup/slurm/memory.stat': 'active_file 5\ninactive_file 200000000\n',
  'sys/fs/cgroup/slurm/job/memory.max': 'max\n',
  'sys/fs/cgroup/slurm/job/memory.current': '900000000\n',
}
_V1 = {
  **_MEMINFO,
  'proc/self/cgroup': '5:cpu,cpuacct:/\n4:memory:/docker/1f2e\n0::/\n',
  # In a container the folder of the group is the mount itself.
  'sys/fs/cgroup/memory/memory.limit_in_bytes': '2000000000\n',
  'sys/fs/cgroup/memory/memory.usage_in_bytes': '700000000\n',
  'sys/fs/cgroup/memory/memory.stat': (
    'inactive_file 1\ntotal_inactive_file 100000000\n'
  ),
}


@pytest.mark.parametrize(
  'files, expected',
  [
    (_V2, 2_200_000_000),
    ({**_V2, 'sys/fs/cgroup/slurm/job/memory.max': '1500000000'}, 600_000_000),
    ({**_V2, 'sys/fs/cgroup/slurm/memory.max': '900000000000'}, 8_192_000_000),
    ({**_V2, 'sys/fs/cgroup/slurm/memory.current': '4000000000'}, 0),
    (_V1, 1_400_000_000),
    (
      {
        **_V1,
        'sys/fs/cgroup/memory/memory.limit_in_bytes': '9223372036854771712',
      },
      8_192_000_000,
    ),
  ],
  ids=[
    'v2 parent',
    'v2 own',
    'v2 above the machine',
    'v2 exceeded',
    'v1',
    'v1 without limit',
  ],
)
def test_limits_of_control_groups(files, expected, tmp_path):
  root = _machine(tmp_path, files)
  assert memory.available_bytes(jax.devices(), root) == expected


# Messages.

_DEMANDS = [
  memory.Demand(
    'replay (RL)',
    2_069_760_000,
    '4 seeds x 100 tasks x 26,400 transitions x 196 B',
  ),
  memory.Demand('learners', 31_400_000, '4 seeds x 7.85 MB'),
]


def test_report_lines_up():
  assert memory.report(_DEMANDS, 23_400_000_000) == [
    '2.07 GB  replay (RL)  4 seeds x 100 tasks x 26,400 transitions x 196 B',
    '31.4 MB  learners     4 seeds x 7.85 MB',
    '2.10 GB  in all',
    '23.4 GB  available',
  ]
  assert memory.report(_DEMANDS, None)[-1] == 'unknown  available'


@pytest.mark.parametrize(
  'size, text',
  [
    (0, '0 B'),
    (999, '999 B'),
    (1000, '1.00 kB'),
    (9994, '9.99 kB'),
    (9996, '10.0 kB'),
    (99_960, '100 kB'),
    (999_499, '999 kB'),
    (999_500, '1.00 MB'),
    (139 * _GB, '139 GB'),
    (40 * 1000**4, '40.0 TB'),
    (4000 * 1000**4, '4000 TB'),
  ],
)
def test_readable(size, text):
  assert memory.readable(size) == text


def test_check_leaves_a_margin():
  total = sum(demand.nbytes for demand in _DEMANDS)
  assert memory.MARGIN == 0.1
  memory.check(_DEMANDS, total * 10 // 9 + 1, 'advice')
  memory.check(_DEMANDS, None, 'advice')
  for available in (total * 10 // 9 - 1, total, 0):
    with pytest.raises(memory.MemoryBudgetError):
      memory.check(_DEMANDS, available, 'advice')


def test_the_message_says_all():
  with pytest.raises(ValueError) as error:
    memory.check(
      _DEMANDS, 2_200_000_000, 'Lower --num_seeds, or collect less per task.'
    )
  assert str(error.value).splitlines() == [
    'this run would keep 2.10 GB in memory, and of the 2.20 GB available 10%'
    ' must stay free for what comes and goes:',
    *('  ' + line for line in memory.report(_DEMANDS, 2_200_000_000)),
    'Lower --num_seeds, or collect less per task.',
  ]
