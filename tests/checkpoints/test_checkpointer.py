"""Checkpoints: exact round trips, and everything that can go wrong."""

import errno
import json
import os
import pathlib
import re
import resource
import shutil
import subprocess
import sys
import textwrap
from typing import NamedTuple

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from offmeta import disk
from offmeta.checkpoints import checkpointer as checkpointing, files
from offmeta.checkpoints.checkpointer import Checkpointer, CheckpointError
from offmeta.types import LearnerState

P = jax.sharding.PartitionSpec


class _Counters(NamedTuple):
  iteration: int
  share: float
  resumed: bool


@struct.dataclass
class _Run:
  learner: LearnerState
  buffers: dict[str, object]
  counters: _Counters


def _run(seed=0):
  """A tree with every kind of leaf that a run has."""
  keys = jax.random.split(jax.random.key(seed), 3)
  params = {
    'critic': [{'kernel': jax.random.normal(keys[0], (4, 3))}],
    'a/b': jnp.float32(seed + 0.1),
    'half': jax.random.normal(keys[1], (5,), jnp.bfloat16),
  }
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
  learner = LearnerState(
    step=jnp.int32(7),
    key=jax.random.key(seed),
    params=params,
    target_params=jax.tree.map(jnp.copy, params),
    opt_state=optimizer.init(params),
    extras={'keys': keys, 'other': jax.random.key(seed, impl='rbg')},
  )
  buffers = {
    'reward': jnp.array([[1.0, jnp.nan, -0.0, jnp.inf]]),
    'valid': jnp.array([True, False]),
    'nothing': jnp.zeros((0, 3)),
    'absent': None,
    'host': np.arange(5, dtype=np.int64) + 2**40 + seed,
    'scalar': np.float64(0.1),
  }
  return _Run(learner, buffers, _Counters(3 + seed, 0.25, True))


def _bits(leaf):
  if hasattr(leaf, 'dtype') and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    impl = str(jax.random.key_impl(leaf))
    return impl, np.asarray(jax.random.key_data(leaf)).tobytes()
  array = np.asarray(leaf)
  return str(array.dtype), array.shape, array.tobytes()


def _assert_same(left, right):
  assert jax.tree.structure(left) == jax.tree.structure(right)
  paths = jax.tree_util.tree_leaves_with_path(left)
  for (path, a), b in zip(paths, jax.tree.leaves(right)):
    assert _bits(a) == _bits(b), path
    # numpy leaves and numbers stay such; jax arrays stay jax arrays.
    assert isinstance(a, jax.Array) == isinstance(b, jax.Array), path
    if not isinstance(a, jax.Array):
      assert type(a) is type(b), path


def _abstract(tree):
  def describe(x):
    if isinstance(x, jax.Array):
      return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    return x

  return jax.tree.map(describe, tree)


def test_round_trip_is_bit_exact(tmp_path):
  run = _run()
  checkpointer = Checkpointer(tmp_path, 'abc')
  assert checkpointer.latest_step() is None
  checkpointer.save(7, run)
  checkpointer.close()
  again = Checkpointer(tmp_path, 'abc')
  assert again.latest_step() == 7
  _assert_same(run, again.restore(_run(seed=1)))
  _assert_same(run, again.restore(_abstract(run)))


def test_restored_state_is_used_like_a_fresh_one(tmp_path):
  """Uncommitted arrays stay so, or they could not meet sharded ones."""
  run = _run()
  checkpointer = Checkpointer(tmp_path, 'abc')
  checkpointer.save(1, run)
  restored = checkpointer.restore(_run(seed=1))
  for a, b in zip(jax.tree.leaves(run), jax.tree.leaves(restored)):
    if isinstance(a, jax.Array):
      assert a.committed == b.committed
  key = restored.learner.key
  assert jax.random.uniform(key) == jax.random.uniform(run.learner.key)


