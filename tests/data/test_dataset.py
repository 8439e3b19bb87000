"""Datasets on disk: round trips, every kind of bad input, slices."""

import contextlib
import errno
import hashlib
import io
import json
import os
import pathlib
import re
import signal

import jax.numpy as jnp
import numpy as np
import pytest

from offmeta import disk
from offmeta.data import dataset as dataset_lib
from offmeta.data.meta_dataset import (
  DatasetError,
  MetaDataset,
  validate,
)
from offmeta.data.slices import slice_transitions
from offmeta.types import EnvSpec, Transition

_SPEC = EnvSpec(
  name='toy',
  observation_shape=(3,),
  action_size=2,
  feature_size=4,
  episode_length=5,
  terminates=True,
  options={'backend': 'spring', 'dt': 0.05, 'shape': (1, 2)},
)
_M, _C = 3, 10


def _transition(rng, capacity=_C):
  def normal(*tail):
    return rng.normal(size=(_M, capacity, *tail)).astype(np.float32)

  return Transition(
    observation=normal(3),
    action=np.clip(normal(2), -1, 1),
    reward=normal(),
    discount=rng.integers(0, 2, (_M, capacity)).astype(np.float32),
    next_observation=normal(3),
    extras={
      'features': normal(4),
      'episode': rng.integers(0, 9, (_M, capacity)).astype(np.int32),
    },
  )


@pytest.fixture(name='data')
def _data():
  rng = np.random.default_rng(0)
  return MetaDataset(
    transitions=_transition(rng),
    size=np.array([10, 7, 8], np.int32),
    context=_transition(rng, 6),
    context_size=np.array([6, 1, 5], np.int32),
    tasks={'goal': rng.normal(size=(_M, 2)).astype(np.float32)},
    episode_return=np.array([1.0, -2.5, 3.0], np.float32),
  )


@pytest.fixture(name='saved')
def _saved(tmp_path, data):
  path = tmp_path / 'data'
  dataset_lib.save(path, data, _SPEC, {'command': 'collect', 'seed': 3})
  return path


def _assert_same(left, right):
  left = dict(dataset_lib._leaves(left))
  right = dict(dataset_lib._leaves(right))
  assert left.keys() == right.keys()
  for name, leaf in left.items():
    leaf = np.asarray(leaf)
    assert leaf.dtype == right[name].dtype, name
    assert leaf.tobytes() == right[name].tobytes(), name


def _set(data, field, index, value):
  """A copy of the data with one value of transitions.<field> changed."""
  if field == 'features':
    array = data.transitions.extras['features'].copy()
    array[index] = value
    extras = {**data.transitions.extras, 'features': array}
    return data._replace(transitions=data.transitions._replace(extras=extras))
  array = getattr(data.transitions, field).copy()
  array[index] = value
  return data._replace(transitions=data.transitions._replace(**{field: array}))


def _edit_manifest(path, edit):
  file = path / 'manifest.json'
  manifest = json.loads(file.read_text())
  edit(manifest)
  file.write_text(json.dumps(manifest))


def _replace_leaf(path, name, array, **facts):
  """Swaps a file and makes the manifest agree with its bytes.

  Args:
    path: of the dataset.
    name: of the leaf.
    array: what to save, or the bytes of a whole file.
    **facts: what else the manifest then says of the leaf.
  """
  file = path / f'{name}.npy'
  if isinstance(array, bytes):
    file.write_bytes(array)
  else:
    np.save(file, array)

  def edit(manifest):
    manifest['leaves'][name].update(
      bytes=file.stat().st_size,
      sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
      **facts,
    )

  _edit_manifest(path, edit)


def _make_version_1(path):
  def edit(manifest):
    manifest['schema_version'] = 1
    for field in ('task_shapes', 'extras', 'context_extras', 'frames_once'):
      del manifest[field]
    spec = manifest['spec']
    [spec['observation_size']] = spec.pop('observation_shape')
    del spec['observation_dtype']

  _edit_manifest(path, edit)


