"""What evaluations say besides returns."""

import dataclasses

import helpers
import jax.numpy as jnp
import numpy as np
import tiny_run

from offmeta.algorithms import smac
from offmeta.testing import probes
from offmeta.training import evaluator as evaluators, updates
from offmeta.types import Problem


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