def test_keeps_the_newest(tmp_path):
  checkpointer = Checkpointer(tmp_path, 'abc', keep=2)
  for step in (0, 5, 9, 10):
    checkpointer.save(step, {'x': jnp.int32(step)})
  assert sorted(p.name for p in tmp_path.iterdir()) == ['10', '9']
  template = {'x': jnp.int32(0)}
  assert checkpointer.restore(template)['x'] == 10
  assert checkpointer.restore(template, step=9)['x'] == 9
  with pytest.raises(
    CheckpointError, match=r'no checkpoint of step 5.*\[9, 10\]'
  ):
    checkpointer.restore(template, step=5)
  with pytest.raises(ValueError, match='keep must be at least 1'):
    Checkpointer(tmp_path, 'abc', keep=0)


def test_same_step_is_replaced_and_an_earlier_one_refused(tmp_path):
  checkpointer = Checkpointer(tmp_path, 'abc')
  checkpointer.save(5, {'x': jnp.int32(1)})
  checkpointer.save(5, {'x': jnp.int32(2)})
  assert checkpointer.restore({'x': jnp.int32(0)})['x'] == 2
  with pytest.raises(CheckpointError, match='step 4 is before the latest'):
    checkpointer.save(4, {'x': jnp.int32(3)})
  assert [p.name for p in tmp_path.iterdir()] == ['5']


def test_restores_on_another_sharding(tmp_path):
  devices = jax.devices()
  assert len(devices) >= 4, 'conftest forces four devices'
  four = jax.sharding.Mesh(np.array(devices[:4]), ('task',))
  two = jax.sharding.Mesh(np.array(devices[2:4]), ('task',))
  tree = {
    'data': jnp.arange(32.0).reshape(8, 4),
    'keys': jax.random.split(jax.random.key(0), 8),
    'params': jnp.arange(6.0),
  }

  def place(mesh):
    specs = {'data': P('task'), 'keys': P('task'), 'params': P()}
    return {
      k: jax.device_put(v, jax.sharding.NamedSharding(mesh, specs[k]))
      for k, v in tree.items()
    }

  checkpointer = Checkpointer(tmp_path, 'abc')
  checkpointer.save(1, place(four))
  one = jax.device_put(tree, devices[3])
  for template in (place(two), _abstract(place(two)), one, place(four)):
    restored = checkpointer.restore(template)
    for name, leaf in restored.items():
      assert leaf.sharding == template[name].sharding
      assert _bits(leaf) == _bits(tree[name])
  checkpointer.save(2, one)
  restored = checkpointer.restore(place(four))
  assert len(restored['data'].sharding.device_set) == 4
  assert restored['data'].addressable_shards[0].data.shape == (2, 4)
  np.testing.assert_array_equal(restored['data'], tree['data'])


def test_other_configuration_is_refused(tmp_path):
  Checkpointer(tmp_path, 'abc').save(1, {'x': jnp.zeros(2)})
  other = Checkpointer(tmp_path, 'def')
  with pytest.raises(
    CheckpointError,
    match='configuration abc, the present one is def.*--workdir',
  ):
    other.restore({'x': jnp.zeros(2)})
  assert Checkpointer(tmp_path, 'abc').latest_step() == 1


