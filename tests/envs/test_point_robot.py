"""Point robots against numpy and against oyster's task lists."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import robots

from offmeta import envs, testing
from offmeta.envs import point_robot

# numpy's after seed(1337): the first and last of 100 draws of uniform(-1, 1)
# in pairs, and which of 100 ranks its shuffle puts at 0, 79, 80 and 99.
SQUARE_FIRST, SQUARE_LAST = (-0.47595065, -0.68263206), (0.70423287, 0.09487239)
RANKS = (2, 75, 66, 23)


@pytest.mark.parametrize(
  'name, options, lists',
  [
    ('point_robot', {}, ('default', 'pearl', 'ood')),
    ('point_robot', {'goals': 'circle'}, ('default', 'ood')),
    (
      'point_robot',
      {'goals': 'square', 'episode_length': 7},
      ('default', 'pearl', 'ood'),
    ),
    ('sparse_point_robot', {}, ('default', 'pearl', 'ood')),
  ],
)
def test_contract(name, options, lists):
  family = envs.make(name, **options)
  testing.check_env_family(family, num_steps=20, task_lists=lists)
  assert family.spec.name == name
  assert family.spec.episode_length == options.get('episode_length', 20)


def _list(family, name):
  return jax.device_get(family.task_list(name))


def _rollout(family, goal, actions):
  task = {'goal': np.float32(goal)}
  states = [jax.jit(family.reset)(jax.random.key(3), task)]
  step = jax.jit(family.step)
  for action in actions:
    states.append(step(states[-1], np.float32(action), task))
  return jax.device_get(states)


def test_moves_and_rewards_by_hand():
  # The second action is clipped to (-1, 0.5).
  actions = [[1.0, 0.5], [-7.0, 0.5], [1.0, 1.0]]
  positions = np.array([[0.1, 0.05], [0.0, 0.1], [0.1, 0.2]])
  goal = [0.0, 0.3]
  # Distances sqrt(.01 + .0625), .2 (just reached), sqrt(.01 + .01).
  distance = np.array([0.2692582, 0.2, 0.1414214])
  dense = _rollout(envs.make('point_robot'), goal, actions)[1:]
  np.testing.assert_allclose(
    [s.observation for s in dense], positions, atol=1e-6
  )
  np.testing.assert_allclose([s.reward for s in dense], -distance, atol=1e-6)
  np.testing.assert_allclose(
    envs.make('point_robot').position(np.stack([s.physics for s in dense])),
    positions,
    atol=1e-6,
  )
  # A goal a little nearer, so that rounding cannot decide the second step.
  near = [0.0, 0.299]
  sparse = _rollout(envs.make('sparse_point_robot'), near, actions)[1:]
  expected = [0.0, 1 - 0.199, 1 - np.hypot(0.1, 0.099)]
  np.testing.assert_allclose([s.reward for s in sparse], expected, atol=1e-6)


def test_sparse_family_gives_the_dense_reward_from_features():
  family = envs.make('sparse_point_robot')
  state = _rollout(family, [0.0, 1.0], [[0.0, 1.0]])[-1]
  assert state.reward == 0.0
  dense = jax.jit(point_robot.dense_reward)(
    state.features, np.float32([0.0, 1.0])
  )
  np.testing.assert_allclose(dense, -0.9, atol=1e-6)
  option = envs.make('sparse_point_robot', reward='dense')
  np.testing.assert_allclose(
    _rollout(option, [0.0, 1.0], [[0.0, 1.0]])[-1].reward, -0.9, atol=1e-6
  )


def test_starts():
  reset = lambda family: np.asarray(
    jax.jit(
      lambda: [
        family.reset(jax.random.key(seed), {'goal': jnp.zeros(2)}).observation
        for seed in range(20)
      ]
    )()
  )
  assert not reset(envs.make('point_robot'))[1].any()
  starts = reset(envs.make('point_robot', goals='square'))
  assert np.abs(starts).max() <= 1.0
  assert starts.min() < -0.5 and starts.max() > 0.5


@pytest.mark.parametrize(
  'goals, largest', [('semicircle', np.pi), ('circle', 2 * np.pi)]
)
def test_sampled_goals_lie_on_the_arc(goals, largest):
  family = envs.make('point_robot', goals=goals)
  goal = robots.sample_tasks(family, 0, 2000)['goal']
  np.testing.assert_allclose(np.linalg.norm(goal, axis=1), 1.0, atol=1e-6)
  angle = np.arctan2(goal[:, 1], goal[:, 0]) % (2 * np.pi)
  assert angle.max() <= largest + 1e-6
  # Uniform: the mean of 2000 draws is within 4 standard errors.
  assert abs(angle.mean() - largest / 2) < 4 * largest / np.sqrt(12 * 2000)


def test_sampled_goals_fill_the_square():
  family = envs.make('point_robot', goals='square')
  goal = robots.sample_tasks(family, 0, 2000)['goal']
  assert -1.0 <= goal.min() < -0.99 and 0.99 < goal.max() <= 1.0


def test_pearl_lists():
  train, test = jax.device_get(
    envs.make('point_robot', goals='square').task_list('pearl')
  )
  assert train['goal'].shape == (80, 2) and test['goal'].shape == (20, 2)
  np.testing.assert_allclose(train['goal'][0], SQUARE_FIRST, atol=1e-6)
  np.testing.assert_allclose(test['goal'][-1], SQUARE_LAST, atol=1e-6)
  train, test = jax.device_get(
    envs.make('sparse_point_robot').task_list('pearl')
  )
  assert train['goal'].shape == (80, 2) and test['goal'].shape == (20, 2)
  # The order that numpy's shuffle gives to 100 rows after seed(1337).
  goals = (
    train['goal'][0],
    train['goal'][79],
    test['goal'][0],
    test['goal'][19],
  )
  for goal, rank in zip(goals, RANKS):
    angle = np.pi * rank / 99
    np.testing.assert_allclose(goal, [np.cos(angle), np.sin(angle)], atol=1e-6)


@pytest.mark.parametrize('goals', ['semicircle', 'circle'])
def test_default_list_holds_test_goals_out_but_between(goals):
  train, test = jax.device_get(
    envs.make('point_robot', goals=goals).task_list('default')
  )
  angle = lambda task: (
    np.arctan2(task['goal'][:, 1], task['goal'][:, 0]) % (2 * np.pi)
  )
  assert train['goal'].shape == (32, 2) and test['goal'].shape == (20, 2)
  assert angle(train).min() < angle(test).min()
  assert angle(test).max() < angle(train).max()
  gap = np.abs(angle(train)[:, None] - angle(test)[None])
  assert gap.min() > 1e-4, 'a test goal is a training goal'


@pytest.mark.parametrize(
  'name, goals, border, end',
  [
    ('point_robot', 'semicircle', 0.75 * np.pi, np.pi),
    ('sparse_point_robot', 'semicircle', 0.75 * np.pi, np.pi),
    ('point_robot', 'circle', 1.5 * np.pi, 2 * np.pi),
  ],
)
def test_ood_tests_the_last_quarter_of_the_arc(name, goals, border, end):
  train, test = _list(envs.make(name, goals=goals), 'ood')
  angle = lambda task: (
    np.arctan2(task['goal'][:, 1], task['goal'][:, 0]) % (2 * np.pi)
  )
  assert train['goal'].shape == (32, 2) and test['goal'].shape == (20, 2)
  assert angle(train).max() < border < angle(test).min()
  assert angle(test).max() <= end
  # The largest of 32 and the extremes of 20 uniform draws.
  assert angle(train).max() > 0.8 * border
  assert angle(test).min() < border + 0.2 * (end - border)
  assert angle(test).max() > end - 0.2 * (end - border)
  np.testing.assert_allclose(
    np.linalg.norm(test['goal'], axis=1), 1.0, atol=1e-6
  )


def test_ood_tests_the_rim_of_the_square():
  train, test = jax.device_get(
    envs.make('point_robot', goals='square').task_list('ood')
  )
  assert train['goal'].shape == (80, 2) and test['goal'].shape == (20, 2)
  farthest = lambda task: np.abs(task['goal']).max(axis=1)
  assert 0.6 < farthest(train).max() <= 0.7 < farthest(test).min()
  assert farthest(test).max() <= 1.0
  # Outside, not only in the corners.
  assert np.abs(test['goal']).min(axis=1).min() < 0.4


def test_circle_has_no_published_list():
  with pytest.raises(ValueError, match="'pearl'.*known: default, ood"):
    envs.make('point_robot', goals='circle').task_list('pearl')


def test_tasks_helpers():
  family = envs.make('point_robot')
  train, test = _list(family, 'default')
  both = envs.concatenate_tasks(train, test)
  assert envs.num_tasks(both) == 52
  np.testing.assert_array_equal(
    envs.take_tasks(both, [0, 51])['goal'],
    np.stack([train['goal'][0], test['goal'][-1]]),
  )
  assert envs.take_tasks(both, 3)['goal'].shape == (2,)
  with pytest.raises(ValueError, match='disagree'):
    envs.num_tasks({'a': np.zeros(2), 'b': np.zeros(3)})
  with pytest.raises(ValueError, match='leading axis'):
    envs.num_tasks({'a': np.zeros(())})
