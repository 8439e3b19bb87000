"""Humanoid: against stock Brax, C MuJoCo and numpy from logged states."""

import jax
import mujoco
import numpy as np
import pytest
import robots

from offmeta import envs, testing
from offmeta.envs import simulator

LYING = (np.sqrt(0.5), 0.0, -np.sqrt(0.5), 0.0)  # the feet are off the floor


@pytest.fixture(scope='module')
def spring():
  return robots.compiled('humanoid_dir')


@pytest.fixture(scope='module')
def mjx():
  return robots.compiled('humanoid_dir', backend='mjx')


def _task(angle):
  return {'angle': np.float32(angle)}


def _centre_of_mass(model, physics):
  """[3], from Brax's own poses of the bodies, in double precision."""
  x, total, turned = physics.internal.x, np.zeros(3), np.zeros(3)
  for body in range(1, model.nbody):
    mujoco.mju_rotVecQuat(
      turned, model.body_ipos[body], np.asarray(x.rot[body - 1], np.float64)
    )
    total += model.body_mass[body] * (np.asarray(x.pos[body - 1]) + turned)
  return total / model.body_mass.sum()


def test_contract_on_spring(spring):
  family = spring.family
  testing.check_env_family(
    family, num_steps=10, task_lists=('default', 'smac', 'pearl', 'csro', 'ood')
  )
  assert family.spec.episode_length == 200 and family.spec.terminates
  assert family.spec.options['backend'] == 'spring'


def test_reward_from_logged_positions(spring):
  states, actions = robots.rollout(spring, _task(2.0), 0, 30)
  model = spring.family.simulator.model
  centre = np.stack(
    [_centre_of_mass(model, s.physics) for s in jax.device_get(states)]
  )
  velocity = np.diff(centre[:, :2], axis=0) / 0.015
  reward = 1.25 * velocity @ [np.cos(2.0), np.sin(2.0)] + 5.0
  reward -= 0.1 * np.square(0.4 * actions.astype(np.float64)).sum(axis=1)
  np.testing.assert_allclose([s.reward for s in states[1:]], reward, atol=5e-4)
  assert np.abs(velocity).max() > 0.05, 'the humanoid does not move'


@pytest.mark.filterwarnings('ignore::UserWarning')  # of stock Brax
@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_equals_stock_brax(spring):
  """Direction 0 from the same start: observation, reward and termination."""
  stock_envs = simulator._import('brax.envs')
  stock = stock_envs.get_environment('humanoid', backend='spring')
  state = robots.placed(spring, _task(0.0), 0, (1.05, *LYING))
  pipeline_state = state.physics.internal.replace(
    q=state.physics.q, qd=state.physics.qd
  )
  metrics = (
    'forward_reward',
    'reward_linvel',
    'reward_quadctrl',
    'reward_alive',
    'x_position',
    'y_position',
    'distance_from_origin',
    'x_velocity',
    'y_velocity',
  )
  zero = np.zeros((), np.float32)
  theirs = stock_envs.State(
    pipeline_state,
    np.zeros(244, np.float32),
    zero,
    zero,
    {name: zero for name in metrics},
  )
  stock_step = jax.jit(stock.step)
  actions = np.random.RandomState(0).uniform(-1, 1, (12, 17))
  for action in actions.astype(np.float32):
    state = spring.step(state, action, _task(0.0))
    theirs = stock_step(theirs, action)
    np.testing.assert_allclose(
      state.observation, theirs.obs, rtol=1e-5, atol=1e-4
    )
    np.testing.assert_allclose(state.reward, theirs.reward, atol=1e-4)
    assert float(state.terminal) == float(theirs.done)
  assert float(theirs.done) == 1.0, 'the humanoid was meant to fall'


def test_mjx_observation_equals_c_mujoco(mjx):
  """Also where Brax's own kinematics err: velocities of compound joints."""
  family, random = mjx.family, np.random.RandomState(0)
  model = family.simulator.model
  data = mujoco.MjData(model)
  data.qpos[:] = model.qpos0 + random.uniform(-0.3, 0.3, model.nq)
  data.qpos[3:7] /= np.linalg.norm(data.qpos[3:7])
  data.qvel[:] = random.normal(size=model.nv)
  action = random.uniform(-1, 1, 17)
  data.ctrl[:] = 0.4 * action
  mujoco.mj_forward(model, data)
  mass = model.body_mass[1:]
  away = data.xipos[1:] - mass @ data.xipos[1:] / mass.sum()
  inertias, velocities = [], np.zeros((11, 6))
  for body in range(1, 12):
    axes, arm = data.ximat[body].reshape(3, 3), away[body - 1]
    inertia = axes @ np.diag(model.body_inertia[body]) @ axes.T
    inertia += mass[body - 1] * (arm @ arm * np.eye(3) - np.outer(arm, arm))
    inertias.append(np.r_[inertia.ravel(), mass[body - 1]])
    mujoco.mj_objectVelocity(
      model, data, mujoco.mjtObj.mjOBJ_BODY, body, velocities[body - 1], 0
    )
  angular, linear = np.split(velocities, 2, axis=1)
  linear *= mass[:, None] / mass.sum()
  expected = np.concatenate(
    [
      data.qpos[2:],
      data.qvel,
      np.ravel(inertias),
      np.c_[linear, angular].ravel(),
      data.qfrc_actuator,
    ]
  )
  physics = simulator.Physics(
    *(np.float32(x) for x in (data.qpos, data.qvel)), None
  )
  observation = jax.jit(family._observe)(physics, np.float32(action))
  np.testing.assert_allclose(observation, expected, rtol=1e-5, atol=2e-5)