@contextlib.contextmanager
def _seconds(limit):
  """Fails, rather than waits, if the block takes longer."""

  def stop(*args):
    raise AssertionError(f'not done after {limit} s')

  before = signal.signal(signal.SIGALRM, stop)
  signal.setitimer(signal.ITIMER_REAL, limit)
  try:
    yield
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def _refusal(path, spec=_SPEC):
  """The one sentence that `load` ends with."""
  with _seconds(10), pytest.raises(DatasetError) as error:
    dataset_lib.load(path, spec)
  message = str(error.value)
  assert message.startswith(str(path)) and '\n' not in message
  return message


def test_round_trip_is_bit_exact(saved, data):
  loaded = dataset_lib.load(saved, _SPEC)
  _assert_same(data, loaded)
  _assert_same(data, dataset_lib.load(saved, None))


def test_round_trip_of_jax_arrays_without_separate_context(tmp_path, data):
  data = data._replace(context=None, context_size=None)
  on_device = data._replace(
    transitions=data.transitions._replace(
      reward=jnp.asarray(data.transitions.reward)
    ),
    size=jnp.asarray(data.size),
  )
  dataset_lib.save(tmp_path / 'd', on_device, _SPEC, {})
  loaded = dataset_lib.load(tmp_path / 'd', _SPEC)
  assert loaded.context is None and loaded.context_size is None
  _assert_same(data, loaded)


def test_arrays_in_fortran_order(tmp_path, data):
  turned = data._replace(
    transitions=data.transitions._replace(
      observation=np.asfortranarray(data.transitions.observation)
    )
  )
  dataset_lib.save(tmp_path / 'd', turned, _SPEC, {})
  _assert_same(data, dataset_lib.load(tmp_path / 'd', _SPEC))


def test_version_1_is_read(saved, data):
  _make_version_1(saved)
  _assert_same(data, dataset_lib.load(saved, _SPEC))
  assert dataset_lib.load_manifest(saved)['spec']['observation_shape'] == [3]
  with pytest.raises(DatasetError, match='observation_shape of the data'):
    dataset_lib.load(saved, _SPEC._replace(observation_shape=(2,)))


def test_memory_maps(saved, data):
  def mapped(**kw):
    return dataset_lib.load(saved, _SPEC, memory_map=True, **kw)

  loaded = mapped()
  _assert_same(data, loaded)
  for part in (loaded.transitions, loaded.context):
    for leaf in (*part[:-1], *part.extras.values()):
      assert isinstance(leaf, np.memmap) and not leaf.flags.writeable
  assert not isinstance(loaded.size, np.memmap)
  # Another number, in range and in place.
  file = saved / 'transitions.reward.npy'
  content = bytearray(file.read_bytes())
  content[-1] ^= 1
  file.write_bytes(bytes(content))
  with pytest.raises(DatasetError, match='reward.npy: was altered'):
    mapped()
  assert (
    mapped(check_hash=False).transitions.reward[0, 0]
    == (data.transitions.reward[0, 0])
  )
  file.write_bytes(bytes(content[:-4]))
  with pytest.raises(DatasetError, match='reward.npy: holds .* were written'):
    mapped(check_hash=False)


def test_every_file_is_read_once(saved, data, monkeypatch):
  opened, open_regular = [], disk.open_regular

  def counted(path):
    opened.append(path.name)
    return open_regular(path)

  monkeypatch.setattr(disk, 'open_regular', counted)
  monkeypatch.setattr(disk, 'sha256', lambda path: pytest.fail('hashed apart'))
  _assert_same(data, dataset_lib.load(saved, _SPEC))
  assert sorted(opened) == sorted(p.name for p in saved.iterdir())


