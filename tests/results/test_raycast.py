"""Pictures of solids against projections computed another way."""

import numpy as np
import pytest

from offmeta.results import raycast

_WIDTH, _HEIGHT = 120, 90
_RED, _BLUE = (0.8, 0.1, 0.1, 1.0), (0.1, 0.1, 0.8, 1.0)
_FLOOR = ('plane', np.zeros(3), np.zeros(3), np.eye(3), _RED)
_HALF_FIELD = np.tan(np.deg2rad(18.0))


def _caster(azimuth=90.0, elevation=-20.0, extent=4.0):
  return raycast.Raycaster(azimuth, elevation, extent, _WIDTH, _HEIGHT)


def _rotation(seed):
  rotation = np.linalg.qr(np.random.RandomState(seed).normal(size=(3, 3)))[0]
  return rotation * np.sign(np.linalg.det(rotation))


def _surface(kind, size):
  """Points whose convex hull is the solid, in its frame [P, 3]."""
  random = np.random.RandomState(0)
  ball = random.normal(size=(20000, 3))
  ball /= np.linalg.norm(ball, axis=1, keepdims=True)
  ends = np.array([0, 0, 1]) * random.choice([-1, 1], (20000, 1))
  disc = ball * (1, 1, 0)
  disc /= np.linalg.norm(disc, axis=1, keepdims=True)
  return {
    'sphere': lambda: size[0] * ball,
    'ellipsoid': lambda: size * ball,
    'capsule': lambda: size[0] * ball + size[1] * ends,
    'cylinder': lambda: size[0] * disc + size[1] * ends,
    'box': lambda: size * random.choice([-1, 1], (20000, 3)),
  }[kind]()


def _project(points, azimuth, elevation, extent, target):
  """Columns and rows of points in space [P, 3], by a camera matrix."""
  a, e = np.deg2rad([azimuth, elevation])
  turn = np.array(
    [[np.sin(a), -np.cos(a), 0], [np.cos(a), np.sin(a), 0], [0, 0, 1]]
  )  # rows: right, ahead, up before the tilt
  tilt = np.array(
    [[1, 0, 0], [0, np.cos(e), np.sin(e)], [0, -np.sin(e), np.cos(e)]]
  )
  right, ahead, up = tilt @ turn @ (points - target).T
  ahead = ahead + extent / 2 / _HALF_FIELD
  scale = _HEIGHT / 2 / _HALF_FIELD
  return _WIDTH / 2 + scale * right / ahead, _HEIGHT / 2 - scale * up / ahead


def _changed(picture, other):
  return np.abs(picture.astype(int) - other).max(-1) > 12


@pytest.mark.parametrize(
  'kind, size',
  [
    ('sphere', [0.6, 0.0, 0.0]),
    ('capsule', [0.2, 0.7, 0.0]),
    ('cylinder', [0.4, 0.6, 0.0]),
    ('ellipsoid', [0.9, 0.3, 0.5]),
    ('box', [0.3, 0.5, 0.8]),
  ],
)
@pytest.mark.parametrize('seed', range(3))
def test_outlines(kind, size, seed):
  size, rotation = np.array(size), _rotation(seed)
  position = np.array([30.3, -7.2, 1.0])
  target = position + [0.4, 0.1, -0.3]
  view = (35.0 + 110 * seed, -30.0 + 25 * seed, 4.0)
  body = (kind, size, position, rotation, _RED)
  caster = _caster(*view)
  drawn = _changed(caster.image([body], target), caster.image([], target))
  rows, columns = np.nonzero(drawn)
  x, y = _project(_surface(kind, size) @ rotation.T + position, *view, target)
  found = [columns.min(), columns.max() + 1, rows.min(), rows.max() + 1]
  np.testing.assert_allclose(
    found, [x.min(), x.max(), y.min(), y.max()], atol=1.1
  )
  assert drawn.sum() > 200


def test_area_of_a_sphere():
  caster = _caster(elevation=0.0)
  body = ('sphere', np.array([1.0, 0, 0]), np.zeros(3), np.eye(3), _RED)
  drawn = _changed(
    caster.image([body], np.zeros(3)), caster.image([], np.zeros(3))
  )
  # Its outline is the cone of half angle asin(r / distance).
  slope = np.tan(np.arcsin(1.0 / (4.0 / 2 / _HALF_FIELD)))
  radius = slope * _HEIGHT / 2 / _HALF_FIELD
  np.testing.assert_allclose(drawn.sum(), np.pi * radius**2, rtol=0.03)


