"""Task lists of the simulated bodies that vary the reward, against numpy.

First and last values were computed apart from the package, with
numpy.random.RandomState(1337).
"""

import jax
import numpy as np
import pytest
import robots

from offmeta import envs

CIRCLE = 2 * np.pi


def _list(family, name):
  return jax.device_get(family.task_list(name))


def _numpy(pair):
  """The only leaf of (train, test)."""
  return [np.asarray(next(iter(task.values())), np.float64) for task in pair]


def test_cheetah_vel():
  family = envs.make('cheetah_vel')
  train, test = _list(family, 'smac')
  assert train['velocity'].shape == (100,) and test['velocity'].shape == (30,)
  # np.random.seed(1337); uniform(0, 3, 130)
  np.testing.assert_allclose(
    train['velocity'][[0, 1, 99]],
    [0.78607403, 0.47605192, 0.37620899],
    rtol=1e-6,
  )
  np.testing.assert_allclose(
    test['velocity'][[0, 29]], [2.05095932, 0.55832232], rtol=1e-6
  )
  for alias in ('pearl', 'default'):
    for a, b in zip(family.task_list(alias), (train, test)):
      np.testing.assert_array_equal(a['velocity'], b['velocity'])
  shorter = _list(family, 'focal')
  np.testing.assert_array_equal(
    np.concatenate([shorter[0]['velocity'], shorter[1]['velocity']]),
    train['velocity'],
  )
  assert shorter[0]['velocity'].shape == (80,)
  train, test = _list(family, 'macaw')
  np.testing.assert_allclose(
    test['velocity'], [0.225, 0.6, 1.2, 1.8, 2.025], rtol=1e-6
  )
  everything = np.sort(np.concatenate([train['velocity'], test['velocity']]))
  np.testing.assert_allclose(everything, 0.075 * np.arange(1, 41), rtol=1e-6)
  with pytest.raises(
    ValueError, match='borel, csro, default, focal, macaw, .*ood, pearl, sm'
  ):
    family.task_list('unicorn')


@pytest.mark.parametrize(
  'name, num_train, first_test',
  [
    ('half', 20, 0.15),
    ('quarter', 10, 0.15),
    ('eighth', 5, 0.15),
    ('sixteenth', 3, 0.15),
    ('extrapolation', 26, 2.025),
  ],
)
def test_macaw_splits(name, num_train, first_test):
  train, test = _numpy(envs.make('cheetah_vel').task_list(f'macaw_{name}'))
  assert train.shape == (num_train,) and test.shape == (40 - num_train,)
  np.testing.assert_allclose([train[0], test[0]], [0.075, first_test])
  if name == 'extrapolation':
    np.testing.assert_allclose(train.max(), 1.95)


def test_cheetah_dir():
  family = envs.make('cheetah_dir')
  for name, tasks in (
    ('default', [-1.0, 1.0]),
    ('pearl', [-1.0, 1.0]),
    ('macaw', [1.0, -1.0]),
  ):
    for part in _numpy(family.task_list(name)):
      np.testing.assert_array_equal(part, tasks)
  with pytest.raises(ValueError, match="'ood'.*known: default, macaw, pearl"):
    family.task_list('ood')


def test_ant_dir():
  family = envs.make('ant_dir')
  train, test = _list(family, 'smac')
  assert train['angle'].shape == (100,) and test['angle'].shape == (20,)
  # np.random.seed(1337); uniform(0, 360, 120), in degrees
  np.testing.assert_allclose(
    np.rad2deg(train['angle'][[0, 1, 99]]),
    [94.328883, 57.12623, 45.145079],
    rtol=1e-5,
  )
  np.testing.assert_allclose(
    np.rad2deg(test['angle'][[0, 19]]),
    [246.115118, 278.086126],
    rtol=1e-5,
  )
  train, test = _list(family, 'macaw')
  assert train['angle'].shape == (45,)
  np.testing.assert_allclose(
    np.rad2deg(test['angle']), [14.1, 101.9, 51.8, 204.5, 237.3], atol=0.06
  )
  for part in _list(family, 'pearl'):
    np.testing.assert_allclose(part['angle'], [0.0, np.pi], rtol=1e-6)


def test_ant_goal():
  family = envs.make('ant_goal')
  train, test = _numpy(family.task_list('pearl'))
  assert train.shape == (150, 2) and test.shape == (30, 2)
  # All 180 angles are drawn before the radii.
  np.testing.assert_allclose(train[0], [-0.16195957, 2.13956726], atol=1e-5)
  np.testing.assert_allclose(test[-1], [-1.75503893, 1.67907281], atol=1e-5)
  for part, same in zip((train, test), _numpy(family.task_list('default'))):
    np.testing.assert_array_equal(part, same)