@pytest.mark.parametrize(
  ('template', 'message'),
  [
    (
      {'a': jnp.zeros(2), 'b': {'c': jnp.zeros((2, 4))}},
      r"leaf 'b.c' is float32\[2, 3\] in .* and float32\[2, 4\] in this",
    ),
    (
      {'a': jnp.zeros(2, jnp.int32), 'b': {'c': jnp.zeros((2, 3))}},
      r"leaf 'a' is float32\[2\] in .* and int32\[2\] in this",
    ),
    ({'a': jnp.zeros(2)}, r"leaf 'b.c' is float32.* and \(no such leaf\) in"),
    (
      {'a': jnp.zeros(2), 'b': {'c': jnp.zeros((2, 3)), 'd': jnp.ones(1)}},
      r"leaf 'b.d' is \(no such leaf\) in the checkpoint and float32",
    ),
    (
      {'a': jax.random.key(0), 'b': {'c': jnp.zeros((2, 3))}},
      r"leaf 'a' is float32\[2\] in .* and key<fry>\[\]",
    ),
  ],
)
def test_other_tree_is_refused(tmp_path, template, message):
  checkpointer = Checkpointer(tmp_path, 'abc')
  checkpointer.save(1, {'a': jnp.zeros(2), 'b': {'c': jnp.zeros((2, 3))}})
  with pytest.raises(CheckpointError, match=message):
    checkpointer.restore(template)
  assert checkpointer.latest_step() == 1


def test_what_is_not_an_array_is_refused(tmp_path):
  checkpointer = Checkpointer(tmp_path, 'abc')
  with pytest.raises(CheckpointError, match="leaf 'x.0' is a str"):
    checkpointer.save(1, {'x': ['words']})
  assert checkpointer.latest_step() is None


def _edit(path, change):
  """Changes a record and signs it again."""
  file = path / 'record.json'
  record = json.loads(file.read_text())
  del record['digest']
  change(record)
  file.write_text(json.dumps({**record, 'digest': files._digest(record)}))


def _files(path):
  return sorted(
    p.relative_to(path).as_posix() for p in path.rglob('*') if p.is_file()
  )


def test_any_damaged_file_means_falling_back(tmp_path):
  """Every file of a checkpoint, deleted, cut short, or with one bit flipped."""
  tree = {'x': jnp.arange(1000.0)}
  template = {'x': jnp.zeros(1000)}
  good = tmp_path / 'good'
  checkpointer = Checkpointer(good, 'abc')
  checkpointer.save(1, tree)
  checkpointer.save(2, jax.tree.map(lambda x: x + 1, tree))
  names = _files(good / '2')
  assert 'record.json' in names and len(names) > 3

  def delete(path):
    path.unlink()

  def cut(path):
    path.write_bytes(path.read_bytes()[:-1])

  def flip(path):
    content = bytearray(path.read_bytes())
    content[0] ^= 1  # For the record this is its opening brace.
    path.write_bytes(content)

  for name in names:
    for damage in (delete, cut, flip):
      path = tmp_path / 'copy'
      shutil.copytree(good, path)
      if not (path / '2' / name).stat().st_size:
        damage = delete
      damage(path / '2' / name)
      checkpointer = Checkpointer(path, 'abc')
      with pytest.warns(UserWarning, match='step 2 is damaged.*from step 1'):
        restored = checkpointer.restore(template)
      assert _bits(restored['x']) == _bits(tree['x']), (name, damage)
      assert checkpointer.latest_step() == 1
      assert (path / 'damaged-2').is_dir()
      shutil.rmtree(path)


def test_goes_on_after_falling_back(tmp_path):
  checkpointer = Checkpointer(tmp_path, 'abc')
  for step in (1, 2):
    checkpointer.save(step, {'x': jnp.int32(step)})
  (tmp_path / '2' / 'record.json').unlink()
  with pytest.warns(UserWarning, match='record.json cannot be read'):
    checkpointer.restore({'x': jnp.int32(0)})
  checkpointer.save(2, {'x': jnp.int32(22)})
  assert checkpointer.restore({'x': jnp.int32(0)})['x'] == 22
  assert checkpointer.restore({'x': jnp.int32(0)}, step=1)['x'] == 1