def _middle(picture):
  return picture[_HEIGHT // 2, _WIDTH // 2].astype(int)


@pytest.mark.parametrize('order', [1, -1])
def test_nearer_solids_hide_others(order):
  ball = lambda y, rgba: (
    'sphere',
    np.array([0.5, 0, 0]),
    np.array([0, y, 0]),
    np.eye(3),
    rgba,
  )
  solids = [ball(-1.0, _RED), ball(1.0, _BLUE)][::order]
  red, _, blue = _middle(_caster(elevation=0.0).image(solids, np.zeros(3)))
  assert red > 2 * blue


def test_translucent_solids_mix():
  ball = lambda y, rgba: (
    'sphere',
    np.array([0.5, 0, 0]),
    np.array([0, y, 0]),
    np.eye(3),
    rgba,
  )
  caster = _caster(elevation=0.0)
  front = ball(-1.0, (*_RED[:3], 0.5))
  red, _, blue = _middle(caster.image([front, ball(1.0, _BLUE)], np.zeros(3)))
  alone = _middle(caster.image([ball(1.0, _BLUE)], np.zeros(3)))
  assert red > alone[0] + 20 and 0.3 * alone[2] < blue < 0.8 * alone[2]
  # Behind something opaque it does not show.
  hidden = ball(1.0, (*_RED[:3], 0.5))
  opaque = [ball(-1.0, _BLUE)]
  np.testing.assert_array_equal(
    caster.image(opaque, np.zeros(3)),
    caster.image([hidden, *opaque], np.zeros(3)),
  )


def test_lit_from_above():
  ball = ('sphere', np.array([1.0, 0, 0]), np.zeros(3), np.eye(3), _RED)
  picture = _caster(elevation=0.0).image([ball], np.zeros(3)).astype(int)
  above, below = (picture[_HEIGHT // 2 + d, _WIDTH // 2] for d in (-15, 15))
  assert above[0] > 1.3 * below[0]


def test_shadow_falls_away_from_the_light():
  ball = (
    'sphere',
    np.array([0.3, 0, 0]),
    np.array([0, 0, 2.0]),
    np.eye(3),
    _RED,
  )
  view = (90.0, -50.0, 6.0)
  caster = _caster(*view)
  target = np.zeros(3)
  empty = caster.image([_FLOOR], target).astype(int)
  picture = caster.image([_FLOOR, ball], target).astype(int)
  light = np.array([0.28, -0.36, 0.89])
  spot = np.array([[0, 0, 2.0]]) - 2.0 / light[2] * light
  column, row = (int(x[0]) for x in _project(spot, *view, target))
  assert np.all(picture[row, column] < empty[row, column] - 15)
  changed = _changed(picture, empty)
  changed[max(0, row - 12) : row + 12, column - 16 : column + 16] = False
  rows, _ = np.nonzero(changed)  # the ball itself
  assert rows.max() < row - 12 and changed.sum() > 30


def test_the_floor_shows_motion():
  caster = _caster(extent=5.0)  # tiles of 1
  still, moved, again = (
    caster.image([_FLOOR], np.array([x, 0, 0])) for x in (0.0, 0.5, 2.0)
  )
  assert _changed(still, moved).mean() > 0.05
  np.testing.assert_allclose(still, again.astype(int), atol=2)


def test_trails_lie_on_the_floor():
  view = (90.0, -60.0, 4.0)
  caster = _caster(*view)
  points = np.array([[-1.5, -0.5], [1.5, -0.5]])
  ball = (
    'sphere',
    np.array([0.4, 0, 0]),
    np.array([0, -0.5, 0.2]),
    np.eye(3),
    _RED,
  )
  picture = caster.image(
    [_FLOOR, ball], np.zeros(3), [(points, (0.0, 1.0, 0.0))]
  ).astype(int)
  green = (picture[..., 1] > 150) & (picture[..., 0] < 120)
  x, y = _project(np.pad(points, ((0, 0), (0, 1))), *view, np.zeros(3))
  row = int(y[0])
  columns = np.flatnonzero(green[row])
  np.testing.assert_allclose(
    [columns.min(), columns.max()], [x[0], x[1]], atol=2
  )
  assert not np.any(green[row, 55:65])  # under the ball
  assert green.sum() < 4 * (x[1] - x[0])


def test_what_is_behind_the_camera_is_not_drawn():
  caster = _caster()
  ball = (
    'sphere',
    np.array([0.5, 0, 0]),
    np.array([0, -50.0, 0]),
    np.eye(3),
    _RED,
  )
  np.testing.assert_array_equal(
    caster.image([_FLOOR, ball], np.zeros(3)),
    caster.image([_FLOOR], np.zeros(3)),
  )


def test_from_straight_above_y_is_up():
  ball = (
    'sphere',
    np.array([0.2, 0, 0]),
    np.array([1.0, 1.0, 0.2]),
    np.eye(3),
    _RED,
  )
  caster = _caster(elevation=-90.0)
  picture = caster.image([_FLOOR, ball], np.zeros(3)).astype(int)
  rows, columns = np.nonzero(picture[..., 0] > 1.6 * picture[..., 2])
  assert rows.max() < _HEIGHT / 2 and columns.min() > _WIDTH / 2
