"""The table-top family: contract, physics, scenes, thresholds, task lists."""

import copy
import functools

import jax
import mujoco
import numpy as np
import pytest
import robots
import table

from offmeta import envs, testing
from offmeta.envs import manipulation_tasks

FIXTURES = ('button_drawer', 'handle_drawer', 'button')


@pytest.fixture(scope='module')
def robot():
  return robots.compiled('manipulation')


def _reach(robot, state, task, place, grip=1.0, steps=20):
  """Moves the hand straight to a place [3]; all states."""
  states = [state]
  for _ in range(steps):
    move = (np.asarray(place) - np.asarray(states[-1].observation[:3])) / 0.05
    move /= max(1.0, np.abs(move).max())
    action = np.append(move, grip).astype(np.float32)
    states.append(robot.step(states[-1], action, task))
  return states


def test_contract():
  family = envs.make('manipulation')
  testing.check_env_family(
    family, num_steps=10, task_lists=('default', 'smac', 'ood')
  )
  spec = family.spec
  assert (spec.observation_size, spec.action_size) == (13, 4)
  assert spec.episode_length == 75 and not spec.terminates
  assert spec.options['backend'] == 'mjx' and spec.options['aims'] == 'all'
  opt = family.simulator.model.opt
  assert (opt.iterations, opt.ls_iterations, opt.timestep) == (6, 4, 0.01)


@pytest.mark.parametrize(
  'options, message',
  [
    ({'backend': 'spring'}, "'spring'; known: mjx. .*another environment"),
    ({'aims': 'some'}, 'all, internal'),
    ({'n_frames': 0}, 'n_frames'),
    ({'solver_iterations': 0}, 'solver_iterations'),
  ],
)
def test_bad_options_name_the_known(options, message):
  with pytest.raises(ValueError, match=message):
    envs.make('manipulation', **options)


def test_only_planes_spheres_and_capsules_collide(robot):
  model = robot.family.simulator.model
  assert not np.any(model.geom_contype) and not np.any(model.geom_conaffinity)
  kinds = {
    int(model.geom_type[model.geom(int(i)).id])
    for i in np.r_[model.pair_geom1, model.pair_geom2]
  }
  geom = mujoco.mjtGeom
  assert kinds == {geom.mjGEOM_PLANE, geom.mjGEOM_SPHERE, geom.mjGEOM_CAPSULE}


def _write(model, task):
  """What a task changes, by hand."""
  side, present = float(task['side']), np.asarray(task['present'])
  for part, there in zip(FIXTURES, present):
    model.body(part).pos[1] *= side
    model.body(part).pos[0] += 10.0 * (1.0 - there)
  if side < 0:
    model.body('handle_drawer').quat[:] = [0, 0, 0, 1]


# Waypoints, grip and steps: to the block, up with it and away; to the handle
# and back; on the button and up.
_PATHS = {
  'move_block': [
    ([0.78, -0.13, -0.2], -1, 7),
    ([0.78, -0.13, -0.36], -1, 5),
    ([0.78, -0.13, -0.36], 1, 3),
    ([0.78, -0.13, -0.23], 1, 4),
    ([0.68, 0.0, -0.23], 1, 5),
  ],
  'open_handle_drawer': [
    ([0.68, -0.14, -0.2], -1, 8),
    ([0.68, -0.14, -0.33], -1, 5),
    ([0.68, 0.01, -0.33], 1, 8),
  ],
  'open_button_drawer': [
    ([0.58, -0.13, -0.27], 1, 9),
    ([0.58, -0.13, -0.32], 1, 8),
    ([0.58, -0.13, -0.2], 1, 4),
  ],
}


@pytest.mark.parametrize('aim', _PATHS)
def test_mjx_follows_c_mujoco(robot, aim):
  """Grips, pulls and presses, with C MuJoCo's solver run to convergence.

  Measured over 18 scripted episodes with noise: at most 6e-5 in q and 2e-3 in
  qd after 20 steps. Controls depend on positions: computed here from C's own.
  """
  task = table.task(aim, side=-1.0, absent=('tray', 'object'))
  model = copy.copy(robot.family.simulator.model)
  model.opt.iterations, model.opt.ls_iterations = 100, 50
  _write(model, task)
  data = mujoco.MjData(model)
  state = robot.reset(jax.random.key(0), task)
  data.qpos[:] = state.physics.q
  touched = set()
  for place, grip, steps in _PATHS[aim]:
    for after in _reach(robot, state, task, place, grip, steps)[1:]:
      # The same path, from where C's hand is.
      move = (np.array(place) - data.qpos[:3]) / 0.05
      move /= max(1.0, np.abs(move).max())
      data.ctrl[:3] = np.clip(
        data.qpos[:3] + 0.05 * move, [0.5, -0.2, -0.36], [0.85, 0.2, -0.1]
      )
      data.ctrl[3:5] = 0.045 * (1 - grip) / 2
      data.ctrl[5] = 15.0 * (data.qpos[7] < -0.01)
      for _ in range(5):
        mujoco.mj_step(model, data)
        touched |= {model.geom(int(g)).name for g in data.contact.geom.flat}
      state = after
      np.testing.assert_allclose(state.physics.q, data.qpos, atol=3e-4)
      np.testing.assert_allclose(state.physics.qd, data.qvel, atol=1e-2)
  solid = aim.split('_')[1]
  assert {solid, 'left_pad', 'right_pad'} <= touched
  features = np.asarray(state.features)
  if aim == 'move_block':
    assert state.reward == 0.0 and features[8] > -0.25, 'not lifted'
  else:
    assert features[{'handle': 10, 'button': 9}[solid]] > 0.1, 'not opened'