def test_manifest_says_what_the_data_are(saved):
  manifest = dataset_lib.load_manifest(saved)
  assert manifest['schema_version'] == 2
  assert manifest['spec']['name'] == 'toy'
  assert manifest['spec']['options']['backend'] == 'spring'
  assert manifest['task_parameters'] == ['goal']
  assert manifest['size'] == [10, 7, 8]
  assert manifest['episode_return'] == [1.0, -2.5, 3.0]
  assert manifest['source'] == {'command': 'collect', 'seed': 3}
  reward = manifest['leaves']['transitions.reward']
  content = (saved / 'transitions.reward.npy').read_bytes()
  assert reward['sha256'] == hashlib.sha256(content).hexdigest()
  assert (reward['shape'], reward['dtype']) == ([3, 10], 'float32')


def test_unwritten_capacity_may_hold_anything(tmp_path, data):
  data = _set(data, 'reward', (1, 7), np.nan)
  data = _set(data, 'discount', (1, 9), 0.5)
  dataset_lib.save(tmp_path / 'd', data, _SPEC, {})
  loaded = dataset_lib.load(tmp_path / 'd', _SPEC)
  assert np.isnan(loaded.transitions.reward[1, 7])


@pytest.mark.parametrize(
  ('field', 'index', 'value', 'message'),
  [
    ('reward', (1, 6), np.nan, r'transitions\.reward.*nan.*\[1, 6\]'),
    ('observation', (2, 0, 1), np.inf, r'observation.*inf.*\[2, 0, 1\]'),
    ('features', (0, 3, 2), np.nan, r'extras\.features.*\[0, 3, 2\]'),
    ('action', (0, 9, 1), 1.001, r'action.*within \[-1, 1\].*\[0, 9, 1\]'),
    ('discount', (2, 4), 0.99, r'discount.*0 or 1.*\[2, 4\]'),
  ],
)
def test_bad_value_is_named(tmp_path, data, field, index, value, message):
  with pytest.raises(DatasetError, match=message):
    dataset_lib.save(tmp_path / 'd', _set(data, field, index, value), _SPEC, {})
  assert not list(tmp_path.iterdir())


def test_action_of_exactly_one_is_fine(data):
  validate(_set(data, 'action', (0, 0, 0), 1.0), _SPEC)
  validate(_set(data, 'action', (0, 0, 0), -1.0000005), _SPEC)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (
      lambda d: d._replace(size=np.array([11, 7, 8], np.int32)),
      'task 0 has size 11.*capacity 10',
    ),
    (
      lambda d: d._replace(size=np.array([10, 0, 8], np.int32)),
      'task 1 has size 0.*at least 1',
    ),
    (lambda d: d._replace(size=np.array([10, 7, 8])), 'size.*int64.*int32'),
    (
      lambda d: d._replace(size=np.array([10, 7], np.int32)),
      r'reward.*shape \[3, 10\], expected \[2, \*\]',
    ),
    (lambda d: d._replace(context=None), 'context and context_size'),
    (
      lambda d: d._replace(tasks={'goal': np.zeros((2, 2), np.float32)}),
      r'tasks\.goal.*\[2, 2\], expected \[3, \.\.\.\]',
    ),
    (
      lambda d: d._replace(tasks={'../x': np.zeros(3, np.float32)}),
      'letters, digits',
    ),
    (
      lambda d: d._replace(episode_return=np.array([1, np.nan, 2], np.float32)),
      r'episode_return.*nan at index \[1\]',
    ),
    (
      lambda d: d._replace(
        transitions=d.transitions._replace(
          reward=d.transitions.reward[..., None]
        )
      ),
      r'reward.*\[3, 10, 1\], expected \[3, \*\]',
    ),
    (
      lambda d: d._replace(
        transitions=d.transitions._replace(
          action=d.transitions.action.astype(np.float64)
        )
      ),
      r'action.*float64, expected float32',
    ),
    (
      lambda d: d._replace(transitions=d.transitions._replace(extras={})),
      "no 'features'",
    ),
    (
      lambda d: d._replace(
        context=d.context._replace(
          next_observation=np.zeros((3, 6, 2), np.float32)
        )
      ),
      r'context\.next_observation.*\[3, 6, 2\], expected \[3, 6, 3\]',
    ),
  ],
)
def test_bad_structure_is_named(data, change, message):
  with pytest.raises(DatasetError, match=message):
    validate(change(data), _SPEC)