def test_no_intact_checkpoint(tmp_path):
  checkpointer = Checkpointer(tmp_path, 'abc')
  with pytest.raises(CheckpointError, match='there is no checkpoint'):
    checkpointer.restore({'x': jnp.int32(0)})
  for step in (1, 2):
    checkpointer.save(step, {'x': jnp.int32(step)})
    (tmp_path / str(step) / 'record.json').unlink()
  with pytest.raises(CheckpointError, match='no intact.*step 2: .*step 1: '):
    checkpointer.restore({'x': jnp.int32(0)})
  with pytest.raises(CheckpointError, match='no intact.*step 1: '):
    checkpointer.restore({'x': jnp.int32(0)}, step=1)
  assert checkpointer.latest_step() == 2, 'nothing is moved or deleted'


def test_unknown_format(tmp_path):
  checkpointer = Checkpointer(tmp_path, 'abc')
  checkpointer.save(1, {'x': jnp.int32(1)})
  _edit(tmp_path / '1', lambda record: record.update(schema_version=99))
  with pytest.raises(CheckpointError, match='format 99.*reads formats 1 and 2'):
    checkpointer.restore({'x': jnp.int32(0)})


def test_full_disk_while_writing_arrays(tmp_path, capfd):
  """A real failure of a real write, by the limit on the size of files."""
  noise = np.random.default_rng(0).normal(size=1 << 18).astype(np.float32)
  checkpointer = Checkpointer(tmp_path, 'abc')
  checkpointer.save(1, {'x': jnp.zeros(noise.shape)})
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  capfd.readouterr()
  resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
  try:
    with pytest.raises(
      CheckpointError,
      match=r'could not write the checkpoint of step 2: the disk is full.*'
      r'\(1 MB to write, \d+ MB free\); make room.*'
      'The checkpoint of step 1 is intact',
    ):
      checkpointer.save(2, {'x': jnp.asarray(noise)})
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert [p.name for p in tmp_path.iterdir()] == ['1']
  restored = checkpointer.restore({'x': jnp.zeros(noise.shape)})
  np.testing.assert_array_equal(restored['x'], 0)
  # The same object goes on once there is room.
  checkpointer.save(2, {'x': jnp.asarray(noise)})
  restored = checkpointer.restore({'x': jnp.zeros(noise.shape)})
  np.testing.assert_array_equal(restored['x'], noise)
  out, err = capfd.readouterr()
  assert (out, err) == ('', ''), 'the exception is all that a user sees'


@pytest.mark.parametrize('where', ['orbax', 'record', 'rename'])
def test_full_disk_anywhere_else(tmp_path, monkeypatch, where):
  def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  checkpointer = Checkpointer(tmp_path, 'abc')
  checkpointer.save(1, {'x': jnp.int32(1)})
  with monkeypatch.context() as patch:
    if where == 'orbax':
      patch.setattr(checkpointing.ocp, 'save', full)
    elif where == 'record':
      patch.setattr(disk, 'write_text', full)
    else:
      rename = pathlib.Path.rename

      def only_aside(self, target):
        if '.tmp-' in self.name:
          full()
        return rename(self, target)

      patch.setattr(pathlib.Path, 'rename', only_aside)
    # At step 1 an existing checkpoint is being replaced: it must survive too.
    for step in (2, 1):
      with pytest.raises(
        CheckpointError, match=f'step {step}: the disk is full'
      ):
        checkpointer.save(step, {'x': jnp.int32(2)})
  assert [p.name for p in tmp_path.iterdir()] == ['1']
  assert checkpointer.restore({'x': jnp.int32(0)})['x'] == 1


def test_failure_of_the_first_save_says_so(tmp_path, monkeypatch):
  def broken(*args, **kwargs):
    raise OSError(errno.EIO, 'the disk is on fire')

  monkeypatch.setattr(checkpointing.ocp, 'save', broken)
  with pytest.raises(
    CheckpointError, match='on fire.* has no earlier checkpoint'
  ):
    Checkpointer(tmp_path, 'abc').save(3, {'x': jnp.int32(1)})


def test_directory_that_cannot_be_used(tmp_path):
  (tmp_path / 'file').write_text('x')
  with pytest.raises(CheckpointError, match='cannot be used for checkpoints'):
    Checkpointer(tmp_path / 'file', 'abc')