def test_sides_are_mirror_images(robot):
  """Mirrored scene, start and actions give the mirrored episode."""
  right, left = (table.task('open_handle_drawer', side=s) for s in (1.0, -1.0))
  state = robot.reset(jax.random.key(0), right)
  other = robot.reset(jax.random.key(0), left)
  mirror = np.ones(14, np.float32)
  mirror[[1, 9, 12]] = -1.0
  q = np.asarray(state.physics.q) * mirror
  other = other._replace(physics=other.physics._replace(q=q))
  # With shut fingers through the object, then over the handle and back.
  path = [
    ([0.58, -0.2, -0.34], 1, 5),
    ([0.58, -0.08, -0.34], 1, 5),
    ([0.68, 0.14, -0.1], -1, 8),
    ([0.68, 0.14, -0.33], -1, 6),
    ([0.68, 0.0, -0.33], 1, 6),
  ]
  flip = np.array([1, -1, 1, 1], np.float32)
  for place, grip, steps in path:
    for _ in range(steps):
      move = (np.array(place) - np.asarray(state.observation[:3])) / 0.05
      action = np.clip(np.append(move, grip), -1, 1).astype(np.float32)
      state = robot.step(state, action, right)
      other = robot.step(other, action * flip, left)
  signs = np.ones(13)
  signs[[1, 5, 8, 11]] = -1.0
  state, other = jax.device_get((state, other))
  np.testing.assert_allclose(
    other.observation, state.observation * signs, atol=1e-4
  )
  assert state.features[10] > 0.1 and state.reward == other.reward == 0.0
  assert abs(state.observation[5] + 0.13) > 0.02, 'the object was not pushed'


def test_observation_of_a_full_scene(robot):
  task = table.task('move_hand', side=-1.0, opened=True, corner=(2, 0, 1))
  state = jax.device_get(robot.reset(jax.random.key(0), task))
  expected = [
    0.6,
    0.15,
    -0.2,
    0.09,
    0.78,
    -0.13,
    -0.36,
    0.78,
    0.13,
    -0.36,
    0.77,
    0.01,
    -0.3,
  ]
  noisy = np.array([0, 1, 4, 5, 7, 8])  # x and y of hand, object and block
  off = np.abs(np.asarray(state.observation) - expected)
  assert off[noisy].max() <= 0.0101 and np.delete(off, noisy).max() < 1e-4
  again = robot.reset(jax.random.key(1), task)
  moved = np.abs(np.asarray(again.observation) - state.observation)
  assert np.all(moved[noisy] > 1e-5), 'the start does not vary'
  np.testing.assert_allclose(
    jax.jit(robot.family.features_of)(state.observation, task),
    state.features,
    atol=1e-6,
  )
  rest = robot.step(state, np.array([0, 0, 0, -1], np.float32), task)
  np.testing.assert_allclose(rest.observation, state.observation, atol=1e-3)


@pytest.mark.parametrize(
  'part, place, slot',
  [
    ('button', [0.58, 0.13, -0.33], 12),
    ('handle_drawer', [0.68, 0.14, -0.33], 11),
    ('object', [0.58, -0.13, -0.36], slice(4, 7)),
    ('button_drawer', None, 10),
  ],
)
def test_what_is_absent_is_zero_and_out_of_reach(robot, part, place, slot):
  """The hand goes where it would be; if it is there, it gives way or stops."""
  touched = {}
  for absent in ((part,), ()):
    task = table.task('move_hand', absent=absent)
    state = jax.device_get(robot.reset(jax.random.key(0), task))
    start = state.observation[slot]
    assert np.all(start == 0.0) if absent else np.all(start != 0.0)
    if place is None:
      continue
    # From the side, across where it stands, with the fingers shut.
    aside = np.array(place) - [0.0, 0.06 * np.sign(place[1]), 0.0]
    states = _reach(robot, state, task, [*aside[:2], -0.2], steps=9)
    states += _reach(robot, states[-1], task, aside, steps=5)
    states += _reach(robot, states[-1], task, place, steps=5)
    states = jax.device_get(states)
    if absent:
      assert all(np.all(s.observation[slot] == 0.0) for s in states)
    moved = np.abs(states[-1].physics.q - state.physics.q)[5:]
    gap = np.abs(states[-1].observation[:3] - np.array(place))
    touched[bool(absent)] = moved.max() > 0.005 or gap.max() > 0.005
  assert place is None or touched == {True: False, False: True}


