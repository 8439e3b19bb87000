"""One of two processes that share checkpoints; see the test of that name."""

import contextlib
import errno
import os
import pathlib
import resource
import warnings

import connect
import jax
import jax.numpy as jnp
import numpy as np

from offmeta import disk, parallel, processes
from offmeta.checkpoints import checkpointer as checkpointing
from offmeta.checkpoints.checkpointer import Checkpointer, CheckpointError

NUM_SEEDS = 4
_LARGE = 100_000  # floats per seed: more than the limit in `_no_room`


def numbers(version):
  """The arrays of all seeds, and what all seeds share, in numpy."""
  rng = np.random.default_rng(version)
  return {
    'critic': rng.normal(size=(NUM_SEEDS, 3, 2)).astype(np.float32),
    'half': rng.normal(size=(NUM_SEEDS, 5)).astype(jnp.bfloat16),
    'large': rng.normal(size=(NUM_SEEDS, _LARGE)).astype(np.float32),
    'sizes': rng.integers(0, 99, (NUM_SEEDS, 2), np.int32),
    'valid': rng.integers(0, 2, NUM_SEEDS).astype(bool),
    'nothing': np.zeros((NUM_SEEDS, 0, 3), np.float32),
    'keys': rng.integers(0, 2**32, (NUM_SEEDS, 2), np.uint32),
    'host': rng.integers(2**40, 2**41, (NUM_SEEDS, 2)),
    'elsewhere': rng.normal(size=(NUM_SEEDS, 3)).astype(np.float32),
    'step': np.int32(version),
    'number': 10 + version,
    'share': 0.25 * version,
    'flag': True,
    'precise': np.float64(0.1 * version),
  }


def make(values, layout=None):
  """The tree of `numbers`, as a run of one layout holds it."""
  tree = jax.tree.map(lambda x: x, values)
  for name in ('critic', 'half', 'large', 'sizes', 'valid', 'nothing', 'step'):
    tree[name] = jnp.asarray(values[name])
  tree['keys'] = jax.random.wrap_key_data(jnp.asarray(values['keys']))
  tree['elsewhere'] = jax.device_put(
    values['elsewhere'], jax.local_devices()[1]
  )
  if layout is not None:  # As a compiled update leaves them.
    identity = layout.compile(lambda state: state, (0,))
    names = ('critic', 'large', 'keys')
    tree.update(identity({name: tree[name] for name in names}))
  return tree


def part(values, layout):
  """What a process of the layout holds of the arrays of all seeds."""
  seeds = slice(layout.seeds.start, layout.seeds.stop)
  return {k: v[seeds] if np.ndim(v) else v for k, v in values.items()}


def assert_holds(tree, values, template):
  """Every leaf bit for bit, of the template's type and placement."""
  for name, leaf in tree.items():
    like, data = template[name], leaf
    if name == 'keys':
      data = jax.random.key_data(leaf)
    data, expected = np.asarray(data), np.asarray(values[name])
    assert data.dtype == expected.dtype and data.shape == expected.shape, name
    assert data.tobytes() == expected.tobytes(), name
    if isinstance(like, jax.Array):
      assert leaf.committed == like.committed, name
      assert leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim), name
    elif isinstance(like, jax.ShapeDtypeStruct):
      assert isinstance(leaf, jax.Array) and not leaf.committed, name
    else:
      assert type(leaf) is type(like), name


def _refused(work):
  """The message of the CheckpointError that this process gets."""
  try:
    work()
  except CheckpointError as error:
    return str(error)
  raise AssertionError('no CheckpointError')


def _round_trip(folder, layout):
  first, second = (part(numbers(v), layout) for v in (1, 2))
  tree = make(first, layout)
  checkpointer = Checkpointer(folder, 'abc', layout=layout)
  assert checkpointer.latest_step() is None
  checkpointer.save(5, make(second, layout))
  checkpointer.save(5, tree)  # in its place
  checkpointer.save(6, make(second, layout))
  assert checkpointer.latest_step() == 6
  template = make(part(numbers(3), layout), layout)
  assert_holds(checkpointer.restore(template, 5), first, template)
  assert_holds(checkpointer.restore(template), second, template)
  bare = {
    k: jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, jax.Array) else x
    for k, x in tree.items()
  }
  assert_holds(checkpointer.restore(bare), second, bare)


def _one_process_wrote(folder, layout):
  values = part(numbers(1), layout)
  template = make(part(numbers(3), layout), layout)
  checkpointer = Checkpointer(folder, 'abc', layout=layout)
  assert checkpointer.latest_step() == 3
  assert_holds(checkpointer.restore(template), values, template)


def _placement(layout):
  """Making an array global copies nothing to another device."""
  tree = make(part(numbers(1), layout), layout)
  for name in ('critic', 'elsewhere', 'step'):
    everywhere = layout.to_global(tree[name])
    assert not everywhere.is_fully_addressable, name
    assert everywhere.sharding == layout.global_struct(tree[name]).sharding
    here = {
      s.device: s.data.unsafe_buffer_pointer()
      for s in tree[name].addressable_shards
    }
    assert here == {
      s.device: s.data.unsafe_buffer_pointer()
      for s in everywhere.addressable_shards
    }, name
    np.testing.assert_array_equal(
      layout.to_local(everywhere), np.asarray(tree[name])
    )


