"""Pictures to a file that moves: .gif, .html or .mp4.

A GIF needs Pillow only, which matplotlib brings along. A page holds its
pictures and its player, so it can be sent around. An MP4 needs ffmpeg.
"""

import base64
from collections.abc import Callable, Iterable, Sequence
import functools
import io
import json
import pathlib
import shutil
import subprocess

import numpy as np

_INK = (34, 38, 45)
_PALETTE_SAMPLES = 12  # pictures that choose the colours of a GIF
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ margin: 2em auto; width: {width}px; font: 14px sans-serif; }}
div {{ display: flex; gap: 1em; }} input {{ flex: 1; }}
</style></head><body><img id="picture" width="{width}" alt="{title}">
<div><button id="play">pause</button>
<input id="position" type="range" min="0" max="{last}" value="0"></div>
<script>
const frames = {frames};
const picture = document.getElementById('picture');
const play = document.getElementById('play');
const position = document.getElementById('position');
let timer = null;
function show() {{
  picture.src = 'data:image/jpeg;base64,' + frames[position.value];
}}
function step() {{
  position.value = (Number(position.value) + 1) % frames.length;
  show();
}}
function toggle() {{
  if (timer) clearInterval(timer);
  timer = timer ? null : setInterval(step, {milliseconds});
  play.textContent = timer ? 'pause' : 'play';
}}
play.onclick = toggle;
position.oninput = show;
show();
toggle();
</script></body></html>
"""


class AnimationError(ValueError):
  """A file of this kind cannot be written."""


def check(path: pathlib.Path):
  """Whether `save` can write this kind of file, before the pictures are made.

  Raises:
    AnimationError: an unknown ending, or a program is missing.
  """
  if path.suffix not in _WRITERS:
    raise AnimationError(
      f'{path}: cannot write {path.suffix or "a file without an ending"};'
      f' known: {", ".join(_WRITERS)}'
    )
  if path.suffix == '.mp4':
    _ffmpeg()


def save(path: pathlib.Path, pictures: Iterable[np.ndarray], fps: float):
  """Writes a file, replacing what was there.

  Args:
    path: ends with .gif, .html or .mp4.
    pictures: uint8 [H, W, 3] each, at least one.
    fps: pictures per second; a GIF rounds to hundredths of a second.

  Raises:
    AnimationError: see `check`; or ffmpeg failed.
    OSError: the file cannot be written.
  """
  check(path)
  _WRITERS[path.suffix](path, pictures, fps)


def caption(picture: np.ndarray, lines: Sequence[str]) -> np.ndarray:
  """The picture with text over it, the first line in bold."""
  from PIL import Image, ImageDraw  # pylint: disable=g-import-not-at-top

  size = max(8, min(picture.shape[0] // 26, picture.shape[1] // 36))
  image = Image.fromarray(picture)
  draw = ImageDraw.Draw(image)
  for row, line in enumerate(lines):
    draw.text(
      (0.7 * size, (0.5 + 1.35 * row) * size),
      line,
      fill=_INK,
      font=_font(size, bold=row == 0),
    )
  return np.asarray(image)


@functools.cache
def _font(size: int, bold: bool):
  """The font that comes with matplotlib."""
  import matplotlib  # pylint: disable=g-import-not-at-top
  from PIL import ImageFont  # pylint: disable=g-import-not-at-top

  name = 'DejaVuSans-Bold.ttf' if bold else 'DejaVuSans.ttf'
  return ImageFont.truetype(
    str(pathlib.Path(matplotlib.get_data_path(), 'fonts', 'ttf', name)), size
  )


def _gif(path: pathlib.Path, pictures: Iterable[np.ndarray], fps: float):
  """All pictures share one palette, so that colours do not flicker."""
  from PIL import Image  # pylint: disable=g-import-not-at-top

  pictures = list(pictures)
  some = np.linspace(0, len(pictures) - 1, _PALETTE_SAMPLES).astype(int)
  palette = Image.fromarray(
    np.concatenate([pictures[i] for i in some])
  ).quantize(256)
  first, *others = (
    Image.fromarray(picture).quantize(palette=palette, dither=Image.Dither.NONE)
    for picture in pictures
  )
  first.save(
    path,
    save_all=True,
    append_images=others,
    loop=0,
    duration=10 * max(2, round(100 / fps)),
  )


def _html(path: pathlib.Path, pictures: Iterable[np.ndarray], fps: float):
  from PIL import Image  # pylint: disable=g-import-not-at-top

  frames = []
  for picture in pictures:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, 'jpeg', quality=88)
    frames.append(base64.b64encode(file.getvalue()).decode())
  path.write_text(
    _PAGE.format(
      title=path.stem,
      width=picture.shape[1],
      last=len(frames) - 1,
      milliseconds=round(1000 / fps),
      frames=json.dumps(frames),
    )
  )


def _mp4(path: pathlib.Path, pictures: Iterable[np.ndarray], fps: float):
  pictures = iter(pictures)
  first = next(pictures)
  height, width = first.shape[:2]
  command = [
    _ffmpeg(),
    '-y',
    '-loglevel',
    'error',
    '-f',
    'rawvideo',
    '-pix_fmt',
    'rgb24',
    '-s',
    f'{width}x{height}',
    '-r',
    str(fps),
    '-i',
    '-',
    # Players want even sides and this pixel format.
    '-vf',
    'pad=ceil(iw/2)*2:ceil(ih/2)*2',
    '-c:v',
    'libx264',
    '-pix_fmt',
    'yuv420p',
    str(path),
  ]
  content = b''.join([first.tobytes(), *(p.tobytes() for p in pictures)])
  done = subprocess.run(command, input=content, capture_output=True)
  if done.returncode:
    raise AnimationError(f'{path}: ffmpeg: {done.stderr.decode().strip()}')


def _ffmpeg() -> str:
  """The program on the path, or the one of the package imageio-ffmpeg."""
  found = shutil.which('ffmpeg')
  if found:
    return found
  try:
    import imageio_ffmpeg  # pylint: disable=g-import-not-at-top

    return imageio_ffmpeg.get_ffmpeg_exe()
  except (ImportError, RuntimeError) as error:
    raise AnimationError(
      'an .mp4 needs ffmpeg: install it, or "offmeta[video]"; .gif and .html'
      f' need nothing ({error})'
    ) from error


_Writer = Callable[[pathlib.Path, Iterable[np.ndarray], float], None]
_WRITERS: dict[str, _Writer] = {'.gif': _gif, '.html': _html, '.mp4': _mp4}
