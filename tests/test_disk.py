"""Files: what is refused, and which file an error is about."""

import errno
import os

import numpy as np
import pytest

from offmeta import disk


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
