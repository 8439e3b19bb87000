"""One SAC learner per task: what it sees, in which order, and resuming."""

import dataclasses

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from offmeta import parallel
from offmeta.algorithms import sac
from offmeta.collection import single_task
from offmeta.data.meta_dataset import MetaDataset, validate
from offmeta.envs.point_robot import PointRobot
from offmeta.testing import probes
from offmeta.training import seeds as seeds_lib, stopping, updates
from offmeta.training.config import ConfigError, SpecialistsConfig
from offmeta.training.setup import Runtime, Setup

_FAMILY = probes.CountingFamily(terminates=True)
_TASKS = {
  'value': np.float32([1.0, -2.0, 0.5]),
  'lifetime': np.float32([2.0, 5.0, 3.0]),
}
# Two uniform rounds of at least 5 steps, then four of the policy; a round
# takes 3, 1 and 2 episodes of the tasks' lifetimes.
_CONFIG = SpecialistsConfig(
  env_steps=30,
  initial_steps=10,
  steps_per_iteration=5,
  num_evaluations=2,
  num_episodes=2,
  sac=sac.Config(
    critic_hidden=(8,),
    actor_hidden=(8,),
    critic_lr=0.01,
    actor_lr=0.01,
    num_updates=3,
    batch_size=4,
  ),
)
_SIZES = 6 * np.array([6, 5, 6])


def _setup(folder, tasks=_TASKS, keys=None, **kw):
  keys = seeds_lib.seed_keys(0, 3) if keys is None else keys
  return Setup(
    config=_CONFIG,
    workdir=folder,
    family=_FAMILY,
    train_tasks=tasks,
    test_tasks=tasks,
    seeds=seeds_lib.Seeds(keys, parallel.make_layout(keys.shape[0])),
    stop=kw.pop('stop', stopping.StopRequest()),
    runtime=Runtime(checkpoint_every_s=-1.0, quiet=True),
    **kw,
  )


def _train(setup, config=_CONFIG):
  return single_task.train(setup, config, single_task.Evaluator(setup, config))


@pytest.fixture(autouse=True, scope='module')
def _programs():
  """Trainings that differ in nothing are compiled once."""
  with tiny_run.shared_programs():
    yield


@pytest.fixture(name='finished', scope='module')
def _finished(tmp_path_factory):
  """(setup, progress) of three learners that nothing interrupted."""
  setup = _setup(tmp_path_factory.mktemp('specialists'))
  return setup, _train(setup)


def _log(progress, learner):
  """A learner's whole replay."""
  size = np.asarray(progress.replay.query.size)[learner, 0]
  return jax.tree.map(
    lambda x: np.asarray(x)[learner, 0, :size], progress.replay.query.data
  )


def test_budget(finished):
  setup, progress = finished
  size = np.asarray(progress.replay.query.size)
  np.testing.assert_array_equal(size[:, 0], _SIZES)
  np.testing.assert_array_equal(progress.state.step, [15, 15, 15])
  curve = single_task.curves(setup)
  # The 2nd, the 4th and the last of 5 iterations are evaluated; the first
  # has both uniform rounds.
  np.testing.assert_array_equal(
    curve['eval/env_steps'], _SIZES / 6 * np.array([[3], [5], [6]])
  )
  # value * (1 + ... + lifetime), whatever the policy does.
  np.testing.assert_allclose(
    curve['eval/return'], np.tile([3.0, -30.0, 3.0], (3, 1)), rtol=1e-6
  )
  np.testing.assert_array_equal(curve['gather/diverged'], np.zeros((5, 3)))


@pytest.mark.parametrize('learner', range(3))
def test_the_replay_is_the_whole_life_in_order(finished, learner):
  log = _log(finished[1], learner)
  life, value = (float(_TASKS[name][learner]) for name in ('lifetime', 'value'))
  episodes = int(_SIZES[learner] / life)
  time = np.tile(np.arange(life), episodes)
  np.testing.assert_array_equal(log.observation[:, 0], time)
  np.testing.assert_array_equal(log.extras['time'], time)
  np.testing.assert_array_equal(log.extras['features'][:, 0], time + 1)
  np.testing.assert_array_equal(log.reward, np.float32(value) * (time + 1))
  np.testing.assert_array_equal(log.discount, time < life - 1)
  # One random start per episode, all of them different.
  starts = log.observation[:, 1].reshape(episodes, int(life))
  assert len(np.unique(starts)) == episodes
  assert np.all(starts == starts[:, :1])


def test_the_replay_can_become_a_dataset(finished):
  _, progress = finished
  buffer = jax.tree.map(lambda x: np.asarray(x)[:, 0], progress.replay.query)
  validate(
    MetaDataset(
      transitions=buffer.data,
      size=buffer.size,
      context=None,
      context_size=None,
      tasks=jax.tree.map(np.asarray, _TASKS),
      episode_return=np.zeros(3, np.float32),
    ),
    _FAMILY.spec,
  )


def test_resumed_equals_uninterrupted(finished, tmp_path):
  setup, expected = finished
  stop = tiny_run.StopAt(tmp_path / 'specialists', 6)
  with pytest.raises(stopping.Interrupted):
    _train(_setup(tmp_path, stop=stop))
  assert len(tiny_run.checkpoint_steps(tmp_path, 'specialists')) == 2
  resumed = _setup(tmp_path)
  helpers.assert_same(_train(resumed), expected)
  rows = lambda s: tiny_run.metrics(s.workdir / 'specialists/metrics.jsonl')
  assert rows(resumed) == rows(setup)


