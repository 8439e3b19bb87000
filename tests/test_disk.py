"""Files: what is refused, and which file an error is about."""

import errno
import os

import numpy as np
import pytest

from offmeta import disk
from offmeta.results import report
from offmeta.training import metrics, workdir_lock


def _full(*args, **kwargs):
  raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_what_is_written_is_read(tmp_path):
  disk.write_json(tmp_path / 'new' / 'x.json', {'a': [1, 'ä']})
  assert disk.read_json(tmp_path / 'new' / 'x.json') == {'a': [1, 'ä']}
  assert [p.name for p in (tmp_path / 'new').iterdir()] == ['x.json']


@pytest.mark.parametrize(
  ('owner', 'name', 'write'),
  [
    (os, 'fsync', lambda path: disk.write_text(path, 'text')),
    (os, 'fsync', lambda path: disk.write_json(path, {})),
    (os, 'fsync', lambda path: disk.write_arrays(path, {'a': np.zeros(3)})),
    (os, 'fsync', lambda path: report.write_atomic(path, b'new')),
    (np, 'savez', lambda path: disk.write_arrays(path, {'a': np.zeros(3)})),
  ],
)
def test_a_full_disk_names_the_file(tmp_path, monkeypatch, owner, name, write):
  (tmp_path / 'folder').mkdir()
  path = tmp_path / 'folder' / 'file.npz'
  path.write_text('old')
  monkeypatch.setattr(owner, name, _full)
  with pytest.raises(OSError) as error:
    write(path)
  assert error.value.filename == str(path)
  assert list((tmp_path / 'folder').iterdir()) == [path], 'takes no room'


class _FullFile:
  """An open file of which nothing reaches the disk."""

  def write(self, text):
    del text

  def flush(self):
    _full()


def test_a_disk_that_fills_up_while_metrics_are_written(tmp_path, monkeypatch):
  path = tmp_path / 'metrics.jsonl'
  writer = metrics.JsonlWriter(path)
  monkeypatch.setattr(writer, '_file', _FullFile())
  with pytest.raises(OSError) as error:
    writer.write(1, {'a': 1.0})
  assert error.value.filename == str(path)


def test_kept_rows_of_metrics_are_on_the_disk(tmp_path, monkeypatch):
  """Before they replace the file; a full disk leaves that as it was."""
  path = tmp_path / 'metrics.jsonl'
  writer = metrics.JsonlWriter(path)
  for step in (1, 2):
    writer.write(step, {'a': 1.0})
  before = path.read_text()
  with monkeypatch.context() as patch:
    patch.setattr(os, 'fsync', _full)
    with pytest.raises(OSError) as error:
      writer.truncate_after(1)
  assert error.value.filename == str(path)
  assert path.read_text() == before
  assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_names_the_lock(tmp_path, monkeypatch):
  monkeypatch.setattr(workdir_lock, '_describe', _full)
  with pytest.raises(OSError) as error, workdir_lock.hold(tmp_path):
    pytest.fail('held')
  assert error.value.filename == str(tmp_path / '.lock')


@pytest.mark.parametrize('make', [os.mkfifo, os.mkdir])
def test_a_lock_that_is_no_file_is_named(tmp_path, make):
  make(tmp_path / '.lock')
  with pytest.raises(OSError, match='not a file') as error:
    with workdir_lock.hold(tmp_path):
      pytest.fail('held')
  assert error.value.filename == str(tmp_path / '.lock')


def test_anything_is_removed(tmp_path):
  (tmp_path / 'kept').mkdir()
  (tmp_path / 'kept' / 'file').touch()
  (tmp_path / 'folder' / 'inner').mkdir(parents=True)
  os.mkfifo(tmp_path / 'folder' / 'pipe')
  os.mkfifo(tmp_path / 'pipe')  # `rmtree` would wait for who writes to it.
  (tmp_path / 'link').symlink_to(tmp_path / 'kept')
  for name in ('folder', 'pipe', 'link', 'absent'):
    disk.remove(tmp_path / name)
  assert list(tmp_path.iterdir()) == [tmp_path / 'kept']
  assert (tmp_path / 'kept' / 'file').exists()