_KILLED_CHILD = textwrap.dedent("""
    import resource, signal, sys
    import jax.numpy as jnp, numpy as np
    from offmeta.checkpoints.checkpointer import Checkpointer
    noise = np.random.default_rng(0).normal(size=1 << 18).astype(np.float32)
    checkpointer = Checkpointer(sys.argv[1], 'abc')
    checkpointer.save(1, {'x': jnp.asarray(noise)})
    print('saved', flush=True)
    # From here the kernel kills the process within the first large write.
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    checkpointer.save(2, {'x': jnp.asarray(noise) + 1})
    print('not reached', flush=True)
""")


def test_killed_while_writing(tmp_path):
  root = pathlib.Path(checkpointing.__file__).parents[2]
  child = subprocess.run(
    [sys.executable, '-c', _KILLED_CHILD, str(tmp_path)],
    env={**os.environ, 'PYTHONPATH': str(root), 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )
  assert child.stdout == 'saved\n', child.stderr
  assert child.returncode < 0
  assert '.tmp-2' in [p.name for p in tmp_path.iterdir()]
  checkpointer = Checkpointer(tmp_path, 'abc')
  assert [p.name for p in tmp_path.iterdir()] == ['1']
  noise = np.random.default_rng(0).normal(size=1 << 18).astype(np.float32)
  restored = checkpointer.restore({'x': jnp.zeros(noise.shape)})
  np.testing.assert_array_equal(restored['x'], noise)


@pytest.mark.parametrize('renames', [0, 1, 2])
def test_killed_while_replacing(tmp_path, monkeypatch, renames):
  """Dies after so many of the two renames that put the new one in place."""

  class Killed(BaseException):
    pass

  checkpointer = Checkpointer(tmp_path, 'abc')
  checkpointer.save(1, {'x': jnp.int32(1)})
  done = 0
  rename = pathlib.Path.rename

  def counted(self, target):
    nonlocal done
    if self.parent == tmp_path:
      if done == renames:
        raise Killed
      done += 1
    return rename(self, target)

  with monkeypatch.context() as patch:
    patch.setattr(checkpointing.shutil, 'rmtree', lambda *a, **k: None)
    patch.setattr(pathlib.Path, 'rename', counted)
    if renames < 2:
      with pytest.raises(Killed):
        checkpointer.save(1, {'x': jnp.int32(2)})
    else:
      checkpointer.save(1, {'x': jnp.int32(2)})
  checkpointer = Checkpointer(tmp_path, 'abc')
  assert [p.name for p in tmp_path.iterdir()] == ['1']
  expected = 2 if renames == 2 else 1
  assert checkpointer.restore({'x': jnp.int32(0)})['x'] == expected


def test_nothing_is_logged(tmp_path):
  """Not even in a program that shows absl's INFO messages."""
  code = textwrap.dedent("""
      import sys
      from absl import logging
      import jax.numpy as jnp
      from offmeta.checkpoints.checkpointer import Checkpointer
      logging.set_verbosity(logging.INFO)
      logging.set_stderrthreshold(logging.INFO)
      logging.use_absl_handler()
      checkpointer = Checkpointer(sys.argv[1], 'abc')
      checkpointer.save(1, {'x': jnp.arange(3)})
      checkpointer.restore({'x': jnp.arange(3)})
      logging.info('ours')
  """)
  root = pathlib.Path(checkpointing.__file__).parents[2]
  child = subprocess.run(
    [sys.executable, '-c', code, str(tmp_path)],
    env={**os.environ, 'PYTHONPATH': str(root), 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    timeout=120,
    check=True,
  )
  assert child.stdout == ''
  shown = child.stderr.removeprefix(
    'WARNING: Logging before flag parsing goes to stderr.\n'
  )
  assert re.fullmatch(r'I.*\] ours\n', shown), child.stderr