def test_hand_stays_in_the_workspace(robot):
  task = table.task('move_hand', absent=table.PARTS)
  low, high = np.array([0.5, -0.2, -0.36]), np.array([0.85, 0.2, -0.1])
  for place, bound in (([0, -1, -1], low), ([2, 1, 1], high)):
    state = robot.reset(jax.random.key(0), task)
    state = _reach(robot, state, task, place, grip=-1.0, steps=25)[-1]
    np.testing.assert_allclose(
      np.asarray(state.observation)[:3], bound, atol=1e-3
    )


@pytest.mark.parametrize('opened, drive', [(False, 15.0), (True, -15.0)])
def test_button_drives_its_drawer_away_from_the_start(robot, opened, drive):
  task = table.task('press_button', opened=opened)
  physics = robot.reset(jax.random.key(0), task).physics
  controls = jax.jit(robot.family._controls)
  for depth, force in ((0.0, 0.0), (0.0095, 0.0), (0.0105, drive)):
    q = np.array(physics.q)
    q[7] = -depth
    control = controls(physics._replace(q=q), np.zeros(4, np.float32), task)
    np.testing.assert_allclose(np.asarray(control)[5], force)


@functools.cache
def _reward(family):
  return jax.jit(family.reward)


@pytest.mark.parametrize(
  'aim, slot, reach',
  [
    ('move_hand', 0, [[0.675, 0.0, -0.11], [0.0, 0.0, 0.08]]),
    ('move_object', 3, [[0.675, 0.0, -0.23], [0.08, 0.0, 0.0]]),
    ('move_block', 6, [[0.675, 0.0, -0.23], [0.0, -0.08, 0.0]]),
    ('object_in_tray', 3, [[0.78, -0.13, -0.36003], [0.0, 0.08, 0.0]]),
    ('open_button_drawer', 9, [[0.15], [-0.065]]),
    ('close_button_drawer', 9, [[0.0], [0.065]]),
    ('open_handle_drawer', 10, [[0.15], [-0.065]]),
    ('close_handle_drawer', 10, [[0.0], [0.065]]),
    ('press_button', 11, [[0.01], [-0.008]]),
    ('press_button', 11, [[0.01], [0.008]]),
  ],
)
def test_thresholds(robot, aim, slot, reach):
  goal, bound = np.array(reach)
  task, reward_of = table.task(aim), _reward(robot.family)
  still = np.zeros(4, np.float32)
  for share, reward in ((0.0, 0.0), (0.99, 0.0), (1.01, -1.0)):
    features = np.full(12, 5.0, np.float32)
    features[slot : slot + len(goal)] = goal + share * bound
    assert float(reward_of(features, still, task)) == reward
    # An aim of what is not there is never met.
    missing = [part for part in table.PARTS if part in aim]
    if missing:
      bare = table.task(aim, absent=missing[:1])
      assert float(reward_of(features, still, bare)) == -1.0


def _feasible(task):
  """Feasible aims of one numpy task, written anew."""
  drawer, handle, button, tray, thing = np.asarray(task['present']) > 0.5
  opened = task['open'] > 0.5
  return np.array(
    [
      True,
      True,
      handle and not opened,
      handle and opened,
      button,
      button and drawer and not opened,
      button and drawer and opened,
      thing,
      thing and tray,
    ]
  )


def test_sampled_tasks_are_feasible_and_cover_all():
  family = envs.make('manipulation')
  tasks = robots.sample_tasks(family, 0, 3000)
  assert all(leaf.dtype == np.float32 for leaf in tasks.values())
  assert np.all(tasks['aim'].sum(axis=1) == 1.0)
  assert set(tasks['side']) == {-1.0, 1.0} and set(tasks['open']) == {0.0, 1.0}
  feasible = np.stack(
    [_feasible(envs.take_tasks(tasks, i)) for i in range(3000)]
  )
  assert np.all(feasible[tasks['aim'] > 0.5])
  # Uniform among the feasible: expected frequency, 4 standard deviations.
  expected = np.mean(feasible / feasible.sum(axis=1, keepdims=True), axis=0)
  assert np.abs(tasks['aim'].mean(axis=0) - expected).max() < 4 * 0.5 / 54
  assert np.abs(tasks['present'].mean(axis=0) - 0.75).max() < 4 * 0.44 / 54
  for axis in (1, 2):  # every thing in one corner, no two in the same
    assert np.all(tasks['corner'].sum(axis=axis) == 1.0)
  assert len(np.unique(tasks['corner'].argmax(axis=2), axis=0)) == 6


