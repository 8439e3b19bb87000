"""Damaged checkpoints, without Orbax: records, names and what is no file.

Trees whose arrays have no elements are in the record alone, so that nothing is
compiled or written by others.
"""

import errno
import json
import os
import pathlib
import shutil
import signal
import warnings

import numpy as np
import pytest

from offmeta import disk
from offmeta.checkpoints import checkpointer as checkpointing, files
from offmeta.checkpoints.checkpointer import Checkpointer, CheckpointError

_TREE = {'x': np.zeros((0, 3), np.float32)}
_LEAVES = {'x': {'shape': [0, 3], 'dtype': 'float32'}}


def _write(path, step, content=b'content'):
  """A checkpoint with one file."""
  path.mkdir(parents=True)
  (path / 'part').write_bytes(content)
  files.write_record(path, step, 'abc', _LEAVES)


@pytest.fixture(name='folder')
def _folder(tmp_path):
  """Checkpoints of steps 1 and 2."""
  for step in (1, 2):
    _write(tmp_path / 'checkpoints' / str(step), step)
  return tmp_path / 'checkpoints'


def _edit(path, change, version=2):
  """Changes a record and signs it again, which version 1 did not."""
  file = path / 'record.json'
  record = json.loads(file.read_text())
  del record['digest']
  record['schema_version'] = version
  change(record)
  if version > 1:
    record['digest'] = files._digest(record)
  file.write_text(json.dumps(record))


def _restore(folder):
  """The step from which a new program goes on, and what it was warned of."""

  def stop(*args):
    raise AssertionError('hangs')

  before = signal.signal(signal.SIGALRM, stop)
  signal.alarm(10)
  try:
    with warnings.catch_warnings(record=True) as caught:
      warnings.simplefilter('always')
      checkpointer = Checkpointer(folder, 'abc')
      checkpointer.restore(_TREE)
  finally:
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
  return checkpointer.latest_step(), [str(w.message) for w in caught]


def _assert_steps_back(folder, message=''):
  step, (said,) = _restore(folder)
  assert step == 1
  assert said.startswith(str(folder)) and message in said, said
  assert said.endswith('continuing from step 1')
  return said


def test_undamaged(folder):
  assert _restore(folder) == (2, [])
  _edit(folder / '2', lambda record: None, version=1)
  assert _restore(folder) == (2, []), 'version 1 is still read'


_WRONG_VALUES = (
  None,
  True,
  -1,
  0.5,
  '\ud800',
  [],
  [None],
  [[1]],
  {},
  {'part': {}},
  {'part': {'bytes': True, 'crc32': 0}},
)


# Of the right type: for these there is the digest, or what compares them.
_ALLOWED = (
  ('schema_version', -1),
  ('config_hash', '\ud800'),
  ('dtype', '\ud800'),
  ('shape', []),
  ('leaves', {}),
  ('files', {}),
)


@pytest.mark.parametrize('version', [1, 2])
@pytest.mark.parametrize(
  'where',
  [
    ('schema_version',),
    ('step',),
    ('config_hash',),
    ('leaves',),
    ('leaves', 'x'),
    ('leaves', 'x', 'shape'),
    ('leaves', 'x', 'dtype'),
    ('files',),
    ('files', 'part'),
    ('files', 'part', 'bytes'),
    ('files', 'part', 'crc32'),
  ],
  ids='.'.join,
)
def test_wrong_value_anywhere_in_the_record(folder, where, version):
  file = folder / '2' / 'record.json'
  good = file.read_text()

  def broken(change):
    def edit(record):
      for key in where[:-1]:
        record = record[key]
      change(record)

    file.write_text(good)
    _edit(folder / '2', edit, version)
    with pytest.raises(files.DamagedError):
      files.check_files(folder / '2', files.read_record(folder / '2'))

  for value in _WRONG_VALUES:
    if (where[-1], value) not in _ALLOWED:
      broken(lambda owner: owner.update({where[-1]: value}))
  if where[-1] not in ('x', 'part'):
    broken(lambda owner: owner.pop(where[-1]))
  _assert_steps_back(folder, 'step 2 is damaged (')


def test_any_flipped_bit_of_a_record_is_noticed(folder):
  file = folder / '2' / 'record.json'
  good, record = file.read_bytes(), files.read_record(folder / '2')
  noticed = 0
  for bit in range(8 * len(good)):
    content = bytearray(good)
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)
    try:
      assert files.read_record(folder / '2') == record, bit
    except files.DamagedError:
      noticed += 1
  assert noticed > 6 * len(good)  # The rest is white space.


@pytest.mark.parametrize(
  ('old', 'new'),
  [('float32', 'float31'), ('"abc"', '"abb"'), ('"step": 2', '"step": 3')],
)
def test_altered_record_is_not_another_configuration(folder, old, new):
  file = folder / '2' / 'record.json'
  text = file.read_text()
  assert old in text
  file.write_text(text.replace(old, new))
  _assert_steps_back(folder, 'step 2 is damaged (record.json was altered)')


