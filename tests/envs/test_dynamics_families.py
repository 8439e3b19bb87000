"""Walker and hopper with random parameters."""

from brax.envs import hopper, walker2d
import jax
import jax.numpy as jnp
import mujoco
from mujoco import mjx
import numpy as np
import pytest
import robots

from offmeta import envs, testing
from offmeta.envs import simulator

NAMES = ('walker_params', 'hopper_params')
LISTS = {
  'default': (50, 5),
  'smac': (50, 5),
  'pearl': (40, 10),
  'csro': (30, 10),
  'ood': (50, 10),
}
FIELDS = {
  'mass': 'body_mass',
  'inertia': 'body_inertia',
  'damping': 'dof_damping',
  'friction': 'geom_friction',
}
BASES = {'mass': 1.5, 'inertia': 1.5, 'damping': 1.3, 'friction': 1.5}
BATCH = 16  # one size, so that the batched step is compiled once
_KEY = jax.random.key(0)


@pytest.fixture(scope='module', params=NAMES)
def robot(request):
  return robots.compiled(request.param)


@pytest.fixture(scope='module')
def batched(robot):
  jit = lambda function: jax.jit(jax.vmap(function))
  return robots.Robot(
    robot.family, jit(robot.family.reset), jit(robot.family.step)
  )


def nominal(family, num_tasks):
  """Exponents of 0."""
  return jax.tree.map(
    lambda x: np.zeros(x.shape, x.dtype),
    jax.eval_shape(lambda k: family.sample_tasks(k, num_tasks), _KEY),
  )


def run(batched, tasks, keys, actions):
  """States with leaves [steps + 1, BATCH, ...] for actions [steps, A]."""
  states = [batched.reset(keys, tasks)]
  for action in actions:
    states.append(batched.step(states[-1], np.tile(action, (BATCH, 1)), tasks))
  return jax.tree.map(lambda *leaves: np.stack(leaves), *states)


def random_actions(family, steps, seed=0):
  return (
    np.random.RandomState(seed)
    .uniform(-1, 1, (steps, family.spec.action_size))
    .astype(np.float32)
  )


@jax.jit
def same_keys(seed):
  return jnp.broadcast_to(jax.random.key(seed), (BATCH,))


def same_start(batched, tasks, steps):
  return run(
    batched, tasks, same_keys(1), random_actions(batched.family, steps)
  )


def healthy(name, q, qd):
  """The rule of rand_param_envs in numpy; rows of q and qd."""
  height, pitch = 1.25 + q[..., 1], q[..., 2]
  if name == 'walker_params':
    return (0.8 < height) & (height < 2) & (-1 < pitch) & (pitch < 1)
  rest = np.concatenate([q[..., 2:], qd], axis=-1)
  return (np.abs(rest) < 100).all(-1) & (height > 0.7) & (np.abs(pitch) < 0.2)


def test_contract(robot):
  family = robot.family
  # Measured between vmapped and single steps: 4e-4 in the walker's velocities.
  # As many tasks as in `batched`, whose programs these are then, too.
  testing.check_env_family(
    family,
    num_steps=8,
    num_tasks=BATCH,
    task_lists=tuple(LISTS),
    tolerance=2e-3,
  )
  sizes = (family.spec.observation_size, family.spec.action_size)
  assert (
    sizes
    == {'walker_params': (17, 6), 'hopper_params': (11, 3)}[family.spec.name]
  )
  assert family.spec.terminates and family.spec.episode_length == 200
  options = family.spec.options
  assert (options['backend'], options['n_frames']) == ('mjx', 4)
  assert (options['timestep'], options['log_scale_limit']) == (0.004, 3.0)
  opt = family.simulator.model.opt
  assert (opt.iterations, opt.ls_iterations, opt.timestep) == (4, 8, 0.004)


def test_tasks_start_alike_and_move_differently(batched):
  ((tasks, _),) = robots.task_lists(batched.family, 'smac')
  observation = same_start(
    batched, envs.take_tasks(tasks, slice(BATCH)), 10
  ).observation
  assert np.all(observation[0] == observation[0, 0])
  assert np.abs(observation).max() <= 10.0
  distance = np.abs(observation[:, :, None] - observation[:, None]).max((0, 3))
  assert distance[np.triu_indices(BATCH, 1)].min() > 0.1