def test_a_uniform_number_that_rounds_to_one_gives_an_aim():
  uniform = np.full((5, 11), 0.5)
  uniform[:, 10] = [0.0, 0.25, 0.5, 0.75, 1.0]
  tasks = jax.device_get(jax.jit(manipulation_tasks.from_uniform)(uniform))
  # Seven are feasible in this scene: all but the two that close.
  assert np.argmax(tasks['aim'], axis=1).tolist() == [0, 1, 4, 7, 8]


def test_internal_version_opens_and_moves_the_hand_only():
  family = envs.make('manipulation', aims='internal')
  tasks = robots.sample_tasks(family, 0, 500)
  known = [
    table.AIMS.index(aim)
    for aim in ('move_hand', 'open_handle_drawer', 'open_button_drawer')
  ]
  assert set(np.argmax(tasks['aim'], axis=1).tolist()) == set(known)
  assert not np.any(tasks['open'])
  assert family.spec.options['aims'] == 'internal'


def test_task_lists():
  family = envs.make('manipulation')
  # numpy.random.RandomState(1337).uniform(size=(60, 11)), read by hand.
  draws = np.random.RandomState(1337).uniform(size=(60, 11))
  (train, test), default = robots.task_lists(family, 'smac', 'default')
  tasks = jax.device_get(jax.jit(envs.concatenate_tasks)(train, test))
  assert envs.num_tasks(train) == 50 and envs.num_tasks(test) == 10
  np.testing.assert_array_equal(tasks['present'], draws[:, :5] < 0.75)
  np.testing.assert_array_equal(tasks['side'], np.sign(draws[:, 5] - 0.5))
  np.testing.assert_array_equal(tasks['open'], draws[:, 6] < 0.5)
  np.testing.assert_array_equal(
    np.argmax(tasks['corner'], axis=2), np.argsort(draws[:, 7:10], axis=1)
  )
  for i in range(60):
    choices = np.flatnonzero(_feasible(envs.take_tasks(tasks, i)))
    assert (
      np.argmax(tasks['aim'][i]) == choices[int(draws[i, 10] * len(choices))]
    )
  assert np.all(train['aim'].sum(axis=0) >= 1), 'an aim without training tasks'
  for part, same in zip(default, (train, test)):
    np.testing.assert_array_equal(part['aim'], same['aim'])


def test_ood_holds_drawers_on_the_left_out():
  train, test = jax.device_get(envs.make('manipulation').task_list('ood'))
  assert envs.num_tasks(train) == 50 and envs.num_tasks(test) == 10
  drawer = np.array(['drawer' in aim for aim in table.AIMS])
  about = lambda tasks: np.asarray(tasks['aim'] @ drawer) > 0.5
  assert np.all(about(test)) and np.all(test['side'] == -1.0)
  assert not np.any(about(train) & (np.asarray(train['side']) < 0))
  # Each of the two is known from training, only the pair is new.
  assert np.sum(about(train)) >= 5 and np.sum(train['side'] < 0) >= 5
  assert np.any(np.asarray(train['present'])[np.asarray(train['side']) < 0, 1])


def test_pictures_show_the_aim(robot):
  family, task = robot.family, table.task('object_in_tray', corner=(0, 1, 2))
  assert family.describe(task) == 'object in tray'
  (goal,) = family.markers(None, task)
  np.testing.assert_allclose(goal.position, [0.78, -0.13, -0.36003], atol=1e-6)
  assert family.markers(None, table.task('press_button')) == []


def test_random_actions_never_diverge(robot):
  family, number = robot.family, 8
  tasks = robots.sample_tasks(family, 0, number)

  @jax.jit
  def episodes(key):
    state = jax.vmap(family.reset)(jax.random.split(key, number), tasks)

    def step(state, key):
      action = jax.random.uniform(key, (number, 4), minval=-1.0)
      state = jax.vmap(family.step)(state, action, tasks)
      return state, (state.diverged, state.observation, state.physics.qd)

    return jax.lax.scan(step, state, jax.random.split(key, 75))[1]

  diverged, observation, qd = episodes(jax.random.key(1))
  assert not np.any(diverged)
  assert np.max(np.abs(observation)) < 2.0 and np.max(np.abs(qd)) < 20.0
