"""What states look like: poses, colours, views, markers."""

import types

import jax
import mujoco
import numpy as np
import pytest
import robots

from offmeta import envs
from offmeta.envs import render
from offmeta.envs.simulator import Physics
from offmeta.testing import probes

_KINDS = {'plane', 'sphere', 'capsule'}


def _physics(family, num_states, seed=0):
  """States away from the start; quaternions stay unit."""
  random = np.random.RandomState(seed)
  q = np.tile(family.simulator.start, (num_states, 1))
  q += 0.2 * random.normal(size=q.shape)
  q[:, 0] += np.arange(num_states)
  if q.shape[1] > 3 and family.simulator.model.jnt_type[0] == 0:
    q[:, 3:7] /= np.linalg.norm(q[:, 3:7], axis=1, keepdims=True)
  return Physics(q, np.zeros((num_states, family.simulator.num_velocities)), ())


def _task(family, index=0):
  return envs.take_tasks(jax.device_get(family.task_list('default')[1]), index)


@pytest.fixture(name='ant', scope='module')
def _ant():
  return robots.compiled('ant_dir')


@pytest.fixture(name='cheetah', scope='module')
def _cheetah():
  return envs.make('cheetah_vel')


def test_poses_are_those_of_c_mujoco(ant, cheetah):
  for family in (ant.family, cheetah):
    physics = _physics(family, 3)
    frames, _ = render.scene(family, _task(family), physics)
    model = family.simulator.model
    data = mujoco.MjData(model)
    assert len(frames) == 3
    for q, geoms in zip(physics.q, frames):
      data.qpos[:] = q
      mujoco.mj_forward(model, data)
      assert {geom.kind for geom in geoms} <= _KINDS
      for i, geom in enumerate(geoms[: model.ngeom]):
        np.testing.assert_allclose(geom.position, data.geom_xpos[i], atol=1e-9)
        np.testing.assert_allclose(
          geom.rotation.ravel(), data.geom_xmat[i], atol=1e-9
        )
        np.testing.assert_array_equal(geom.size, model.geom_size[i])
        assert mujoco.mjtGeom(model.geom_type[i]).name == (
          f'mjGEOM_{geom.kind.upper()}'
        )


def test_poses_are_those_of_the_backend(ant):
  """Spring simulates links in space; q alone gives their places again.

  Exactly at a start; later the joints have given way. Metres.
  """
  task = _task(ant.family)
  states, _ = robots.rollout(ant, task, 3, 20)
  states = jax.tree.map(
    lambda *x: np.stack(x), states[0], states[5], states[20]
  )
  physics = render.visible(states)
  assert physics.internal == ()
  frames, _ = render.scene(ant.family, task, physics)
  model = ant.family.simulator.model
  drawn = np.array(
    [[geom.position for geom in geoms[1 : model.ngeom]] for geoms in frames]
  )
  true = _geom_positions(model, states.physics.internal.x)
  error = np.linalg.norm(drawn - true, axis=-1)
  assert error[0].max() < 1e-5
  assert np.all(np.median(error[1:], axis=1) < 0.06) and error.max() < 0.2
  # The body has moved by more than that in the meantime.
  assert np.linalg.norm(true[2] - true[0], axis=-1).max() > 0.4


def _geom_positions(model, links):
  """Centres [F, G - 1, 3] of all but the ground; links leaves [F, B, ...]."""
  body = model.geom_bodyid[1:] - 1
  shape = links.pos[:, body].shape
  local = type(links)(
    pos=np.broadcast_to(model.geom_pos[1:], shape),
    rot=np.broadcast_to(np.array([1.0, 0, 0, 0]), shape[:2] + (4,)),
  )
  links = jax.tree.map(lambda x: x[:, body], links)
  place = jax.jit(jax.vmap(jax.vmap(lambda a, b: a.do(b).pos)))
  return np.asarray(place(links, local))


def test_a_task_may_move_bodies(cheetah):
  model = cheetah.simulator.model
  before = model.body_pos.copy()
  moved = before.copy()
  moved[model.body('torso').id] += [0.0, 0.0, 0.5]
  family = types.SimpleNamespace(
    simulator=cheetah.simulator,
    spec=cheetah.spec,
    system_changes=lambda task: {
      'body_pos': np.float32(moved),
      'dof.damping': np.zeros(9, np.float32),
    },
  )
  physics = _physics(cheetah, 1)
  usual, _ = render.scene(cheetah, _task(cheetah), physics)
  lifted, _ = render.scene(family, {}, physics)
  for a, b in zip(usual[0][1:], lifted[0][1:], strict=True):
    np.testing.assert_allclose(b.position - a.position, [0, 0, 0.5], atol=1e-6)
  np.testing.assert_array_equal(model.body_pos, before)


def test_limbs_are_told_apart(ant, cheetah):
  def colors(family, *geoms):
    frames, _ = render.scene(family, _task(family), _physics(family, 1))
    return [
      frames[0][family.simulator.model.geom(name).id].rgba for name in geoms
    ]

  torso, head, *back = colors(cheetah, 'torso', 'head', 'bthigh', 'bfoot')
  (front,) = set(colors(cheetah, 'fthigh', 'fshin', 'ffoot'))
  assert torso == head == render.TRUNK
  assert len({torso, *back, front}) == 3
  legs = colors(
    ant.family,
    *(f'{side}_ankle_geom' for side in ('left', 'right', 'third', 'fourth')),
  )
  assert len(set(legs)) == 4