def test_a_dataset_of_schema_version_1(saved, data):
  """Written before observations could be images."""

  def older(manifest):
    manifest['schema_version'] = 1
    del manifest['spec']['observation_dtype']
    del manifest['spec']['observation_shape']
    manifest['spec']['observation_size'] = 3

  _edit_manifest(saved, older)
  _assert_same(data, dataset_lib.load(saved, _SPEC))
  assert dataset_lib.load_manifest(saved)['spec']['observation_shape'] == [3]
  with pytest.raises(DatasetError, match='observation_shape of the data'):
    dataset_lib.load(saved, _SPEC._replace(observation_shape=(2,)))


def test_missing_manifest(tmp_path):
  with pytest.raises(
    DatasetError, match='manifest.json: no such file.*collect'
  ):
    dataset_lib.load(tmp_path / 'nothing', _SPEC)


def test_manifest_not_json(saved):
  (saved / 'manifest.json').write_text('{"schema_version": 1, ')
  with pytest.raises(DatasetError, match='manifest.json: not valid JSON'):
    dataset_lib.load(saved, _SPEC)


def test_unknown_schema_version(saved):
  _edit_manifest(saved, lambda m: m.update(schema_version=99))
  with pytest.raises(DatasetError, match='schema version 99.*reads 1 and 2'):
    dataset_lib.load(saved, _SPEC)


@pytest.mark.parametrize(
  ('edit', 'message'),
  [
    (lambda m: m.pop('leaves'), "field 'leaves' is missing"),
    (lambda m: m.update(size=3), "field 'size' is missing or not a list"),
    (lambda m: m['spec'].pop('options'), "'spec' must hold"),
    (lambda m: m['leaves'].pop('transitions.reward'), 'transitions.reward'),
    (lambda m: m['leaves'].update({'../../x': {}}), 'x.*broken'),
  ],
)
def test_incomplete_manifest(saved, edit, message):
  _edit_manifest(saved, edit)
  with pytest.raises(DatasetError, match=message):
    dataset_lib.load(saved, _SPEC)


_WRONG_VALUES = (
  None,
  True,
  -1,
  0.5,
  10**400,
  float('inf'),
  '',
  '\ud800',
  [],
  [True],
  [None, 'x'],
  [[-1]],
  {},
  {'a': None},
  {'a': [True]},
)


_ALLOWED = (('source', dict), ('terminates', bool))


@pytest.mark.parametrize(
  'where',
  [
    ('schema_version',),
    *((field,) for field in dataset_lib._FIELDS | dataset_lib._FIELDS_SINCE_2),
    *(('spec', field) for field in EnvSpec._fields),
    ('leaves', 'transitions.reward'),
    *(
      ('leaves', 'transitions.reward', field)
      for field in ('shape', 'dtype', 'bytes', 'sha256')
    ),
  ],
  ids='.'.join,
)
def test_wrong_value_anywhere_in_the_manifest(saved, where):
  file = saved / 'manifest.json'
  good = file.read_text()

  def broken(change):
    manifest = json.loads(good)
    owner = manifest
    for key in where[:-1]:
      owner = owner[key]
    change(owner)
    file.write_text(json.dumps(manifest))
    return _refusal(saved)

  for value in _WRONG_VALUES:
    if (where[-1], type(value)) in _ALLOWED:
      continue
    broken(lambda owner: owner.update({where[-1]: value}))
  broken(lambda owner: owner.pop(where[-1]))


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('[' * 5000, 'nested more than'),
    ('{"a":' * 900 + '0' + '}' * 900, 'nested more than'),
    ('{"schema_version": ' + '1' * 5000 + '}', 'not valid JSON'),
    ('[]', 'not the manifest of a dataset'),
    (b'\xff\xfe{}', 'not valid JSON'),
  ],
  ids=['open', 'closed', 'long', 'list', 'encoding'],
)
def test_manifest_that_json_cannot_give(saved, text, message):
  content = text if isinstance(text, bytes) else text.encode()
  (saved / 'manifest.json').write_bytes(content)
  assert message in _refusal(saved)