def test_each_field_alone_changes_the_trajectory(batched):
  family = batched.family
  random = robots.sample_tasks(family, 2, BATCH)
  tasks = nominal(family, BATCH)
  rows = {name: slice(1 + 3 * i, 4 + 3 * i) for i, name in enumerate(FIELDS)}
  for name, row in rows.items():
    tasks[name][row] = random[name][row]
  # What multiplies a zero: the world's mass and inertia, the root's damping.
  tasks['mass'][13, 0] = 3.0
  tasks['inertia'][14, 0] = 3.0
  tasks['damping'][15, :3] = 3.0
  observation = same_start(batched, tasks, 20).observation
  change = np.abs(observation - observation[:, :1]).max((0, 2))
  for name, row in rows.items():
    assert change[row].min() > 0.05, f'{name}: {change[row]}'
  np.testing.assert_array_equal(change[13:], 0.0)


def test_reward_and_termination_from_logged_states(batched):
  """64 tasks; nothing diverges, whatever happens after the fall."""
  family, steps = batched.family, 50
  actions = random_actions(family, steps)
  all_tasks = robots.sample_tasks(family, 3, 64)
  keys = jax.random.split(jax.random.key(4), 64)
  for i in range(0, 64, BATCH):
    tasks = envs.take_tasks(all_tasks, slice(i, i + BATCH))
    states = run(batched, tasks, keys[i : i + BATCH], actions)
    q, qd = (x.astype(np.float64) for x in states.physics[:2])
    velocity = np.diff(q[:, :, 0], axis=0) / 0.016
    reward = velocity + 1 - 1e-3 * np.square(actions).sum(-1)[:, None]
    np.testing.assert_allclose(states.reward[1:], reward, atol=2e-4)
    np.testing.assert_array_equal(
      states.terminal[1:], ~healthy(family.spec.name, q, qd)[1:]
    )
    assert np.all(states.terminal[1] == 0) and np.any(states.terminal[-1] == 1)
    assert np.all(states.diverged == 0)
    for leaf in jax.tree.leaves(states):
      assert np.all(np.isfinite(leaf))
    assert np.abs(velocity).max() > 0.5, 'the body does not move'


def test_reward_ignores_the_task(robot):
  tasks = robots.sample_tasks(robot.family, 0, 2)
  features = np.array([[2.0], [-1.0]], np.float32)
  actions = np.full((2, robot.family.spec.action_size), 3.0, np.float32)
  cost = 1e-3 * robot.family.spec.action_size  # actions are clipped
  reward = jax.jit(robot.family.reward)
  for i in range(2):
    np.testing.assert_allclose(
      reward(features, actions, envs.take_tasks(tasks, i)),
      [3.0 - cost, -cost],
      atol=1e-6,
    )


# Changes of the start's q, the last velocity, and whether that is healthy.
HEALTH = {
  'walker_params': [
    ({}, 0, True),
    ({0: 150.0}, 150, True),
    ({1: -0.44}, 0, True),
    ({1: -0.46}, 0, False),
    ({1: 0.74}, 0, True),
    ({1: 0.76}, 0, False),
    ({2: 0.99}, 0, True),
    ({2: 1.01}, 0, False),
    ({2: -1.01}, 0, False),
  ],
  'hopper_params': [
    ({}, 0, True),
    ({0: 150.0}, 99, True),
    ({}, 101, False),
    ({1: -0.54}, 0, True),
    ({1: -0.56}, 0, False),
    ({1: 5.0}, 0, True),
    ({2: 0.19}, 0, True),
    ({2: 0.21}, 0, False),
    ({2: -0.21}, 0, False),
    ({5: -101.0}, 0, False),
  ],
}


def test_health(robot):
  family = robot.family
  own = jax.jit(family._healthy)
  for changes, velocity, expected in HEALTH[family.spec.name]:
    q = np.array(family.simulator.start)
    q[list(changes)] = list(changes.values())
    qd = np.zeros(family.simulator.num_velocities)
    qd[-1] = velocity
    assert bool(own(simulator.Physics(q, qd, None))) == expected
    assert healthy(family.spec.name, q, qd) == expected


def test_batched_tasks_equal_single_ones(robot, batched):
  """Differences are rounding; measured up to 3e-5 in 16 episodes."""
  tasks = robots.sample_tasks(robot.family, 6, BATCH)
  keys = same_keys(0)
  actions = random_actions(robot.family, 15)
  together = run(batched, tasks, keys, actions)
  for i in (0, 7):
    states, same = robots.rollout(robot, envs.take_tasks(tasks, i), 0, 15)
    np.testing.assert_array_equal(actions, same)
    np.testing.assert_allclose(
      np.stack([state.physics.q for state in states]),
      together.physics.q[:, i],
      atol=1e-3,
    )