def test_views_follow_what_can_go_away(ant, cheetah):
  physics = _physics(cheetah, 3)
  _, view = render.scene(cheetah, _task(cheetah), physics)
  assert view.azimuth == 90.0 and view.track is None
  np.testing.assert_allclose(view.targets[:, 0], physics.q[:, 0], atol=1e-6)
  assert np.ptp(view.targets[:, 2]) == 0.0
  assert 1.5 < view.extent < 4.0  # metres; a cheetah is 1.2 long
  physics = _physics(ant.family, 3)
  _, view = render.scene(ant.family, _task(ant.family), physics)
  assert view.elevation < -10.0
  np.testing.assert_allclose(view.track, physics.q[:, :2], atol=1e-6)
  np.testing.assert_allclose(view.targets[:, :2], physics.q[:, :2], atol=1e-6)


_SCENE = """
<mujoco>
  <visual><global azimuth="150" elevation="-40"/></visual>
  <statistic center="0.5 0 0.1" extent="0.8"/>
  <worldbody>
    <geom type="plane" size="1 1 1"/>
    <geom name="hidden" type="box" size="1 1 1" rgba="1 1 1 0"/>
    <geom name="collider" type="box" size="1 1 1" group="3"/>
    <body><joint type="slide" axis="0 1 0"/>
      <geom name="hand" type="box" size=".1 .2 .3" rgba="0 0 1 1"/></body>
    <body><joint type="hinge" axis="0 0 1"/>
      <geom name="ball" type="ellipsoid" size=".1 .2 .3" rgba="1 0 0 1"/></body>
  </worldbody>
</mujoco>"""


def test_a_scene_is_shown_as_its_file_asks():
  model = mujoco.MjModel.from_xml_string(_SCENE)
  family = types.SimpleNamespace(
    simulator=types.SimpleNamespace(model=model), system_changes=lambda task: {}
  )
  q = np.array([[0.0, 0.0], [0.5, 0.1]])
  frames, view = render.scene(family, {}, Physics(q, q, ()))
  assert [geom.kind for geom in frames[0]] == ['plane', 'box', 'ellipsoid']
  assert frames[0][1].rgba == (0, 0, 1, 1) and frames[0][2].rgba == (1, 0, 0, 1)
  np.testing.assert_allclose(frames[1][1].position, [0, 0.5, 0])
  np.testing.assert_allclose(view.targets, [[0.5, 0, 0.1]] * 2)
  assert (view.azimuth, view.elevation, view.track) == (150, -40, None)


def test_direction_of_the_ant_is_an_arrow(ant):
  task = {'angle': np.float32(np.pi / 2)}
  physics = _physics(ant.family, 1)
  frames, _ = render.scene(ant.family, task, physics)
  arrow = frames[0][ant.family.simulator.model.ngeom :]
  ends = [
    geom.position + sign * geom.size[1] * geom.rotation[:, 2]
    for geom in arrow
    for sign in (-1, 1)
  ]
  tip = max(ends, key=lambda end: end[1])
  np.testing.assert_allclose(tip[0], physics.q[0, 0], atol=1e-6)
  assert sum(np.allclose(end, tip) for end in ends) == 3  # shaft and two barbs
  for geom in arrow:
    np.testing.assert_allclose(
      geom.rotation @ geom.rotation.T, np.eye(3), atol=1e-9
    )
    assert np.linalg.det(geom.rotation) > 0.99


@pytest.mark.parametrize('goals', ['semicircle', 'circle', 'square'])
def test_point_robot(goals):
  family = envs.make('point_robot', goals=goals)
  task = _task(family, 3)
  path = np.array([[0.0, 0.0], [0.5, 0.5], [-0.2, 0.9]], np.float32)
  frames, view = render.scene(family, task, path)
  for position, geoms in zip(path, frames):
    np.testing.assert_allclose(geoms[0].position[:2], position)
    (goal,) = (
      geom for geom in geoms if geom.rgba == render.goal((0, 0), 1).rgba
    )
    np.testing.assert_allclose(goal.position[:2], task['goal'])
  np.testing.assert_array_equal(view.track, path)
  assert view.elevation == -90.0 and 2.0 < view.extent < 4.0
  reach = np.abs(
    np.array([geom.position for geom in frames[0]]) - view.targets[0]
  )[:, :2].max()
  assert reach < view.extent / 2


def test_sparse_goals_are_drawn_to_scale():
  family = envs.make('sparse_point_robot')
  frames, _ = render.scene(family, _task(family), np.zeros((1, 2), np.float32))
  assert max(geom.size[0] for geom in frames[0]) == 0.2  # where reward is


def test_goal_in_space_is_translucent():
  assert render.goal((0.1, 0.2, 0.3), 0.05).rgba[3] < 1.0


def test_a_family_that_cannot_be_drawn_says_what_to_add():
  family = probes.CountingFamily()
  with pytest.raises(render.RenderError, match='geometry'):
    render.scene(family, {}, np.zeros((1, 2)))