def test_manifest_without_end(saved, monkeypatch):
  monkeypatch.setattr(disk, '_JSON_BYTES', 100)
  assert 'not valid JSON (more than' in _refusal(saved)


def _put_folder(path):
  path.mkdir()
  (path / 'file').touch()


@pytest.mark.parametrize('name', ['manifest.json', 'transitions.reward.npy'])
@pytest.mark.parametrize(
  ('put', 'message'),
  [
    (os.mkfifo, 'is a pipe or a device, not a file'),
    (lambda path: path.symlink_to('/dev/zero'), 'a pipe or a device'),
    (_put_folder, 'is a folder, not a file'),
    (lambda path: path.symlink_to(path), 'symbolic links'),
  ],
  ids=['pipe', 'device', 'folder', 'loop'],
)
def test_what_is_not_a_file(saved, name, put, message):
  (saved / name).unlink()
  put(saved / name)
  assert message in _refusal(saved)


def _npy(header, rest=b''):
  """An array file with this text as its header."""
  header = header.encode()
  magic = np.lib.format.magic(1, 0)
  return magic + len(header).to_bytes(2, 'little') + header + rest


def _npz():
  file = io.BytesIO()
  np.savez(file, np.zeros((_M, _C), np.float32))
  return file.getvalue()


def _header(shape, dtype='<f4'):
  return f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}}}"


_HUGE = [3, 3 << 40]  # 36 TiB of float32


@pytest.mark.parametrize(
  ('content', 'shape', 'message'),
  [
    (_npz(), [_M, _C], 'not an array file'),
    (b'', [_M, _C], 'not an array file'),
    (_npy('no header'), [_M, _C], 'not an array file'),
    (_npy('(' * 5000), [_M, _C], 'not an array file'),
    (_npy(_header((3,)), b'')[:20], [_M, _C], 'not an array file'),
    (_npy(_header((-1, 3))), [_M, _C], r'holds float32\[-1, 3\], the manifest'),
    (_npy(_header((_M, _C), '>f4')), [_M, _C], 'holds >f4'),
    (_npy(_header(tuple(_HUGE))), [_M, _C], r'holds float32\[3, 3298534883328'),
    (
      _npy(_header(tuple(_HUGE))),
      _HUGE,
      r'holds \d+ bytes, .* takes 395824186',
    ),
    (_npy(_header((0, 10**30))), [0, 10**30], 'does not fit into memory'),
    (_npy(_header((1,) * 80), b'1234'), [1] * 80, 'does not fit into memory'),
    (_npy(_header((_M, _C)), b'1' * 124), [_M, _C], 'bytes, float32.* takes'),
  ],
  ids=lambda x: repr(x)[:20] if isinstance(x, bytes) else None,
)
def test_array_file_that_is_none(saved, content, shape, message):
  """Found by the header, before an array is made."""
  _replace_leaf(saved, 'transitions.reward', content, shape=shape)
  found = _refusal(saved)
  assert re.search(message, found), found


@pytest.mark.parametrize('version', [1, 2])
@pytest.mark.parametrize(
  'name',
  [
    'tasks.goal',
    'transitions.extras.episode',
    'context.extras.episode',
    'context.reward',
    'context_size',
    'episode_return',
  ],
)
def test_leaf_that_is_not_listed(saved, name, version):
  if version == 1:
    _make_version_1(saved)
  _edit_manifest(saved, lambda m: m['leaves'].pop(name))
  assert f"does not list leaf '{name}'" in _refusal(saved)