def test_learners_never_see_each_other(finished, tmp_path):
  """Other tasks beside it change nothing for a learner, bit for bit."""
  _, expected = finished
  keys = seeds_lib.seed_keys(0, 3)
  others = seeds_lib.seed_keys(7, 3)
  tasks = {
    'value': np.float32([100.0, -2.0, np.pi]),
    'lifetime': np.float32([5.0, 5.0, 1.0]),
  }
  progress = _train(
    _setup(tmp_path, tasks, jnp.stack([others[0], keys[1], others[2]]))
  )
  for part in ('state', 'replay'):
    mine, before = jax.tree.map(
      lambda x: x[1],
      helpers.in_numpy((getattr(progress, part), getattr(expected, part))),
    )
    helpers.assert_same(mine, before)
  assert not np.array_equal(
    np.asarray(progress.state.params['temperature'])[0],
    np.asarray(expected.state.params['temperature'])[0],
  )


def test_side_by_side_equals_alone(finished, tmp_path):
  _, expected = finished
  alone = _train(
    _setup(
      tmp_path,
      jax.tree.map(lambda x: x[2:], _TASKS),
      seeds_lib.seed_keys(0, 3)[2:],
    )
  )
  ours, theirs = (
    (p.state.params, p.state.target_params, p.replay.query)
    for p in (alone, expected)
  )
  # Adam makes whole steps (0.01) of rounding errors in tiny gradients.
  helpers.assert_close(
    jax.tree.map(lambda x: x[0], helpers.in_numpy(ours)),
    jax.tree.map(lambda x: x[2], helpers.in_numpy(theirs)),
    1e-4,
    1e-4,
  )


def test_the_first_steps_are_uniform(finished, tmp_path):
  """They do not depend on the networks; what comes after does."""
  wide = dataclasses.replace(
    _CONFIG,
    sac=dataclasses.replace(_CONFIG.sac, actor_hidden=(9,)),
    env_steps=15,
  )
  progress = _train(_setup(tmp_path), wide)
  for learner, rows in enumerate(_SIZES // 3):
    ours, theirs = (
      _log(p, learner).action[:, 0] for p in (progress, finished[1])
    )
    np.testing.assert_array_equal(ours[:rows], theirs[:rows])
    assert not np.any(ours[rows:] == theirs[rows : len(ours)])


def test_precision_of_updates(tmp_path, monkeypatch):
  """The run's own, where it has one."""

  class Made(Exception):
    pass

  def updater(*args, **kw):
    raise Made(kw['matmul_precision'])

  monkeypatch.setattr(updates, 'Updater', updater)
  setup = _setup(tmp_path)
  for given, expected in (((), 'float32'), (('s', 'bfloat16'), 'bfloat16')):
    with pytest.raises(Made, match=expected):
      single_task.train(setup, _CONFIG, None, *given)


def test_steps_that_blew_up_are_counted(tmp_path):
  setup = dataclasses.replace(
    _setup(tmp_path), family=probes.BlowsUp(terminates=True)
  )
  states = updates.init_states(setup.algorithm('sac', _CONFIG.sac), setup.seeds)
  returns, diverged = single_task.Evaluator(setup, _CONFIG).score(states)
  # In the third step of both episodes, if life is that long.
  np.testing.assert_array_equal(diverged, [0, 2, 2])
  np.testing.assert_array_equal(returns, [[3, 3], [-12, -12], [3, 3]])


def test_a_budget_without_training_is_an_error():
  config = dataclasses.replace(_CONFIG, env_steps=12)
  with pytest.raises(ConfigError, match='env_steps 12'):
    single_task.rounds(config)


# Learning.


def _best_return(goal, steps=20):
  """Straight to the goal, as fast as each coordinate can."""
  position, total = np.zeros(2), 0.0
  for _ in range(steps):
    position = position + np.clip(goal - position, -0.1, 0.1)
    total -= np.linalg.norm(goal - position)
  return total


def test_sac_solves_the_point_robot(tmp_path):
  goals = np.float32([[0.0, 1.0], [-0.8, 0.6], [1.0, 0.0], [0.6, 0.8]])
  config = SpecialistsConfig(
    env_steps=3000,
    initial_steps=600,
    steps_per_iteration=200,
    num_evaluations=1,
    num_episodes=1,
    sac=sac.Config(
      critic_hidden=(32, 32),
      actor_hidden=(32, 32),
      critic_lr=3e-3,
      actor_lr=3e-3,
      temperature_lr=3e-3,
      discount=0.9,
      batch_size=64,
      num_updates=200,
    ),
  )
  setup = dataclasses.replace(
    _setup(tmp_path, {'goal': goals}, seeds_lib.seed_keys(0, 4)),
    family=PointRobot(),
  )
  _train(setup, config)
  returns = single_task.curves(setup)['eval/return'][-1]
  best = np.array([_best_return(goal) for goal in np.asarray(goals)])
  assert np.all(returns <= best + 1e-3)
  # Three seeds came within 0.5 to 1.0; random policies stay 14 below.
  assert np.all(returns > best - 2.0)