@pytest.mark.filterwarnings('ignore')  # Brax's, about maintenance
def test_exponent_zero_equals_stock_brax(robot):
  """Stock Brax with this family's timing, and positions of q's own moment.

  (Its positions on 'mjx' are those from before the last physics step.)
  Measured: equal to the last bit for 20 steps.
  """
  family = robot.family
  parent = {'walker_params': walker2d.Walker2d, 'hopper_params': hopper.Hopper}[
    family.spec.name
  ]

  class Stock(parent):
    def pipeline_step(self, state, action):
      state = super().pipeline_step(state, action)
      position = mjx.kinematics(self.sys, state).xpos[1:]
      return state.replace(x=state.x.replace(pos=position))

  stock = Stock(backend='mjx', n_frames=4)
  stock.sys = stock.sys.tree_replace(
    {'opt.timestep': 0.004, 'opt.ls_iterations': 8}
  )
  task = envs.take_tasks(nominal(family, 1), 0)
  states, actions = robots.rollout(robot, task, 0, 20)
  # A stock state with our start. All else is computed anew in each step.
  theirs = jax.tree.map(
    lambda x: np.zeros(x.shape, x.dtype),
    jax.eval_shape(stock.reset, jax.random.key(0)),
  )
  q, qd = (np.asarray(x) for x in states[0].physics[:2])
  start = theirs.pipeline_state.replace(q=q, qd=qd, qpos=q, qvel=qd)
  data = mujoco.MjData(family.simulator.model)
  data.qpos[:] = q
  mujoco.mj_kinematics(family.simulator.model, data)
  start = start.replace(x=start.x.replace(pos=np.float32(data.xpos[1:])))
  np.testing.assert_allclose(
    states[0].observation, jax.jit(stock._get_obs)(start), atol=1e-6
  )
  theirs = theirs.replace(pipeline_state=start)
  step = jax.jit(stock.step)
  for ours, action in zip(states[1:], actions, strict=True):
    theirs = step(theirs, action)
    np.testing.assert_allclose(ours.observation, theirs.obs, atol=1e-3)
    np.testing.assert_allclose(ours.reward, theirs.reward, atol=1e-3)
    assert float(ours.terminal) == float(theirs.done)
  assert theirs.done and np.max(np.abs(theirs.pipeline_state.qd)) > 5.0


def write_task(model, task):
  """What rand_param_envs does: no mj_setConst."""
  for name, field in FIELDS.items():
    exponents = np.asarray(task[name], np.float64)
    getattr(model, field)[:] *= BASES[name] ** exponents


@pytest.mark.parametrize('index', [0, 1])
def test_mjx_follows_c_mujoco(robot, index):
  """20 control steps (80 physics steps) of the same random actions.

  Measured over 6 tasks, the nominal body and 4 seeds each: walker at most
  2.2e-4 in q and 3.6e-3 in qd, hopper 1.7e-6 and 1.8e-5.
  """
  ((tasks, _),) = robots.task_lists(robot.family, 'smac')
  task = envs.take_tasks(tasks, index)
  q_atol, qd_atol = {
    'walker_params': (1e-3, 2e-2),
    'hopper_params': (1e-5, 1e-4),
  }[robot.family.spec.name]
  robots.assert_follows_c_mujoco(
    robot, q_atol, qd_atol, task=task, set_task=write_task
  )


def test_system_stays_nominal_when_tasks_change_it(robot):
  family = robot.family
  task = envs.take_tasks(robots.sample_tasks(family, 0, 1), 0)
  state = jax.eval_shape(family.reset, jax.random.key(0), task)
  action = np.zeros(family.spec.action_size, np.float32)
  jax.eval_shape(family.step, state, action, task)
  system_changes = jax.jit(family.system_changes)
  changes = system_changes(task)
  stock = simulator.stock_xml(family.xml_name)
  stock = mujoco.MjModel.from_xml_string(
    simulator.ElementTree.tostring(stock, encoding='unicode')
  )
  zero = system_changes(jax.tree.map(np.zeros_like, task))
  for name, field in FIELDS.items():
    expected = getattr(stock, field).astype(np.float32)
    for now in (getattr(family.simulator.system, field), zero[field]):
      np.testing.assert_array_equal(now, expected)
    np.testing.assert_allclose(
      changes[field],
      expected * BASES[name] ** np.asarray(task[name]),
      rtol=1e-5,
    )
  assert set(changes) == set(FIELDS.values())