@pytest.mark.parametrize(
  'content', [b'', b'[' * 5000, b'{}', b'7', b'\xff\xfe', b'{"digest": 1}']
)
def test_record_that_is_none(folder, content):
  (folder / '2' / 'record.json').write_bytes(content)
  _assert_steps_back(folder, 'step 2 is damaged (record.json ')


@pytest.mark.parametrize('name', ['record.json', 'part'])
@pytest.mark.parametrize(
  ('put', 'message'),
  [
    (os.mkfifo, 'a pipe or a device'),
    (lambda path: path.mkdir(), 'is a folder'),
    (lambda path: path.symlink_to('/dev/zero'), ''),
    (lambda path: path.symlink_to(path), ''),
    (lambda path: None, 'No such file'),
  ],
  ids=['pipe', 'folder', 'device', 'loop', 'missing'],
)
def test_what_is_not_a_file(folder, name, put, message):
  (folder / '2' / name).unlink()
  put(folder / '2' / name)
  _assert_steps_back(folder, message)


@pytest.mark.parametrize(
  'name',
  ['/dev/zero', '../1/part', '..', '', '.', 'a\0b', 'x' * 5000, '\ud800'],
  ids=range(8),
)
def test_files_that_no_checkpoint_has(folder, name):
  _edit(
    folder / '2',
    lambda record: record['files'].update({name: record['files']['part']}),
  )
  assert '\n' not in _assert_steps_back(folder, 'step 2 is damaged (')


def test_size_is_checked_before_a_file_is_read(folder, monkeypatch):
  (folder / '2' / 'part').write_bytes(b'content and more')
  monkeypatch.setattr(files.zlib, 'crc32', lambda *a: pytest.fail('was read'))
  record = files.read_record(folder / '2')
  with pytest.raises(files.DamagedError, match='holds 16 bytes of 7'):
    files.check_files(folder / '2', record)


@pytest.mark.parametrize(
  'name', ['0002', '\u0662', '+2', 'backup', '2.old', 'damaged-2', '.x']
)
def test_newest_under_another_name(folder, name):
  """It is left alone, and whoever goes on from the older one is told."""
  (folder / '2').rename(folder / name)
  message = f'{name!r} looks like the checkpoint of step 2'
  for _ in range(2):
    _assert_steps_back(folder, message)
  assert (folder / name).is_dir()
  shutil.rmtree(folder / '1')
  checkpointer = Checkpointer(folder, 'abc')
  with pytest.warns(UserWarning, match='looks like the checkpoint of step 2'):
    assert checkpointer.latest_step() is None
  with pytest.raises(CheckpointError, match='there is no checkpoint; .*rename'):
    checkpointer.restore(_TREE)
  (folder / name).rename(folder / '2')
  assert _restore(folder) == (2, [])


@pytest.mark.parametrize('name', ['0002', 'damaged-2'])
def test_newest_under_another_name_and_without_a_record(folder, name):
  (folder / '2').rename(folder / name)
  (folder / name / 'record.json').unlink()
  _assert_steps_back(folder, f'{name!r} looks like the checkpoint of step 2')


def test_older_ones_under_other_names_are_nothing_to_tell(folder):
  shutil.copytree(folder / '1', folder / 'damaged-1')
  shutil.copytree(folder / '2', folder / 'backup of 2')
  (folder / 'notes').mkdir()
  (folder / 'notes.txt').touch()
  assert _restore(folder) == (2, [])


def test_no_warning_when_an_older_step_is_asked_for(folder):
  (folder / '2').rename(folder / '0002')
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    Checkpointer(folder, 'abc').restore(_TREE, step=1)


def test_folders_that_were_renamed(folder):
  (folder / '2').rename(folder / '7')
  said = _assert_steps_back(folder, 'step 7 is damaged (it is the checkpoint')
  assert 'name it 2 again' in said
  _assert_steps_back(folder, "'damaged-7' looks like the checkpoint of step 2")


def test_folders_that_were_swapped(folder):
  (folder / '1').rename(folder / 'x')
  (folder / '2').rename(folder / '1')
  (folder / 'x').rename(folder / '2')
  with pytest.raises(
    CheckpointError, match='no intact.*step 2: .* name it 1 again; step 1: '
  ):
    Checkpointer(folder, 'abc').restore(_TREE)


def _empty(path):
  shutil.rmtree(path)
  path.mkdir()


def _file(path):
  shutil.rmtree(path)
  path.touch()


def _dangling(path):
  shutil.rmtree(path)
  path.symlink_to('nowhere')