def _refusals(folder, layout):
  values = part(numbers(2), layout)
  checkpointer = Checkpointer(folder, 'abc', layout=layout)
  wrong = make({**values, 'critic': values['critic'][..., :1]})
  message = _refused(lambda: checkpointer.restore(wrong))
  assert "leaf 'critic' is float32[4, 3, 2] in the checkpoint and" in message
  assert 'float32[4, 3, 1] in this program' in message, message
  other = Checkpointer(folder, 'def', layout=layout)
  message = _refused(lambda: other.restore(make(values)))
  assert 'configuration abc, the present one is def' in message, message
  message = _refused(lambda: checkpointer.restore(make(values), 9))
  assert 'no checkpoint of step 9; there are [5, 6]' in message, message
  # What one process cannot use, none can.
  (folder.parent / 'file').touch()
  message = _refused(
    lambda: Checkpointer(folder.parent / 'file', 'abc', layout=layout)
  )
  assert 'cannot be used for checkpoints: ' in message, message
  assert '[Errno 17]' in message, message
  with _patched(checkpointing, '_PATIENCE_S', 0.3):
    with _patched(pathlib.Path, 'is_dir', lambda path: processes.is_main()):
      message = _refused(
        lambda: Checkpointer(folder.parent / 'x', 'abc', layout=layout)
      )
  assert 'a file system that all processes share' in message, message


@contextlib.contextmanager
def _patched(owner, name, value):
  before = getattr(owner, name)
  setattr(owner, name, value)
  try:
    yield
  finally:
    setattr(owner, name, before)


@contextlib.contextmanager
def _no_room(process):
  """In one process no file can have more than 50 kB."""
  if jax.process_index() != process:
    yield
    return
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _failed_writes(folder, layout):
  values = part(numbers(2), layout)
  tree = make(part(numbers(3), layout), layout)
  checkpointer = Checkpointer(folder, 'abc', layout=layout)

  def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  def failed(context):
    with context:
      message = _refused(lambda: checkpointer.save(7, tree))
    assert 'write the checkpoint of step 7: the disk is full' in message
    assert '(2 MB to write' in message, message
    assert 'The checkpoint of step 6 is intact' in message, message
    assert checkpointer.latest_step() == 6
    assert sorted(p.name for p in folder.iterdir()) == ['5', '6']
    assert_holds(checkpointer.restore(tree), values, tree)

  # What only the main process does: folder, record, giving it its name.
  alone = processes.is_main()
  for owner, name in (
    (pathlib.Path, 'mkdir'),
    (disk, 'write_text'),
    (pathlib.Path, 'rename'),
  ):
    failed(_patched(owner, name, full) if alone else contextlib.nullcontext())
  # What all do: the arrays.
  with _patched(checkpointing, '_PATIENCE_S', 2.0):
    for process in (0, 1):
      failed(_no_room(process))
  checkpointer.save(7, tree)
  assert_holds(checkpointer.restore(tree), part(numbers(3), layout), tree)


def _damaged(folder, layout):
  """`_failed_writes` left step 6, and 7 as the newest."""
  values = part(numbers(2), layout)
  template = make(part(numbers(1), layout), layout)
  checkpointer = Checkpointer(folder, 'abc', layout=layout)
  assert checkpointer.latest_step() == 7
  if not processes.is_main():  # What another than the main process wrote.
    file = max(
      (folder / '7' / 'state').rglob('ocdbt.process_1/d/*'),
      key=lambda path: path.stat().st_size,
    )
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
  processes.any_process([False])
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    restored = checkpointer.restore(template)
  assert_holds(restored, values, template)
  assert checkpointer.latest_step() == 6
  assert (folder / 'damaged-7').is_dir()
  said = [str(w.message) for w in caught if w.category is UserWarning]
  assert len(said) == processes.is_main(), said
  assert all('step 7 is damaged' in s and 'from step 6' in s for s in said)


def main(folder):
  seeds = parallel.make_layout(NUM_SEEDS)
  tasks = parallel.make_layout(NUM_SEEDS, num_tasks=4, share='tasks')
  assert len(seeds.seeds) == 2 and len(tasks.seeds) == NUM_SEEDS
  assert len(tasks.devices) == 4 and not tasks.split
  for name, layout in (('seeds', seeds), ('tasks', tasks)):
    _placement(layout)
    _one_process_wrote(folder / 'one', layout)
    _round_trip(folder / name, layout)
    print(name, flush=True)
  _refusals(folder / 'seeds', seeds)
  print('refusals', flush=True)
  _failed_writes(folder / 'seeds', seeds)
  print('failed writes', flush=True)
  _damaged(folder / 'seeds', seeds)
  print('damaged', flush=True)


if __name__ == '__main__':
  connect.run(main)