def test_generalized_backend(robot):
  """The same bodies in Brax's fields; nothing is run."""
  reference = robot.family
  family = envs.make(reference.spec.name, backend='generalized')
  options = family.spec.options
  assert (options['n_frames'], options['timestep']) == (8, 0.002)
  assert family.spec.observation_size == reference.spec.observation_size
  task = envs.take_tasks(robots.sample_tasks(family, 0, 1), 0)
  state = jax.eval_shape(family.reset, jax.random.key(0), task)
  action = np.zeros(family.spec.action_size, np.float32)
  after = jax.eval_shape(family.step, state, action, task)
  assert after.observation.shape == (family.spec.observation_size,)
  expected, changes = jax.device_get(
    jax.jit(lambda: [f.system_changes(task) for f in (reference, family)])()
  )
  inertia = changes.pop('link.inertia.i')
  np.testing.assert_allclose(
    inertia, [np.diag(x) for x in expected['body_inertia'][1:]], rtol=1e-6
  )
  np.testing.assert_allclose(
    changes.pop('link.inertia.mass'), expected['body_mass'][1:], rtol=1e-6
  )
  np.testing.assert_allclose(
    changes.pop('dof.damping'), expected['dof_damping'], rtol=1e-6
  )
  np.testing.assert_allclose(
    changes.pop('geom_friction'), expected['geom_friction'], rtol=1e-6
  )
  assert not changes


@pytest.mark.parametrize(
  'options, message',
  [
    ({'backend': 'spring'}, "'spring' would ignore.* fields.*use mjx or gen"),
    ({'backend': 'positional'}, "'positional' would ignore"),
    ({'backend': 'bullet'}, 'spring, positional, generalized, mjx'),
    ({'log_scale_limit': 0.0}, 'log_scale_limit'),
    ({'log_scale_limit': float('nan')}, 'log_scale_limit'),
    ({'mass': 1.0}, "'mass'.*known: .*log_scale_limit"),
  ],
)
@pytest.mark.parametrize('name', NAMES)
def test_bad_options(name, options, message):
  with pytest.raises(ValueError, match=message):
    envs.make(name, **options)


def test_starts_are_uniform_and_small(robot):
  family = robot.family
  q, qd = jax.device_get(
    jax.jit(jax.vmap(family._start))(jax.random.split(jax.random.key(0), 200))
  )
  for noise in (q - family.simulator.start, qd):
    assert np.all(np.abs(noise) <= 0.005)
    assert np.all(noise.min(0) < -0.0045) and np.all(noise.max(0) > 0.0045)
  assert abs(np.corrcoef(q[:, 0], qd[:, 0])[0, 1]) < 0.3


def flat(task):
  return np.concatenate(
    [np.asarray(task[name]).reshape(len(task[name]), -1) for name in FIELDS],
    axis=1,
  )


def test_task_lists(robot):
  family = robot.family
  size = {'walker_params': 65, 'hopper_params': 41}[family.spec.name]
  lists = dict(zip(LISTS, robots.task_lists(family, *LISTS), strict=True))
  for listed, sizes in LISTS.items():
    train, test = map(flat, lists[listed])
    assert (train.shape, test.shape) == ((sizes[0], size), (sizes[1], size))
    assert np.abs(np.concatenate([train, test])).max() <= 3.0
    assert len(np.unique(np.concatenate([train, test]), axis=0)) == sum(sizes)
  default, smac = lists['default'], lists['smac']
  np.testing.assert_array_equal(flat(default[1]), flat(smac[1]))
  # 40 of the 50 tasks that SMAC's list trains on train PEARL's too.
  pearl = lists['pearl']
  np.testing.assert_array_equal(flat(pearl[0]), flat(smac[0])[:40])
  with pytest.raises(ValueError, match='known: csro, default, ood, pearl'):
    family.task_list('macaw')


def test_csro_list_repeats_its_draws(robot):
  """np.random.seed(1234), then field by field, as its wrapper draws."""
  family = robot.family
  model, random = family.simulator.model, np.random.RandomState(1234)
  tasks = [
    {
      key: random.uniform(-3, 3, size=getattr(model, field).shape)
      for key, field in FIELDS.items()
    }
    for _ in range(40)
  ]
  ((train, test),) = robots.task_lists(family, 'csro')
  for key in FIELDS:
    stacked = np.stack([task[key] for task in tasks])
    np.testing.assert_allclose(test[key], stacked[2::4], rtol=1e-6)
    np.testing.assert_allclose(
      train[key], np.delete(stacked, np.s_[2::4], axis=0), rtol=1e-6
    )


@pytest.mark.parametrize('limit', [3.0, 1.5])
def test_out_of_distribution_list_and_limit(limit):
  family = envs.make('hopper_params', log_scale_limit=limit)
  assert family.spec.options['log_scale_limit'] == limit
  ((train, test),) = robots.task_lists(family, 'ood')
  train, test = flat(train), flat(test)
  inner, rounding = 2 / 3 * limit, 1e-6
  assert 0.95 * inner < np.abs(train).max() <= inner + rounding
  size = np.abs(test)
  assert inner - rounding <= size.min() < size.max() <= limit + rounding
  assert np.all((test > 0).any(0) & (test < 0).any(0))
  sampled = flat(robots.sample_tasks(family, 0, 100))
  assert -limit <= sampled.min() < -0.99 * limit
  assert 0.99 * limit < sampled.max() <= limit