@pytest.mark.parametrize(
  'name, train_size, test_size, last',
  [
    ('smac', 50, 5, 91.700689),
    ('default', 50, 5, 91.700689),
    ('pearl', 100, 30, 66.998679),
  ],
)
def test_humanoid_dir(name, train_size, test_size, last):
  train, test = _numpy(envs.make('humanoid_dir').task_list(name))
  assert train.shape == (train_size,) and test.shape == (test_size,)
  # The same generator as ant_dir's.
  np.testing.assert_allclose(
    np.rad2deg(train[:2]), [94.328883, 57.12623], rtol=1e-5
  )
  np.testing.assert_allclose(np.rad2deg(test[-1]), last, rtol=1e-5)


@pytest.mark.parametrize(
  'name, first, step',
  [
    ('cheetah_vel', 1.0, 2.0 / 39),
    ('ant_goal', 0.0, CIRCLE / 40),
    ('humanoid_dir', 0.0, CIRCLE / 40),
  ],
)
def test_csro_holds_every_fourth_of_a_grid_out(name, first, step):
  train, test = _numpy(envs.make(name).task_list('csro'))
  if name == 'ant_goal':
    for goals in (train, test):
      np.testing.assert_allclose(np.linalg.norm(goals, axis=1), 2, rtol=1e-6)
    # A tiny negative angle is 0, not the end of the circle.
    train, test = (
      (np.arctan2(goals[:, 1], goals[:, 0]) + 1e-6) % CIRCLE - 1e-6
      for goals in (train, test)
    )
  expected = first + step * np.arange(40)
  np.testing.assert_allclose(test, expected[2::4], atol=1e-5)
  np.testing.assert_allclose(
    np.sort(np.concatenate([train, test])), expected, atol=1e-5
  )
  assert len(train) == 30


@pytest.mark.parametrize(
  'name, measure, low, border, high',
  [
    ('cheetah_vel', np.abs, 0.0, 2.0, 3.0),
    ('ant_dir', np.abs, 0.0, 0.75 * CIRCLE, CIRCLE),
    ('humanoid_dir', np.abs, 0.0, 0.75 * CIRCLE, CIRCLE),
    ('ant_goal', lambda goal: np.linalg.norm(goal, axis=1), 0.0, 2.0, 3.0),
  ],
)
def test_ood_ranges_are_disjoint_and_filled(name, measure, low, border, high):
  train, test = map(measure, _numpy(envs.make(name).task_list('ood')))
  assert train.shape == (100,) and test.shape == (30,)
  assert low <= train.min() and train.max() < border < test.min()
  assert test.max() <= high
  # The largest of 100 and the extremes of 30 uniform draws.
  assert train.max() > border - 0.1 * (border - low)
  assert test.min() < border + 0.2 * (high - border)
  assert test.max() > high - 0.2 * (high - border)


def test_ood_goals_surround_the_origin():
  for goals in _numpy(envs.make('ant_goal').task_list('ood')):
    angle = np.arctan2(goals[:, 1], goals[:, 0]) % CIRCLE
    quarter = np.bincount((angle // (CIRCLE / 4)).astype(int), minlength=4)
    assert np.all(quarter > 0.1 * len(goals))
    radius = np.linalg.norm(goals, axis=1)
    assert abs(np.corrcoef(radius, angle)[0, 1]) < 0.4, 'not independent'


def test_sampled_tasks_cover_their_range():
  sample = lambda name: robots.sample_tasks(envs.make(name), 0, 1000)
  velocity = sample('cheetah_vel')['velocity']
  assert 0.0 <= velocity.min() < 0.02 and 2.98 < velocity.max() < 3.0
  for name in ('ant_dir', 'humanoid_dir'):
    angle = sample(name)['angle']
    assert 0.0 <= angle.min() < 0.04 and 6.24 < angle.max() < 2 * np.pi
  direction = sample('cheetah_dir')['direction']
  assert set(direction.tolist()) == {-1.0, 1.0}
  assert abs(direction.mean()) < 4 / np.sqrt(1000)
  goal = sample('ant_goal')['goal']
  radius = np.linalg.norm(goal, axis=1)
  assert 2.9 < radius.max() <= 3.0
  # Uniform on the disc: a quarter lies within half the radius, and the mean
  # (standard deviation 1.5 per coordinate) is the origin.
  assert abs((radius < 1.5).mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 1000)
  assert np.abs(goal.mean(axis=0)).max() < 4 * 1.5 / np.sqrt(1000)
