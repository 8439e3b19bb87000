"""Loops of several stages and iterations: when what runs, and when they end."""

import types

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from offmeta.checkpoints.checkpointer import Checkpointer
from offmeta.data import buffer as buffers
from offmeta.data.buffer import Replay
from offmeta.training import loop as loops, metrics, stopping, updates
from offmeta.types import BatchSpec, LearnerState, Loop, Rows, Stage

_BATCH = BatchSpec(2, Rows(3), Rows(2))
_CHEAP, _ITERATIONS = 4, 6
_SEEDS = 2


def _update(name, function, step):
  def update(state, batch):
    params = dict(state.params)
    params[name] = params[name] + step * function(
      1.0 + jnp.mean(batch.query.reward) ** 2
    )
    extras = dict(state.extras)
    extras[name] = extras[name] + 1
    return state.replace(step=state.step + 1, params=params, extras=extras), {
      'value': params[name]
    }

  return update


# `sin` and `erf` are in no other part of the program.
_STAGES = (
  Stage('cheap', _CHEAP, _BATCH, _update('cheap', jnp.sin, 1.0)),
  Stage('costly', 1, _BATCH, _update('costly', jax.lax.erf, 1.0)),
)
_TOTAL = _CHEAP + 1


def _loop(**changes):
  return Loop('offline', _STAGES, _ITERATIONS)._replace(**changes)


def _seeds():
  return helpers.seeds(jax.random.split(jax.random.key(0), _SEEDS))


def _states(memory=()):
  zeros = {'cheap': jnp.zeros(_SEEDS), 'costly': jnp.zeros(_SEEDS)}
  return LearnerState(
    step=jnp.zeros(_SEEDS, jnp.int32),
    key=_seeds().streams('init'),
    params=zeros,
    target_params=(),
    opt_state=(),
    extras=jax.tree.map(lambda x: x.astype(jnp.int32), zeros),
    memory=memory,
  )


@pytest.fixture(name='replay', scope='module')
def _replay():
  data = helpers.random_transitions(1, helpers.SPEC, (3, 8))
  return Replay(buffers.make(data, jnp.full(3, 8), 8), None)


def _updater(loop, chunk, **options):
  return updates.Updater(
    lambda axis: loop, _seeds(), chunk, True, loop.iterations, **options
  )


class _Writer:
  """Keeps the rows."""

  def __init__(self):
    self.rows = []

  def write(self, step, values, **progress):
    self.rows.append((step, values, progress['iteration']))

  def truncate_after(self, step):
    self.rows = [row for row in self.rows if row[0] <= step]

  def close(self):
    pass


def _run(folder, loop, replay, chunk, start=None, **options):
  """The final progress and the rows that were written."""
  updater = _updater(loop, chunk, together=True)
  writer = _Writer()
  setup = types.SimpleNamespace(
    checkpointer=lambda name, seeds, kind='checkpoints': Checkpointer(
      folder / kind, 'hash'
    ),
    writer=lambda *args: writer,
    runtime=types.SimpleNamespace(checkpoint_every_s=1e9),
    stop=options.pop('stop', None),
    workdir=folder,
    is_done=lambda name: True,
  )
  progress = loops.run_loop(
    setup,
    loop.name,
    loops.start(_states() if start is None else start, None),
    updater,
    label='toy',
    replay=replay,
    **options,
  )
  return progress, writer.rows, setup


def _executions(jaxpr, name, times=1):
  """How often a primitive runs, and whether it is under a condition."""
  found = []
  for equation in jaxpr.eqns:
    if equation.primitive.name == name:
      found.append((times, False))
    inner = times * (
      equation.params['length'] if equation.primitive.name == 'scan' else 1
    )
    for value in equation.params.values():
      for part in value if isinstance(value, (tuple, list)) else [value]:
        part = getattr(part, 'jaxpr', part)
        if hasattr(part, 'eqns'):
          conditional = equation.primitive.name in ('cond', 'while')
          found += [
            (n, c or conditional) for n, c in _executions(part, name, inner)
          ]
  return found


def test_work_that_is_due_now_and_then_is_computed_then_and_no_more(replay):
  """Of the program of all six iterations, for two seeds."""
  run = updates.make_iterations(
    lambda axis: _loop(), _seeds(), _ITERATIONS, shared_replay=True
  )
  program = jax.make_jaxpr(run)(_states(), replay).jaxpr
  assert _executions(program, 'erf') == [(_ITERATIONS, False)]
  assert _executions(program, 'sin') == [(_ITERATIONS * _CHEAP, False)]


