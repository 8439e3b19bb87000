"""Files that move."""

import base64
import io
import json
import os
import re
import sys

import numpy as np
from PIL import Image
import pytest

from offmeta.results import animation

_SHAPE = (30, 41, 3)


def _pictures(count=7):
  """A dark bar that moves over a coloured ground."""
  for i in range(count):
    picture = np.full(_SHAPE, (200, 220, 240), np.uint8)
    picture[:, 3 * i : 3 * i + 5] = (40, 20, 90)
    yield picture


def test_gif(tmp_path):
  path = tmp_path / 'x.gif'
  animation.save(path, _pictures(), fps=20.0)
  with Image.open(path) as image:
    assert image.n_frames == 7 and image.size == (41, 30)
    assert image.info['duration'] == 50 and image.info['loop'] == 0
    for i, picture in enumerate(_pictures()):
      image.seek(i)
      np.testing.assert_allclose(
        np.asarray(image.convert('RGB')), picture.astype(int), atol=8
      )


def test_gif_of_one_picture(tmp_path):
  animation.save(tmp_path / 'x.gif', _pictures(1), fps=1000.0)
  with Image.open(tmp_path / 'x.gif') as image:
    assert image.size == (41, 30)


def test_page_holds_everything(tmp_path):
  path = tmp_path / 'x.html'
  animation.save(path, _pictures(), fps=20.0)
  page = path.read_text()
  assert 'http' not in page and 'src=' not in page and '@import' not in page
  assert 'setInterval(step, 50)' in page and 'max="6"' in page
  frames = json.loads(re.search(r'const frames = (\[.*\]);', page).group(1))
  assert len(frames) == 7
  for text, picture in zip(frames, _pictures()):
    image = Image.open(io.BytesIO(base64.b64decode(text)))
    error = np.abs(np.asarray(image, int) - picture)
    assert image.size == (41, 30) and error.mean() < 8  # it is a JPEG


_FFMPEG = """#!/bin/sh
for last; do :; done
printf '%s\\n' "$*" > "$last.arguments"
exec cat > "$last"
"""


def test_mp4_goes_through_ffmpeg(tmp_path, monkeypatch):
  program = tmp_path / 'ffmpeg'
  program.write_text(_FFMPEG)
  program.chmod(0o755)
  monkeypatch.setenv('PATH', f'{tmp_path}{os.pathsep}{os.environ["PATH"]}')
  path = tmp_path / 'x.mp4'
  animation.save(path, _pictures(), fps=12.5)
  sent = np.frombuffer(path.read_bytes(), np.uint8).reshape(-1, *_SHAPE)
  np.testing.assert_array_equal(sent, list(_pictures()))
  arguments = (tmp_path / 'x.mp4.arguments').read_text()
  assert '-s 41x30' in arguments and '-r 12.5' in arguments


def test_ffmpeg_that_fails_is_reported(tmp_path, monkeypatch):
  program = tmp_path / 'ffmpeg'
  program.write_text('#!/bin/sh\ncat > /dev/null; echo no room >&2; exit 3\n')
  program.chmod(0o755)
  monkeypatch.setenv('PATH', f'{tmp_path}{os.pathsep}{os.environ["PATH"]}')
  with pytest.raises(animation.AnimationError, match='no room'):
    animation.save(tmp_path / 'x.mp4', _pictures(), fps=10.0)


def test_without_ffmpeg_the_message_says_what_to_do(tmp_path, monkeypatch):
  monkeypatch.setenv('PATH', str(tmp_path))
  monkeypatch.setitem(sys.modules, 'imageio_ffmpeg', None)
  with pytest.raises(animation.AnimationError, match=r'offmeta\[video\].*gif'):
    animation.check(tmp_path / 'x.mp4')


@pytest.mark.parametrize('name', ['x.avi', 'x'])
def test_unknown_ending(tmp_path, name):
  with pytest.raises(animation.AnimationError, match='.gif, .html, .mp4'):
    animation.check(tmp_path / name)


def test_caption_is_at_the_top():
  plain = np.full((240, 320, 3), 220, np.uint8)
  written = animation.caption(plain, ('ant_dir', 'task 3', 'return 1.0'))
  changed = np.flatnonzero((written != plain).any(axis=(1, 2)))
  assert 15 < len(changed) and changed.max() < 80
  assert np.all(plain == 220)
  other = animation.caption(plain, ('ant_dir', 'task 3', 'return 2.0'))
  assert np.any(other != written)