@pytest.mark.parametrize(
  'name', ['transitions.extras.time', 'transitions.time', 'other', 'tasks.x']
)
def test_leaf_that_nothing_else_knows(saved, name):
  _edit_manifest(
    saved,
    lambda m: m['leaves'].update({name: m['leaves']['transitions.reward']}),
  )
  assert f"lists leaf '{name}'" in _refusal(saved)


@pytest.mark.parametrize(
  ('name', 'field'),
  [
    ('transitions.extras.episode', 'extras'),
    ('context.extras.episode', 'context_extras'),
    ('tasks.goal', 'task_shapes'),
  ],
)
def test_an_axis_too_many(saved, name, field):
  array = np.load(saved / f'{name}.npy')[..., None]
  _replace_leaf(saved, name, array, shape=list(array.shape))
  assert f"field '{field}' contradicts the arrays" in _refusal(saved)


@pytest.mark.parametrize(
  ('name', 'axes'), [('time', 1), ('diverged', 1), ('episode', 2)]
)
def test_shapes_that_no_extra_has(data, name, axes):
  episode = data.transitions.extras['episode']
  part = data.transitions
  for count in range(axes + 1):
    extras = {**part.extras, name: episode.reshape(_M, _C, *(1,) * count)}
    changed = data._replace(transitions=part._replace(extras=extras))
    if count < axes:
      validate(changed, _SPEC)
  with pytest.raises(DatasetError, match=rf'extras\.{name}: has shape'):
    validate(changed, _SPEC)


@pytest.mark.parametrize(
  ('field', 'value', 'message'),
  [
    ('num_tasks', 4, 'it says 4, they have 3'),
    ('capacity', 11, 'it says 11, they have 10'),
    ('size', [10, 7, 9], 'at 2: it says 9, they have 8'),
    ('size', [10, 7], 'it says 2 entries, they have 3 entries'),
    ('context_size', [6, 2, 5], 'at 1: it says 2, they have 1'),
    (
      'episode_return',
      [1, -2.5, 3.5],
      'at 2: it says 3.5, they have 3.0',
    ),
    ('task_shapes', {'goal': [3]}, "it says {'goal': [3]}, they have"),
    ('extras', {'features': [4], 'episode': [1]}, "'episode': [1]}, they have"),
  ],
)
def test_manifest_that_contradicts_the_arrays(saved, field, value, message):
  _edit_manifest(saved, lambda m: m.update({field: value}))
  found = _refusal(saved)
  assert f"manifest.json: field '{field}' contradicts the arrays" in found
  assert message in found


def test_context_that_the_manifest_denies(saved):
  _edit_manifest(saved, lambda m: m.update(context_size=None))
  assert "lists leaf 'context.action'" in _refusal(saved)


def test_missing_leaf_file(saved):
  (saved / 'transitions.action.npy').unlink()
  with pytest.raises(DatasetError, match='transitions.action.npy: .*missing'):
    dataset_lib.load(saved, _SPEC)


def test_truncated_file(saved):
  file = saved / 'context.reward.npy'
  content = file.read_bytes()
  file.write_bytes(content[:-5])
  with pytest.raises(
    DatasetError,
    match=f'context.reward.npy: holds {len(content) - 5} bytes.*truncated',
  ):
    dataset_lib.load(saved, _SPEC)


def test_altered_file(saved):
  file = saved / 'transitions.reward.npy'
  content = bytearray(file.read_bytes())
  content[-1] ^= 1
  file.write_bytes(content)
  with pytest.raises(DatasetError, match='transitions.reward.npy: .*altered'):
    dataset_lib.load(saved, _SPEC)