def test_chunks_of_any_size_give_the_same(tmp_path, replay):
  """Part of a stage, one stage, and several iterations in one call."""
  ends = []
  for chunk, rows in ((3, 3 * _ITERATIONS), (7, _ITERATIONS), (12, 3)):
    progress, written, _ = _run(tmp_path / str(chunk), _loop(), replay, chunk)
    ends.append(progress.state)
    assert int(progress.iteration) == _ITERATIONS
    assert int(progress.updates) == 0
    assert len(written) == rows and written[-1][0] == _ITERATIONS * _TOTAL
    assert np.all(ends[-1].step == _ITERATIONS * _TOTAL)
    np.testing.assert_array_equal(ends[-1].extras['costly'], _ITERATIONS)
    np.testing.assert_array_equal(
      ends[-1].extras['cheap'], _ITERATIONS * _CHEAP
    )
  named = {name for _, values, _ in written for name in values}
  assert named == {'toy/cheap/value', 'toy/costly/value'}
  for other in ends[1:]:
    helpers.assert_close(other, ends[0], rtol=1e-6)


def test_evaluations_are_due_by_updates_and_at_the_end(tmp_path, replay):
  _, rows, _ = _run(
    tmp_path,
    _loop(),
    replay,
    7,
    evaluate=lambda state, data: {'eval/step': state.step},
    evaluate_every=2 * _TOTAL + 1,
  )
  scored = [int(v['eval/step'][0]) for _, v, _ in rows if 'eval/step' in v]
  assert scored == [3 * _TOTAL, 5 * _TOTAL, 6 * _TOTAL]


@pytest.mark.parametrize('chunk', [3, 7, 12])
def test_a_seed_that_has_finished_keeps_its_state(chunk, tmp_path, replay):
  """The first seed after two iterations, the other after four."""
  limit = 2 * _CHEAP

  def started():
    extras = _states().extras
    ahead = jnp.array([2 * _CHEAP, 0], jnp.int32)
    return _states().replace(extras={**extras, 'cheap': ahead})

  loop = _loop(finished=lambda s: s.extras['cheap'] >= 2 * limit)
  progress, rows, _ = _run(tmp_path, loop, replay, chunk, start=started())
  np.testing.assert_array_equal(progress.state.extras['costly'], [2, 4])
  np.testing.assert_array_equal(progress.state.step, [2 * _TOTAL, 4 * _TOTAL])
  assert int(progress.iteration) == 4 and rows[-1][2] == 4
  # What was held has the value that it has in a loop of so many iterations.
  alone, _, _ = _run(
    tmp_path / 'alone', _loop(iterations=2), replay, chunk, start=started()
  )
  helpers.assert_close(
    progress.state.params['costly'][0],
    alone.state.params['costly'][0],
    rtol=1e-6,
  )


class _StopAt(stopping.StopRequest):
  """Asks to stop when it was asked so many times."""

  def __init__(self, number):
    self._left = number

  @property
  def requested(self):
    self._left -= 1
    return self._left == 0


@pytest.mark.parametrize('chunk', [3, 12])
def test_resumed_equals_uninterrupted(chunk, tmp_path, replay):
  loop = _loop(finished=lambda s: s.extras['cheap'] >= 5 * _CHEAP)
  whole, rows, _ = _run(tmp_path / 'whole', loop, replay, chunk)
  with pytest.raises(stopping.Interrupted):
    _run(tmp_path / 'cut', loop, replay, chunk, stop=_StopAt(2))
  again, others, _ = _run(tmp_path / 'cut', loop, replay, chunk)
  helpers.assert_close(again, whole, rtol=0.0)
  assert [row[0] for row in others] == [row[0] for row in rows][2:]


def test_memory_is_in_checkpoints_and_not_in_what_a_loop_leaves(
  tmp_path, replay
):
  started = _states(memory={'imagined': jnp.ones((_SEEDS, 50))})
  progress, _, setup = _run(tmp_path, _loop(), replay, 7, start=started)
  assert progress.state.memory['imagined'].shape == (_SEEDS, 50)
  folder = setup.checkpointer('offline', None)
  kept = folder.restore(progress)
  np.testing.assert_array_equal(kept.state.memory['imagined'], 1.0)
  algorithm = types.SimpleNamespace(
    init=lambda key: jax.tree.map(
      lambda x: x[0], _states(memory={'imagined': jnp.ones((_SEEDS, 50))})
    )
  )
  left = loops.final_states(setup, 'offline', algorithm, _seeds())
  assert left.memory == ()
  helpers.assert_close(left.params, progress.state.params, rtol=0.0)


def test_annotations_are_for_one_iteration():
  stage = _STAGES[0]._replace(annotate=lambda state, log, mask: {})
  with pytest.raises(ValueError, match="loop 'offline'.* one iteration, not 6"):
    _updater(_loop(stages=(stage,)), 3)


def test_a_metric_that_is_not_finite_stops_the_run(tmp_path, replay):
  broken = _STAGES[1]._replace(
    update=lambda state, batch: (
      state.replace(step=state.step + 1),
      {'value': jnp.log(-jnp.ones(()))},
    )
  )
  with pytest.raises(metrics.DivergenceError, match='toy/costly/value'):
    _run(tmp_path, _loop(stages=(_STAGES[0], broken)), replay, 12)
