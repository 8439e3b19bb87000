"""What evaluations say besides returns."""

import dataclasses

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from offmeta import rollout
from offmeta.algorithms import smac
from offmeta.data import buffer as buffers
from offmeta.testing import probes
from offmeta.training import evaluator as evaluators, updates
from offmeta.types import (
  DataSpec,
  LearnerState,
  Problem,
  Transition,
  checked_diagnosis,
)


def test_steps_that_blew_up_are_counted(tmp_path):
  family = probes.BlowsUp()
  setup = dataclasses.replace(
    tiny_run.make_setup(tmp_path),
    family=family,
    train_tasks={'value': jnp.ones(3), 'lifetime': jnp.ones(3)},
    test_tasks={'value': jnp.ones(2), 'lifetime': jnp.ones(2)},
  )
  algorithm = smac.make(Problem(family.spec), helpers.SMAC)
  evaluator = evaluators.Evaluator(setup, algorithm, setup.seeds)
  states = updates.init_states(algorithm, setup.seeds)
  # Once in each episode of 5 steps; 40 steps, 2 repetitions, 2 seeds.
  curve = evaluator.curve(states, None)
  np.testing.assert_array_equal(
    curve['eval/diverged'], np.full(2, (2 + 2) * 2 * 8)
  )
  scores, _ = evaluator.full(states, None)
  np.testing.assert_array_equal(scores['diverged'], np.full(2, (2 + 3) * 2 * 8))


def test_diagnoses_are_shown_the_right_data(tmp_path):
  """Of each seed: its state, and what belongs to some training tasks."""
  setup = tiny_run.make_setup(tmp_path)

  def diagnose(state, evidence):
    return {
      'step': state.step,
      'logged': evidence.logged.reward * evidence.logged_mask,
      'own': evidence.own.reward * evidence.own_mask,
      'rows': evidence.rows.reward * evidence.rows_mask,
    }

  algorithm = smac.make(Problem(setup.family.spec), helpers.SMAC)
  evaluator = evaluators.Evaluator(
    setup, algorithm._replace(diagnose=diagnose), setup.seeds
  )
  # Three training tasks, of which the configuration evaluates two.
  tasks = np.asarray(evaluator._some)  # pylint: disable=protected-access
  reward = 100.0 * np.arange(3)[:, None] + np.arange(20.0)

  def steps(reward):
    reward = reward.astype(np.float32)
    wide = reward[..., None]
    return Transition(wide, wide, reward, np.ones_like(reward), wide)

  logs = buffers.Replay(buffers.make(steps(reward), jnp.full(3, 20), 20), None)
  # [S, M, R, W]: tens are repetitions, thousands seeds.
  own = (
    1000.0 * np.arange(2)[:, None, None, None]
    + 100.0 * np.arange(3)[:, None, None]
    + 10.0 * np.arange(2)[:, None]
    + np.arange(4.0)
  )
  adaptation = rollout.Adaptation(
    own[..., :1],
    steps(own),
    np.broadcast_to(np.float32([1, 1, 1, 0]), own.shape),
    np.zeros((2, 3, 2), np.int32),
  )
  keys = setup.seeds.streams('initial')
  states = LearnerState(jnp.array([5, 6]), keys, (), (), (), ())
  found = evaluator._diagnose(states, logs, adaptation)  # pylint: disable=protected-access
  np.testing.assert_array_equal(found['step'], [5, 6])
  np.testing.assert_array_equal(
    found['own'], own[:, tasks, 0] * np.array([1, 1, 1, 0])
  )
  # 8 rows (`context_size`) of the own task; drawn apart, for each seed.
  for name in ('logged', 'rows'):
    assert found[name].shape == (2, 2, 8)
    assert set(np.unique(found[name] // 100)) == set(tasks)
    np.testing.assert_array_equal(found[name][:, 1] // 100, tasks[1])
    assert not np.array_equal(found[name][0], found[name][1])
  np.testing.assert_array_equal(np.diff(found['rows']), 1.0)


def test_diagnoses_of_sequences_are_shown_their_beginnings(tmp_path):
  setup = tiny_run.make_setup(tmp_path)
  algorithm = smac.make(Problem(setup.family.spec), helpers.SMAC)
  evaluator = evaluators.Evaluator(
    setup,
    algorithm._replace(data=DataSpec(sequence_episodes=1)),
    setup.seeds,
  )
  # Two sequences of 6 and 14 rows, of which 8 (`context_size`) are shown.
  time = np.tile(np.r_[:6, :14].astype(np.float32), (3, 1))
  data = Transition(time, time, time, time, time, {'time': time})
  buffer = buffers.make(data, np.full(3, 20), 20, 2)
  buffer = buffer._replace(
    sequence_start=jnp.array([[0, 6]] * 3),
    sequence_length=jnp.array([[6, 14]] * 3),
    num_sequences=jnp.full(3, 2),
  )
  keys = jax.random.split(jax.random.key(0), 4)
  rows, mask = evaluator._draw_rows(  # pylint: disable=protected-access
    buffers.Replay(buffer, None), np.arange(3), keys
  )
  lengths = mask.sum(-1).astype(int)
  assert set(np.unique(lengths)) == {6, 8}
  for of_seed, seen in zip(rows.reward, lengths):
    for steps, length in zip(of_seed, seen):
      np.testing.assert_array_equal(steps[:length], np.arange(length))


def test_diagnoses_that_no_report_can_show():
  with pytest.raises(ValueError, match=r"'cube' has shape \[2, 2, 2\]; return"):
    checked_diagnosis({'cube': jnp.ones((2, 2, 2))})