@pytest.mark.parametrize(
  'array', [np.zeros((3, 9), np.float32), np.zeros((3, 10))]
)
def test_file_that_is_not_what_the_manifest_says(saved, array):
  _replace_leaf(saved, 'transitions.reward', array)
  with pytest.raises(
    DatasetError, match=r'reward.npy: holds .*manifest says float32\[3, 10\]'
  ):
    dataset_lib.load(saved, _SPEC)


def test_nan_in_a_file(saved, data):
  reward = data.transitions.reward.copy()
  reward[2, 5] = np.nan
  _replace_leaf(saved, 'transitions.reward', reward)
  with pytest.raises(DatasetError, match=r'transitions\.reward.*nan.*\[2, 5\]'):
    dataset_lib.load(saved, _SPEC)


def test_pickled_file_is_not_unpickled(saved, tmp_path):
  class Bomb:
    def __reduce__(self):
      return (pathlib.Path.touch, (tmp_path / 'exploded',))

  _replace_leaf(saved, 'transitions.reward', np.array([Bomb()], object))
  with pytest.raises(DatasetError, match='reward.npy: holds object'):
    dataset_lib.load(saved, _SPEC)
  assert not (tmp_path / 'exploded').exists()


def test_other_family(saved):
  with pytest.raises(DatasetError, match="'toy', this program uses 'ant_dir'"):
    dataset_lib.load(saved, _SPEC._replace(name='ant_dir'), force=True)
  with pytest.raises(
    DatasetError, match=r'observation_shape of the data is \(3,\)'
  ):
    dataset_lib.load(saved, _SPEC._replace(observation_shape=(4,)), force=True)


def test_other_options_are_named_and_can_be_forced(saved, data):
  other = _SPEC._replace(
    options={'backend': 'mjx', 'dt': 0.05, 'shape': (1, 2), 'new': 1},
    episode_length=6,
  )
  with pytest.raises(DatasetError) as error:
    dataset_lib.load(saved, other)
  message = str(error.value)
  assert "backend: 'spring' in the data, 'mjx' here" in message
  assert "new: '(absent)' in the data, 1 here" in message
  assert 'episode_length: 5 in the data, 6 here' in message
  assert 'dt' not in message and 'shape' not in message
  with pytest.warns(UserWarning, match='backend'):
    loaded = dataset_lib.load(saved, other, force=True)
  _assert_same(data, loaded)


def test_refuses_to_overwrite(saved, data):
  changed = _set(data, 'reward', (0, 0), 9.0)
  with pytest.raises(DatasetError, match='exists already.*overwrite=True'):
    dataset_lib.save(saved, changed, _SPEC, {})
  _assert_same(data, dataset_lib.load(saved))
  dataset_lib.save(saved, changed, _SPEC, {}, overwrite=True)
  _assert_same(changed, dataset_lib.load(saved))
  assert [p.name for p in saved.parent.iterdir()] == ['data']


def test_never_overwrites_what_is_not_a_dataset(tmp_path, data):
  (tmp_path / 'thesis.tex').write_text('x')
  with pytest.raises(DatasetError, match='is not a dataset'):
    dataset_lib.save(tmp_path, data, _SPEC, {}, overwrite=True)
  assert (tmp_path / 'thesis.tex').exists()


def test_full_disk_leaves_the_old_dataset(saved, data, monkeypatch):
  def full(file, array, **kwargs):
    del array, kwargs
    file.write(b'some of it')
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(dataset_lib.np, 'save', full)
  changed = _set(data, 'reward', (0, 0), 9.0)
  with pytest.raises(DatasetError, match='No space left on device'):
    dataset_lib.save(saved, changed, _SPEC, {}, overwrite=True)
  _assert_same(data, dataset_lib.load(saved))
  assert [p.name for p in saved.parent.iterdir()] == ['data']