def test_mjx_follows_c_mujoco(mjx):
  """20 control steps (100 physics steps) of the same random actions.

  Measured over 4 seeds with 4 Newton and 8 line-search iterations: at most
  3e-6 in q and 9e-5 in qd (1e-5 and 4e-4 after 40 steps). With Brax's stock
  settings (1 and 4) the two part by up to 0.03 in q and 1.4 in qd once the
  feet touch the floor.
  """
  options = mjx.family.simulator.model.opt
  assert (options.iterations, options.ls_iterations) == (4, 8)
  assert options.disableflags == mujoco.mjtDisableBit.mjDSBL_EULERDAMP
  robots.assert_follows_c_mujoco(mjx, q_atol=1e-4, qd_atol=3e-3)


@pytest.mark.parametrize(
  'height, terminal', [(0.9, 1.0), (1.1, 0.0), (1.9, 0.0), (2.1, 1.0)]
)
def test_terminates_by_height(spring, height, terminal):
  start = robots.placed(spring, _task(0.5), 0, (height, *LYING))
  after = jax.device_get(
    spring.step(start, np.zeros(17, np.float32), _task(0.5))
  )
  assert abs(after.observation[0] - height) < 0.05
  assert after.terminal == terminal and after.diverged == 0.0
  # The survival bonus is paid in the terminal step too, as in gym.
  forward = after.features @ np.array([np.cos(0.5), np.sin(0.5)])
  np.testing.assert_allclose(after.reward, 1.25 * forward + 5.0, atol=1e-5)


def test_start(spring):
  start = spring.family.simulator.start
  states = [spring.reset(jax.random.key(i), _task(0.0)) for i in range(8)]
  q = np.stack([s.physics.q for s in states])
  qd = np.stack([s.physics.qd for s in states])
  np.testing.assert_allclose(np.linalg.norm(q[:, 3:7], axis=1), 1, atol=1e-6)
  # Uniform in +-0.01, velocities too.
  for noise in (np.delete(q - start, np.s_[3:7], axis=1), qd):
    assert 0.009 < np.abs(noise).max() <= 0.01
    assert abs(noise.std() - 0.01 / np.sqrt(3)) < 0.001
  np.testing.assert_array_equal(states[0].features, 0.0)


def test_task_alters_the_reward_only(spring):
  state = spring.reset(jax.random.key(0), _task(0.0))
  one, other = (
    spring.step(state, np.full(17, 0.5, np.float32), _task(x))
    for x in (0.0, 3.0)
  )
  one, other = jax.device_get((one, other))
  assert one.reward != other.reward
  for a, b in zip(
    jax.tree.leaves(one._replace(reward=0)),
    jax.tree.leaves(other._replace(reward=0)),
  ):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
  'backend, timestep, n_frames, gears',
  [
    ('spring', 0.0015, 10, (350, 100)),
    ('positional', 0.0015, 10, (350, 100)),
    ('generalized', 0.003, 5, (100, 25)),
    ('mjx', 0.003, 5, (100, 25)),
  ],
)
def test_backend_switch(backend, timestep, n_frames, gears):
  family = envs.make('humanoid_dir', backend=backend)
  options, system = family.spec.options, family.simulator.system
  assert options['backend'] == backend
  assert options['timestep'] == timestep and options['n_frames'] == n_frames
  assert options['solver_iterations'] == (4 if backend == 'mjx' else None)
  np.testing.assert_allclose(system.opt.timestep, timestep, rtol=1e-6)
  np.testing.assert_allclose(np.asarray(system.actuator.gear)[[0, -1]], gears)
  state = jax.eval_shape(family.reset, jax.random.key(0), _task(0.0))
  assert state.observation.shape == (244,)
  assert state.features.shape == (2,)
