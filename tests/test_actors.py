"""Environments that go on from call to call, by hand."""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from offmeta import parallel, rollout
from offmeta.testing import probes
from offmeta.types import Policy

_KEYS = jax.random.split(jax.random.key(0), 3)
# It counts its steps since it knew nothing, and says so.
_COUNTS = Policy(
  init=lambda params, key: jnp.zeros(()),
  act=lambda params, state, observation, key: (
    jax.random.uniform(key, (1,)),
    state + 0.5,
    {'log_prob': params + state},
  ),
  observe=lambda params, state, transition, key: state + 0.5,
  adapt=lambda params, state, context, valid, key: state,
)


def _tasks(number, lifetime=3.0):
  return {
    'value': 1.0 + np.arange(number, dtype=np.float32),
    'lifetime': np.full((number,), lifetime, np.float32),
  }


@functools.partial(jax.jit, static_argnums=(0, 2), static_argnames='axis_name')
def _run(family, tasks, sizes, axis_name=None):
  """Steps [E, sum of sizes, ...], collected in as many calls."""
  args = family, _COUNTS, jnp.float32(10.0)
  actors = rollout.start_actors(*args, tasks, _KEYS[0], axis_name)
  parts = []
  for key, size in zip(_KEYS[1:], sizes):
    actors, part = rollout.continue_rollout(
      *args, actors, tasks, size, key, axis_name
    )
    parts.append(part)
  join = lambda *x: jnp.concatenate(x, axis=1)
  return actors, jax.tree.map(join, *parts)


def _collect(*given):
  return jax.device_get(_run(*given))


def test_time_limits():
  """The last observation is the true one, the next episode starts anew."""
  actors, steps = _collect(probes.CountingFamily(), _tasks(2), (7, 5))
  time = np.array([0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1])
  for e in range(2):
    np.testing.assert_array_equal(steps.extras['time'][e], time)
    np.testing.assert_array_equal(steps.observation[e, :, 0], time)
    np.testing.assert_array_equal(steps.next_observation[e, :, 0], time + 1)
    np.testing.assert_array_equal(steps.reward[e], (e + 1) * (time + 1))
    # The belief too: 0 at a reset, 1 more after every step.
    np.testing.assert_array_equal(steps.extras['log_prob'][e], 10 + time)
    np.testing.assert_array_equal(steps.extras['truncated'][e], time == 4)
    starts = steps.observation[e, :, 1]
    np.testing.assert_array_equal(starts, steps.next_observation[e, :, 1])
    assert len(np.unique(starts)) == 3
    np.testing.assert_array_equal(starts[:5], starts[0])
  assert np.all(steps.discount == 1) and not np.any(steps.extras['diverged'])
  np.testing.assert_array_equal(actors.time, [2, 2])
  np.testing.assert_array_equal(actors.belief, [2, 2])
  # No two environments, and no two steps of one, act alike.
  assert len(np.unique(steps.action)) == steps.action.size


def test_terminations():
  """At the time limit too: what terminates there is not truncated."""
  family = probes.CountingFamily(terminates=True)
  tasks = {
    'value': np.ones(2, np.float32),
    'lifetime': np.float32([3.0, 5.0]),
  }
  _, steps = _collect(family, tasks, (7, 3))
  for e, lifetime in enumerate((3, 5)):
    time = np.arange(10) % lifetime
    np.testing.assert_array_equal(steps.extras['time'][e], time)
    np.testing.assert_array_equal(steps.discount[e], time < lifetime - 1)
    np.testing.assert_array_equal(steps.next_observation[e, :, 0], time + 1)
  assert not np.any(steps.extras['truncated'])


@pytest.mark.parametrize('terminates', [False, True])
def test_simulations_that_blow_up(terminates):
  """A termination, or a time limit after a step that went nowhere."""
  family = probes.BlowsUp(terminates=terminates)
  _, steps = _collect(family, _tasks(1, 9.0), (7, 2))
  blown = np.arange(9) % 3 == 2
  np.testing.assert_array_equal(steps.extras['diverged'][0], blown)
  np.testing.assert_array_equal(steps.discount[0], ~(blown & terminates))
  truncated = blown & (not terminates)
  np.testing.assert_array_equal(steps.extras['truncated'][0], truncated)
  time = np.arange(9) % 3
  np.testing.assert_array_equal(steps.extras['time'][0], time)
  np.testing.assert_array_equal(
    steps.next_observation[0, :, 0], np.minimum(time + 1, 2)
  )


def test_neither_neighbours_nor_devices_matter():
  family = probes.CountingFamily()
  _, few = _collect(family, _tasks(2), (4, 3))
  actors, many = _collect(family, _tasks(6), (4, 3))
  helpers.assert_same(jax.tree.map(lambda x: x[:2], many), few)
  layout = parallel.make_layout(1, 2, max_devices=2, share='tasks')
  shared = layout.compile(
    lambda tasks: _run(family, tasks, (4, 3), axis_name=layout.axis_name),
    (0,),
  )(jax.tree.map(lambda x: x[None], _tasks(6)))
  one = jax.tree.map(lambda x: np.asarray(x)[0], shared)
  helpers.assert_same(one, (actors, many))