@pytest.mark.parametrize('renames', [0, 1, 2])
def test_killed_while_replacing(saved, data, monkeypatch, renames):
  """Dies after so many of the two renames; a whole dataset is always there."""

  class Killed(BaseException):
    pass

  changed = _set(data, 'reward', (0, 0), 9.0)
  done = 0
  rename = pathlib.Path.rename

  def counted(self, target):
    nonlocal done
    if done == renames:
      raise Killed
    done += 1
    return rename(self, target)

  with monkeypatch.context() as patch:
    # A killed process does not clean up either.
    patch.setattr(dataset_lib.disk.shutil, 'rmtree', lambda *a, **k: None)
    patch.setattr(pathlib.Path, 'rename', counted)
    if renames < 2:
      with pytest.raises(Killed):
        dataset_lib.save(saved, changed, _SPEC, {}, overwrite=True)
    else:
      dataset_lib.save(saved, changed, _SPEC, {}, overwrite=True)
  expected = changed if renames == 2 else data
  _assert_same(expected, dataset_lib.load(saved))
  dataset_lib.save(saved, changed, _SPEC, {}, overwrite=True)
  assert [p.name for p in saved.parent.iterdir()] == ['data']


@pytest.mark.parametrize('name', ['.data.old', '.data.tmp'])
def test_a_pipe_under_a_temporary_name(saved, data, name):
  os.mkfifo(saved.with_name(name))
  _assert_same(data, dataset_lib.load(saved))
  dataset_lib.save(saved, data, _SPEC, {}, overwrite=True)
  assert [p.name for p in saved.parent.iterdir()] == ['data']


def test_source_that_json_cannot_hold(tmp_path, data):
  with pytest.raises(DatasetError, match='source must be plain values'):
    dataset_lib.save(tmp_path / 'd', data, _SPEC, {'x': object()})
  assert not list(tmp_path.iterdir())


def test_slices_count_from_what_each_task_holds(data):
  reward = data.transitions.reward
  first = slice_transitions(data, 0, 4)
  last = slice_transitions(data, -4, None)
  middle = slice_transitions(data, -5, -2)
  assert first.size.tolist() == last.size.tolist() == [4, 4, 4]
  assert first.size.dtype == np.int32
  for task, size in enumerate(data.size):
    np.testing.assert_array_equal(
      first.transitions.reward[task], reward[task, :4]
    )
    np.testing.assert_array_equal(
      last.transitions.reward[task], reward[task, size - 4 : size]
    )
    np.testing.assert_array_equal(
      middle.transitions.extras['features'][task],
      data.transitions.extras['features'][task, size - 5 : size - 2],
    )
  assert first.context is data.context


def test_slices_of_different_lengths_are_padded(data):
  rest = slice_transitions(data, 5, None)
  assert rest.size.tolist() == [5, 2, 3]
  assert rest.transitions.observation.shape == (3, 5, 3)
  np.testing.assert_array_equal(rest.transitions.observation[1, 2:], 0)
  np.testing.assert_array_equal(
    rest.transitions.observation[1, :2],
    data.transitions.observation[1, 5:7],
  )
  validate(rest, _SPEC)


@pytest.mark.parametrize(
  ('start', 'stop', 'task'), [(0, 8, 1), (-8, None, 1), (8, None, 1), (3, 3, 0)]
)
def test_slice_of_more_than_there_is(data, start, stop, task):
  with pytest.raises(DatasetError, match=f'task {task} .*transitions'):
    slice_transitions(data, start, stop)


def test_a_family_without_terminations_has_discount_1(tmp_path, data):
  spec = _SPEC._replace(terminates=False)
  with pytest.raises(DatasetError, match='discount.*never terminates'):
    dataset_lib.save(tmp_path / 'd', data, spec, {})
  ones = data.transitions._replace(
    discount=np.ones_like(data.transitions.discount)
  )
  data = data._replace(transitions=ones, context=None, context_size=None)
  dataset_lib.save(tmp_path / 'd', data, spec, {})
