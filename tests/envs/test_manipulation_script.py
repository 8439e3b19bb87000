"""The scripted collector meets every sub-task, and what it logs is right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import table

from offmeta import envs, rollout
from offmeta.envs import manipulation_script as scripts

_EACH = 4  # scenes per sub-task


@pytest.fixture(scope='module')
def family():
  return envs.make('manipulation')


@pytest.fixture(scope='module')
def tasks(family):
  """_EACH sampled scenes in which aim i is feasible, with aim i; [36, ...]."""
  drawn = jax.tree.map(np.asarray, family.sample_tasks(jax.random.key(0), 1000))
  rows = [np.flatnonzero(drawn['aim'][:, i])[:_EACH] for i in range(9)]
  return envs.take_tasks(drawn, np.concatenate(rows))


@pytest.fixture(scope='module')
def episodes(family):
  """(noise, tasks, key) -> transitions [M, 75, ...]; own aim first."""

  @jax.jit
  def run(noise, tasks, key):
    policy = scripts.scripted_policy(family, noise)

    def one(task, key):
      state = scripts.Progress(task['aim'], jnp.zeros((), jnp.int32))
      return rollout.episode(family, policy, task, state, task, key)[1]

    number = envs.num_tasks(tasks)
    return jax.vmap(one)(tasks, jax.random.split(key, number))

  return run


@pytest.fixture(scope='module')
def quiet(episodes, tasks):
  return jax.device_get(episodes(0.0, tasks, jax.random.key(0)))


@pytest.fixture(scope='module')
def noisy(episodes, tasks):
  return jax.device_get(episodes(0.1, tasks, jax.random.key(1)))


@pytest.mark.parametrize('aim', table.AIMS)
def test_every_sub_task_is_met(quiet, noisy, aim):
  """Without noise and with it; for 5 steps at least, within 30."""
  rows = slice(table.AIMS.index(aim) * _EACH, None)
  for log, share in ((quiet, 1.0), (noisy, 0.75)):
    success = log.reward[rows][:_EACH] == 0.0
    assert np.mean(success.sum(axis=1) >= 5) >= share
    assert np.mean(success[:, :30].any(axis=1)) >= share
    assert not np.any(success[:, 0]), 'met from the start'


def test_noise(quiet, noisy):
  for leaf in jax.tree.leaves(noisy):
    assert np.all(np.isfinite(leaf))
  assert not np.any(noisy.extras['diverged'])
  assert np.abs(noisy.action).max() <= 1.0
  # The start of all episodes is the same; so are the intentions.
  noise = noisy.action[:, 0, :3] - quiet.action[:, 0, :3]
  inside = np.abs(noisy.action[:, 0, :3]) < 1.0
  assert 0.07 < noise[inside].std() < 0.13


def test_rewards_of_every_aim_from_the_log(family, noisy, tasks):
  """Observations and tasks tell the reward under any aim of the scene."""
  checked = np.zeros(9, int)
  for i in range(envs.num_tasks(tasks)):
    task = envs.take_tasks(tasks, i)
    seen = noisy.next_observation[i].astype(np.float64)
    features = np.concatenate(
      [
        seen[:, :3],
        seen[:, 4:10],
        seen[:, 10:11] - 0.62,
        0.14 - task['side'] * seen[:, 11:12],
        -0.3 - seen[:, 12:],
      ],
      axis=1,
    )
    for number, aim in enumerate(table.AIMS):
      success, margin = table.met(aim, features, task)
      other = {**task, 'aim': np.eye(9, dtype=np.float32)[number]}
      reward = family.reward(
        noisy.extras['features'][i], noisy.action[i], other
      )
      clear = np.abs(margin) > 1e-5  # float32 decides the others
      np.testing.assert_array_equal(
        np.asarray(reward)[clear], success[clear] - 1.0
      )
      if task['aim'][number]:
        np.testing.assert_array_equal(reward, noisy.reward[i])
      checked[number] += success.sum()
  assert np.all(checked > 20), 'an aim is hardly met in these logs'


def test_absent_things_are_zero_in_the_log(noisy, tasks):
  slots = {0: [10], 1: [11], 2: [12], 4: [4, 5, 6]}
  for part, slot in slots.items():
    absent = tasks['present'][:, part] < 0.5
    assert np.any(absent)
    assert np.all(noisy.observation[absent][..., slot] == 0.0)
    assert np.all(noisy.observation[~absent][..., slot] != 0.0)


def test_sub_tasks_are_random_and_do_not_depend_on_the_aim(family):
  policy = family.scripted_policy()
  keys = jax.random.split(jax.random.key(0), 600)
  chosen = {}
  for aim in ('move_hand', 'open_handle_drawer'):
    task = table.task(aim, absent=('object',))
    chosen[aim] = jax.jit(jax.vmap(policy.init, (None, 0)))(task, keys)
    assert np.all(chosen[aim].phase == 0)
  first, second = (np.asarray(state.aim) for state in chosen.values())
  np.testing.assert_array_equal(first, second)
  # Shut drawers, no object: five sub-tasks, 4 standard deviations.
  feasible = [0, 1, 2, 4, 5]
  assert np.abs(first.mean(axis=0)[feasible] - 0.2).max() < 4 * 0.4 / 24
  assert first[:, feasible].sum() == 600
  context = jnp.zeros((3,))
  adapted = policy.adapt(
    task, policy.init(task, keys[0]), context, context, keys[1]
  )
  np.testing.assert_array_equal(adapted.aim, policy.init(task, keys[1]).aim)


def test_goes_on_with_what_is_not_met(family):
  """After a sub-task another one, or the hand if nothing is left."""
  policy = family.scripted_policy()
  observe = jax.jit(policy.observe)
  task = table.task('move_hand', absent=('handle_drawer', 'button', 'object'))
  state = scripts.Progress(task['aim'], jnp.int32(14))
  observation = jnp.array(
    [0.675, 0.0, -0.11, 0.09, 0, 0, 0, 0.78, 0.13, -0.36, 0.62, 0, 0]
  )

  def then(observation, phase):
    transition = rollout.Transition(
      None, None, None, None, jnp.asarray(observation)
    )
    return observe(
      task,
      state._replace(phase=jnp.int32(phase)),
      transition,
      jax.random.key(0),
    )

  still = then(observation, 13)
  assert still.phase == 14 and still.aim[0] == 1.0
  block = then(observation, 14)
  assert block.phase == 0 and block.aim[1] == 1.0
  both = observation.at[7:10].set(jnp.array([0.675, 0.0, -0.23]))
  assert then(both, 14).aim[0] == 1.0


def test_grasps_again_after_a_loss(family):
  policy = family.scripted_policy()
  task = table.task('move_block')
  held = jnp.array(
    [
      0.7,
      0.05,
      -0.23,
      0.04,
      0.58,
      -0.13,
      -0.36,
      0.7,
      0.06,
      -0.23,
      0.62,
      0.14,
      -0.3,
    ]
  )
  state = scripts.Progress(task['aim'], jnp.int32(5))
  observe = jax.jit(policy.observe)
  step = lambda seen: (
    observe(
      task,
      state,
      rollout.Transition(None, None, None, None, seen),
      jax.random.key(0),
    ).phase
  )
  assert step(held) == 5 and step(held.at[9].set(-0.36)) == 0