@pytest.mark.parametrize('replace', [_empty, _file, _dangling])
def test_newest_is_no_folder_with_a_checkpoint(folder, replace):
  replace(folder / '2')
  _assert_steps_back(folder, 'step 2 is damaged (record.json cannot be read')
  # Once it is aside, a new one can take its place, and be set aside too.
  _write(folder / '2', 2)
  assert _restore(folder) == (2, [])
  replace(folder / '2')
  step, said = _restore(folder)
  assert step == 1 and 'step 2 is damaged' in said[-1]


def test_complete_but_for_its_name(folder):
  """As a program leaves it that is killed before the last renaming."""
  _write(folder / '.tmp-3', 3)
  assert _restore(folder) == (3, [])
  (folder / '3').rename(folder / '.tmp-3')
  (folder / '.tmp-3' / 'part').write_bytes(b'CONTENT')
  step, (said,) = _restore(folder)
  assert step == 2 and "step 3 is damaged ('part' was altered)" in said


def test_interrupted_writes_are_cleared(folder):
  (folder / '.tmp-3').mkdir()
  (folder / '.tmp-3' / 'part').touch()
  _write(folder / '.tmp-2', 2, b'other')
  _write(folder / '.old-2', 2, b'other')
  (folder / '.tmp-4').write_text('no folder')
  os.mkfifo(folder / '.tmp-5')
  assert _restore(folder) == (2, [])
  assert sorted(p.name for p in folder.iterdir()) == ['1', '2']
  assert (folder / '2' / 'part').read_bytes() == b'content'


def test_what_was_replaced_is_better_than_what_replaced_it(folder):
  _write(folder / '.old-2', 2, b'other')
  (folder / '2' / 'record.json').unlink()
  step, (said,) = _restore(folder)
  assert step == 2 and 'moved to damaged-2, what it had replaced is' in said
  assert (folder / '2' / 'part').read_bytes() == b'other'


def test_what_was_replaced_comes_back(folder):
  (folder / '2').rename(folder / '.old-2')
  assert _restore(folder) == (2, [])


def test_steps_are_whole_numbers_from_0(tmp_path):
  checkpointer = Checkpointer(tmp_path, 'abc')
  with pytest.raises(ValueError, match='at least 0, got -1'):
    checkpointer.save(-1, _TREE)
  checkpointer.save(np.int32(3), _TREE)
  assert _restore(tmp_path) == (3, [])


# Messages.


def _full(*args, **kwargs):
  raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _message(folder, step=3):
  with pytest.raises(CheckpointError) as error:
    Checkpointer(folder, 'abc').save(step, _TREE)
  return str(error.value)


def test_a_full_disk_names_the_file(folder, monkeypatch):
  monkeypatch.setattr(disk.os, 'fsync', _full)
  said = _message(folder)
  assert f'is reached, at {folder}/.tmp-3/record.json (' in said
  assert said.endswith('The checkpoint of step 2 is intact')


def test_a_full_disk_that_names_nothing(folder, monkeypatch):
  monkeypatch.setattr(Checkpointer, '_write_arrays', _full)
  assert f'is reached, at {folder}/.tmp-3 (' in _message(folder)


def test_only_what_is_intact_is_called_so(folder, monkeypatch):
  monkeypatch.setattr(disk, 'write_text', _full)
  (folder / '2' / 'part').write_bytes(b'CONTENT')
  assert _message(folder).endswith('The checkpoint of step 1 is intact')
  (folder / '1' / 'part').unlink()
  said = _message(folder)
  assert said.endswith(f'No earlier checkpoint in {folder} is intact')
  other = folder / 'other'
  assert f'{other} has no earlier checkpoint; what other' in _message(other)


def test_what_is_being_replaced_is_intact(folder, monkeypatch):
  """Neither the new nor the old one can be given its name."""
  rename = pathlib.Path.rename

  def rename_once(self, target):
    if self.name.startswith('.'):
      _full()
    return rename(self, target)

  with monkeypatch.context() as patch:
    patch.setattr(pathlib.Path, 'rename', rename_once)
    shutil.rmtree(folder / '1')
    said = _message(folder, 2)
  assert said.endswith('The checkpoint of step 2 is intact')
  assert _restore(folder) == (2, [])


def test_a_directory_that_cannot_be_listed(folder, monkeypatch):
  checkpointer = Checkpointer(folder, 'abc')
  iterdir, calls = pathlib.Path.iterdir, []

  def fails_from_the_second_on(self):
    calls.append(1)
    if len(calls) > 1:
      raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))
    return iterdir(self)

  with monkeypatch.context() as patch:
    patch.setattr(pathlib.Path, 'iterdir', fails_from_the_second_on)
    patch.setattr(checkpointing.files, 'make_empty', _full)
    with pytest.raises(
      CheckpointError, match='disk is full.*intact is unknown: .*error'
    ):
      checkpointer.save(3, _TREE)
    for call in (checkpointer.latest_step, lambda: checkpointer.restore(_TREE)):
      with pytest.raises(CheckpointError, match='cannot be used for checkp'):
        call()
