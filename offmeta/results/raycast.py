"""Pictures of solids, by casting one ray per pixel in numpy.

Machines without a display or OpenGL can draw them. A solid is the tuple (kind,
size [3], position [3], rotation [3, 3], rgba [4]) with MuJoCo's kinds, half
sizes and axes: 'sphere', 'capsule', 'cylinder', 'ellipsoid' and 'box'; a
'plane' is an endless horizontal floor at the height of its position.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

Solid = tuple[str, Any, Any, Any, Any]

_HALF_FIELD = np.tan(np.deg2rad(18.0))  # of view, vertically
_FINE = 2  # rays per pixel and axis
_LIGHT = np.array([0.28, -0.36, 0.89])  # towards it, unit length
_AMBIENT, _DIFFUSE, _SHINE = 0.5, 0.55, 0.14
_SHADOW = 0.76  # brightness of a floor in the shade
_SKY = np.array([[0.95, 0.96, 0.97], [0.71, 0.80, 0.89]], np.float32)
_TILES = np.array([[0.83, 0.85, 0.87], [0.90, 0.915, 0.93]], np.float32)
# In distances of the target: where the floor has faded to 37 %, and to 0.
_FOG, _FAR = 5.0, 1000.0


class Raycaster:
  """Draws solids in perspective from one direction.

  Args:
    azimuth, elevation: of the view, degrees as in MuJoCo: 90 and 0 look along
      +y.
    extent: length units around the target that fit into the picture.
    width, height: pixels.
  """

  def __init__(
    self,
    azimuth: float,
    elevation: float,
    extent: float,
    width: int,
    height: int,
  ):
    azimuth, elevation = np.deg2rad([azimuth, elevation])
    self._right = np.array([np.sin(azimuth), -np.cos(azimuth), 0.0])
    self._forward = np.array(
      [
        np.cos(elevation) * np.cos(azimuth),
        np.cos(elevation) * np.sin(azimuth),
        np.sin(elevation),
      ]
    )
    self._up = np.cross(self._right, self._forward)
    extent *= max(1.0, height / width)
    self._distance = extent / 2 / _HALF_FIELD
    # Tiles of 1, 2 or 5 times a power of ten, about five in the height.
    self._tile = min(
      (base * 10.0**power for base in (1, 2, 5) for power in range(-4, 5)),
      key=lambda tile: abs(np.log(5 * tile / extent)),
    )
    self._shape = (height * _FINE, width * _FINE)
    self._scale = self._shape[0] / 2 / _HALF_FIELD  # rays per unit slope
    rows, columns = (np.arange(n) + 0.5 - n / 2 for n in self._shape)
    # Rays advance by 1 along `forward`, so their parameter is the depth.
    self._rays = (
      self._forward
      + columns[None, :, None] / self._scale * self._right
      - rows[:, None, None] / self._scale * self._up
    ).astype(np.float32)

  def image(
    self,
    solids: Sequence[Solid],
    target: np.ndarray,
    trails: Sequence[tuple[np.ndarray, Sequence[float]]] = (),
  ) -> np.ndarray:
    """A picture, uint8 [H, W, 3].

    Args:
      solids: what there is.
      target: [3], the point in the middle of the picture.
      trails: lines on the floor: (points [K, 2], rgb).
    """
    eye = np.asarray(target, float) - self._distance * self._forward
    floors = [solid[2][2] for solid in solids if solid[0] == 'plane']
    bodies = [solid for solid in solids if solid[0] != 'plane']
    floor = float(floors[0]) if floors else -np.inf
    picture, depth = self._background(eye, floor)
    if floors:
      for body in bodies:
        if body[4][3] == 1.0:
          self._shade(picture, depth, eye, body, floor)
      for points, rgb in trails:
        self._trace(picture, eye, points, rgb, floor)
    for body in sorted(bodies, key=lambda body: -body[4][3]):
      self._draw(picture, depth, eye, body)
    picture = sum(
      picture[row::_FINE, column::_FINE]
      for row in range(_FINE)
      for column in range(_FINE)
    )
    return (255 / _FINE**2 * picture + 0.5).clip(0, 255).astype(np.uint8)

  def _background(
    self, eye: np.ndarray, floor: float
  ) -> tuple[np.ndarray, np.ndarray]:
    """Sky and tiled floor: colours [h, w, 3] and depths [h, w]."""
    middle = _FINE // 2  # colours are computed once per pixel
    rays = self._rays[middle::_FINE, middle::_FINE]
    sky = _SKY[0] + np.clip(2.2 * rays[..., 2:], 0, 1) * (_SKY[1] - _SKY[0])
    depth = self._floor_depth(eye, floor, self._rays[..., 2])
    near = self._floor_depth(eye, floor, rays[..., 2:])
    near = np.minimum(near, _FAR * self._distance)  # there it is all sky
    # Tiles fade where a pixel covers many; offsets are small, for float32.
    offset = np.fmod(eye[:2] / self._tile, 2.0).astype(np.float32)
    wave = np.abs((near * rays[..., :2] / self._tile + offset) % 2 - 1) - 0.5
    covered = (
      near
      / np.maximum(-rays[..., 2:], 1e-6)
      * (_FINE / self._scale / self._tile)
    )
    wave = np.clip(wave / covered, -1, 1)
    odd = wave[..., :1] * wave[..., 1:]
    tiles = _TILES.mean(0) + odd * ((_TILES[1] - _TILES[0]) / 2)
    clear = np.exp((1 - near / self._distance).clip(max=0) / _FOG)
    sky += clear * (tiles - sky)
    return sky.repeat(_FINE, 0).repeat(_FINE, 1), depth

  def _floor_depth(
    self, eye: np.ndarray, floor: float, slope: np.ndarray
  ) -> np.ndarray:
    """Depth at which rays of a slope [...] meet the floor, or infinity."""
    with np.errstate(divide='ignore'):
      return np.where(slope < 0, (floor - float(eye[2])) / slope, np.inf)

  def _window(
    self, eye: np.ndarray, centers: np.ndarray, radius: float
  ) -> tuple[slice, slice]:
    """Rows and columns of the hull of spheres; empty if one is behind.

    Args:
      eye: [3].
      centers: [K, 3].
      radius: of all of them.
    """
    view = centers - eye
    near = view @ self._forward - radius
    if np.any(near <= 0):
      return slice(0, 0), slice(0, 0)
    slices = []
    for axis, size in zip((-self._up, self._right), self._shape):
      ends = np.stack(
        [
          (view @ axis + sign * radius) / z
          for sign in (-1, 1)
          for z in (near, near + 2 * radius)
        ]
      )
      low, high = (size / 2 + self._scale * x for x in (ends.min(), ends.max()))
      slices.append(
        slice(int(np.clip(low - 1, 0, size)), int(np.clip(high + 2, 0, size)))
      )
    return tuple(slices)

  def _draw(
    self,
    picture: np.ndarray,
    depth: np.ndarray,
    eye: np.ndarray,
    body: Solid,
  ):
    """Adds a body to picture and depth, in place."""
    kind, size, position, rotation, rgba = body
    shape = _SHAPES[kind]
    window = self._window(eye, *_cover(body))
    rays = self._rays[window] @ np.asarray(rotation, np.float32)
    start = ((eye - position) @ rotation).astype(np.float32)
    distance = shape.intersect(start, rays, size)
    hit = distance < depth[window]
    rays, near = rays[hit], distance[hit][:, None]
    normal = shape.normal(start + near * rays, size)
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    light = (_LIGHT @ rotation).astype(np.float32)
    facing = np.maximum(normal @ light, 0)
    # Halfway between the light and the eye (Blinn).
    middle = light - rays / np.linalg.norm(rays, axis=-1, keepdims=True)
    middle /= np.linalg.norm(middle, axis=-1, keepdims=True)
    shine = np.maximum(np.vecdot(normal, middle), 0) ** 24
    colour = (_AMBIENT + _DIFFUSE * facing)[:, None] * np.asarray(
      rgba[:3], np.float32
    ) + _SHINE * shine[:, None]
    picture[window][hit] += rgba[3] * (colour - picture[window][hit])
    if rgba[3] == 1.0:
      depth[window][hit] = near[:, 0]

  def _shade(
    self,
    picture: np.ndarray,
    depth: np.ndarray,
    eye: np.ndarray,
    body: Solid,
    floor: float,
  ):
    """Darkens the floor where a body hides the light, in place."""
    kind, size, position, rotation, _ = body
    shape = _SHAPES[kind]
    centers, radius = _cover(body)
    drop = (centers[:, 2:] - floor) / _LIGHT[2]
    window = self._window(eye, centers - drop * _LIGHT, radius / _LIGHT[2])
    seen = np.isfinite(depth[window])
    points = depth[window][seen][:, None] * self._rays[window][seen] + (
      eye - position
    ).astype(np.float32)
    distance = shape.intersect(
      points @ np.asarray(rotation, np.float32),
      (_LIGHT @ rotation).astype(np.float32),
      size,
    )
    shaded = np.zeros(seen.shape, bool)
    shaded[seen] = np.isfinite(distance) & (distance > 0)
    # Where two shadows meet, the floor is not darkened twice.
    dark = _SHADOW * _TILES.mean(0)
    picture[window][shaded] = np.minimum(picture[window][shaded], dark)

  def _trace(
    self,
    picture: np.ndarray,
    eye: np.ndarray,
    points: np.ndarray,
    rgb: Sequence[float],
    floor: float,
  ):
    """Draws a line on the floor, in place."""
    view = np.column_stack([points, np.full(len(points), floor)]) - eye
    view = view[view @ self._forward > 0]
    across = np.stack([-view @ self._up, view @ self._right], axis=-1)
    pixels = (
      np.array(self._shape) / 2
      + self._scale * across / (view @ self._forward)[:, None]
    )
    pen = np.arange(-_FINE, _FINE + 1)
    pen = np.stack(np.meshgrid(pen, pen), -1).reshape(-1, 2)
    pen = pen[np.sum(pen**2, -1) <= _FINE**2]
    for first, last in zip(pixels, pixels[1:]):
      steps = int(np.clip(np.abs(last - first).max(), 1, sum(self._shape)))
      line = first + np.linspace(0, 1, steps + 1)[:, None] * (last - first)
      spots = (np.floor(line).astype(int)[:, None] + pen).reshape(-1, 2)
      inside = np.all((spots >= 0) & (spots < self._shape), axis=-1)
      picture[tuple(spots[inside].T)] = rgb


class _Shape(NamedTuple):
  """A kind of solid in its own frame.

  Attributes:
    cover: (size) -> (half length, radius): it lies in the hull of two spheres
      of this radius at both ends of this length along z.
    intersect: (start [..., 3], ray [..., 3], size) -> the first positive or
      negative multiple [...] of the ray that meets it; infinite if none does.
    normal: (point [..., 3] on the surface, size) -> outward, of any length.
  """

  cover: Callable[[Any], tuple[float, float]]
  intersect: Callable[[np.ndarray, np.ndarray, Any], np.ndarray]
  normal: Callable[[np.ndarray, Any], np.ndarray]


def _first_root(a: Any, half_b: Any, c: Any) -> np.ndarray:
  """The lesser root of a t^2 + 2 half_b t + c, infinite if there is none."""
  inner = half_b * half_b - a * c
  with np.errstate(divide='ignore', invalid='ignore'):
    root = (-half_b - np.sqrt(np.maximum(inner, 0))) / a
  return np.where(inner > 0, root, np.inf)


def _meet_ellipsoid(start, ray, size):
  scale = np.asarray(size, np.float32)
  start, ray = start / scale, ray / scale
  return _first_root(
    np.vecdot(ray, ray), np.vecdot(start, ray), np.vecdot(start, start) - 1
  )


def _meet_sphere(start, ray, size):
  return _meet_ellipsoid(start, ray, np.repeat(size[0], 3))


def _meet_wall(start, ray, size):
  """The round side of a cylinder of radius size[0], half length size[1]."""
  xy, along = start[..., :2], ray[..., :2]
  root = _first_root(
    np.vecdot(along, along),
    np.vecdot(xy, along),
    np.vecdot(xy, xy) - size[0] ** 2,
  )
  with np.errstate(invalid='ignore'):
    height = start[..., 2] + root * ray[..., 2]
    return np.where(np.abs(height) <= size[1], root, np.inf)


def _meet_capsule(start, ray, size):
  end = np.array([0, 0, size[1]], np.float32)
  return np.minimum.reduce(
    [
      _meet_wall(start, ray, size),
      _meet_sphere(start - end, ray, size),
      _meet_sphere(start + end, ray, size),
    ]
  )


def _meet_cylinder(start, ray, size):
  found = [_meet_wall(start, ray, size)]
  for height in (-size[1], size[1]):
    with np.errstate(divide='ignore', invalid='ignore'):
      root = (height - start[..., 2]) / ray[..., 2]
      xy = start[..., :2] + root[..., None] * ray[..., :2]
      found.append(np.where(np.vecdot(xy, xy) <= size[0] ** 2, root, np.inf))
  return np.minimum.reduce(found)


def _meet_box(start, ray, size):
  size = np.asarray(size, np.float32)
  with np.errstate(divide='ignore', invalid='ignore'):
    ends = np.stack([(-size - start) / ray, (size - start) / ray])
  enter, leave = ends.min(0).max(-1), ends.max(0).min(-1)
  return np.where(enter < leave, enter, np.inf)


def _capsule_normal(point, size):
  axis = np.zeros_like(point)
  axis[..., 2] = np.clip(point[..., 2], -size[1], size[1])
  return point - axis


def _box_normal(point, size):
  share = point / np.asarray(size, np.float32)
  face = np.abs(share) == np.abs(share).max(-1, keepdims=True)
  return np.sign(share) * face


def _cylinder_normal(point, size):
  cap = np.abs(point[..., 2:]) > 0.999 * size[1]
  return np.where(cap, point * (0, 0, 1), point * (1, 1, 0))


_SHAPES = {
  'sphere': _Shape(
    lambda size: (0, size[0]), _meet_sphere, lambda point, size: point
  ),
  'capsule': _Shape(
    lambda size: (size[1], size[0]), _meet_capsule, _capsule_normal
  ),
  'cylinder': _Shape(
    lambda size: (size[1], size[0]), _meet_cylinder, _cylinder_normal
  ),
  'ellipsoid': _Shape(
    lambda size: (0, max(size)),
    _meet_ellipsoid,
    lambda point, size: point / np.square(size, dtype=np.float32),
  ),
  'box': _Shape(lambda size: (0, np.linalg.norm(size)), _meet_box, _box_normal),
}


def _cover(body: Solid) -> tuple[np.ndarray, float]:
  """Spheres whose hull a body lies in: centres [2, 3] and their radius."""
  kind, size, position, rotation, _ = body
  half, radius = _SHAPES[kind].cover(size)
  axis = half * np.asarray(rotation)[:, 2]
  return np.stack([position - axis, position + axis]), radius
