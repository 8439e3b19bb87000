"""The contract that any algorithm must meet, for our tests and for users.

Every check raises AssertionError with a message that says what failed.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from offmeta.testing import probes
from offmeta.testing.arrays import numbers
from offmeta.types import (
  Algorithm,
  DataSpec,
  EnvSpec,
  Evidence,
  Key,
  LearnerState,
  Loop,
  MetaBatch,
  Policy,
  Problem,
  Rollout,
  Stage,
  checked_diagnosis,
)

# Compiled once for all algorithms that ask for the same.
_random_transitions = jax.jit(
  probes.random_transitions, static_argnames=('spec', 'shape', 'data')
)
_random_batch = jax.jit(
  probes.random_batch, static_argnames=('spec', 'batch', 'data')
)


def _hashable(spec: EnvSpec) -> EnvSpec:
  """Without the options, which say nothing of sizes."""
  return spec._replace(options=())


def check_algorithm(
  make: Callable[..., Algorithm],
  config: Any,
  spec: EnvSpec | Problem,
  tolerance: float = 1e-4,
  quick: bool = False,
) -> None:
  """Checks an algorithm against the `Algorithm` interface.

  Stages: the state keeps its tree, shapes and dtypes; new batches and states
  do not retrace; all stays finite; vmap over seeds, which is traced anew,
  equals single seeds, to rounding; the root key stays and the step counts.
  Policies: shapes and trees, actions finite and in [-1, 1], an adaptation
  without valid entries gives `init`'s prior and entries that do not count
  change nothing. `relabel` gives the same with a poisoned reward. `diagnose`
  gives finite arrays that the report can show. Stages of
  'finetune', from what its `begin` gives, as the others. Choose
  small sizes in `config`: nothing here needs large ones.

  Args:
    make: (problem, config, axis_name) -> Algorithm.
    config: of the algorithm.
    spec: of a family, or a whole Problem; no environment is run.
    tolerance: relative and absolute, between two ways to compute a state.
      Adam turns rounding errors of tiny gradients into whole steps, so it
      should not be far below the learning rates.
    quick: leave out what takes most of the time, the comparison with vmap over
      seeds (for further settings of one algorithm).

  Raises:
    AssertionError: says what failed.
  """
  problem = (
    spec if isinstance(spec, Problem) else Problem(spec, probes.NUM_TASKS)
  )
  spec = problem.spec
  algorithm = make(problem, config, None)
  assert isinstance(algorithm, Algorithm), f'make gave {type(algorithm)}'
  keys = jax.random.split(jax.random.key(0), 2)
  init = jax.jit(algorithm.init)
  states = [init(key) for key in keys]
  for leaf in jax.tree.leaves(states[0]):
    assert isinstance(leaf, jax.Array), f'init: {leaf!r} is not an array'
  _assert_finite(states[0], 'init')
  _assert_like(init(keys[0]), states[0], 'init with the same key', 0.0)
  assert algorithm.loops, 'no loops'
  for loop in algorithm.loops:
    if loop.phase == 'finetune':
      continue
    begun = [jax.jit(loop.begin)(state) for state in states]
    _assert_same_form(
      begun[0].replace(memory=()),
      states[0].replace(memory=()),
      f'begin of loop {loop.name!r}',
    )
    states = begun
    for stage in loop.stages:
      states = _check_stage(
        stage,
        states,
        _drawing(algorithm, loop, stage, states[0], spec),
        tolerance,
        quick,
      )
    _check_finished(loop, states[0])
    states = [state.replace(memory=()) for state in states]
  params = algorithm.actor_params(states[0])
  for name in ('explore', 'evaluate', 'evaluate_given_context'):
    if getattr(algorithm, name) is not None:
      _check_policy(
        getattr(algorithm, name), name, algorithm, params, spec, tolerance
      )
  for loop in algorithm.in_phase('finetune'):
    _check_finetune(algorithm, loop, states, spec, tolerance, quick)
  if algorithm.relabel is not None:
    _check_relabel(algorithm, states[0], spec)
  if algorithm.diagnose is not None:
    _check_diagnose(algorithm, states[0], spec)


def _drawing(
  algorithm: Algorithm,
  loop: Loop,
  stage: Stage,
  state: LearnerState,
  spec: EnvSpec,
) -> Callable[[Key], MetaBatch]:
  """key -> a batch as the stage asks for, without any meaning."""
  if not isinstance(stage.batch.query, Rollout):
    return lambda key: _random_batch(
      key, _hashable(spec), stage.batch, algorithm.data
    )
  assert loop.gather is not None, (
    f'loop {loop.name!r}: stage {stage.name!r} is fed by rollouts, but nothing'
    ' is gathered'
  )
  num_envs, num_steps = loop.gather
  assert stage.batch.num_tasks == num_envs, (
    f'stage {stage.name!r}: {stage.batch.num_tasks} tasks, but the loop gathers'
    f' rollouts of {num_envs} environments'
  )

  def draw(key):
    shape = (num_envs, num_steps)
    steps = probes.random_transitions(
      key, spec, shape, DataSpec(sequence_episodes=1)
    )
    policy, params = algorithm.explore, algorithm.actor_params(state)
    act = lambda observation, key: policy.act(
      params, policy.init(params, key), observation, key
    )
    action, _, said = jax.vmap(jax.vmap(act))(
      steps.observation, jax.random.split(key, shape)
    )
    last = steps.extras['time'] == spec.episode_length - 1
    extras = {
      **said,
      'features': jnp.zeros(shape + (spec.feature_size,)),
      'time': steps.extras['time'],
      'diverged': jnp.zeros(shape),
      'truncated': last * steps.discount,
    }
    slots = jnp.arange(num_envs)
    return MetaBatch(
      slots, slots, None, None, steps._replace(action=action, extras=extras)
    )

  return jax.jit(draw)


def _check_stage(
  stage: Stage,
  states: list[LearnerState],
  draw: Callable[[Key], MetaBatch],
  tolerance: float,
  quick: bool,
) -> list[LearnerState]:
  """Returns the states of both seeds after two updates."""
  traces = 0

  def counted(state, batch):
    nonlocal traces
    traces += 1
    return stage.update(state, batch)

  # As other programs of the update are called, for the compilation cache.
  counted.__name__ = getattr(stage.update, '__name__', 'update')
  update = jax.jit(counted)
  batches = [draw(jax.random.key(i)) for i in range(2)]
  if stage.annotate is not None:
    batches = [_annotated(stage, states[0], batch) for batch in batches]
  once, after = [], []
  for state in states:
    first, metrics = update(state, batches[0])
    once.append((first, metrics))
    after.append(update(first, batches[1])[0])
  where = f'stage {stage.name!r}'
  assert traces == 1, (
    f'{where}: {traces} traces for batches and states of one shape'
  )
  (first, metrics), before = once[0], states[0]
  _assert_same_form(first, before, f'{where}: the state after an update')
  _assert_finite((after[0], metrics), where)
  for name, value in metrics.items():
    assert value.shape == (), (
      f'{where}: metric {name!r} has shape {value.shape}, not ()'
    )
  assert int(first.step) == int(before.step) + 1, (
    f'{where}: step went from {before.step} to {first.step}'
  )
  _assert_like(first.key, before.key, f'{where}: the root key', 0.0)
  assert any(
    not np.array_equal(a, b)
    for a, b in zip(
      jax.tree.leaves(first.params), jax.tree.leaves(before.params)
    )
  ), f'{where}: no parameter changed'
  _assert_like(
    update(before, batches[0]), once[0], f'{where}: the same input', 0.0
  )
  if quick:
    return after
  # Traced anew, so Python state that a compiled program does not see shows. A
  # program each, not one per leaf and shape.
  stack = jax.jit(lambda trees: jax.tree.map(lambda *x: jnp.stack(x), *trees))
  unstack = jax.jit(
    lambda tree: [jax.tree.map(lambda x: x[i], tree) for i in range(2)]
  )
  batched = jax.jit(jax.vmap(stage.update, (0, None)))(
    stack(states), batches[0]
  )
  for both, single in zip(unstack(batched), once, strict=True):
    _assert_like(both, single, f'{where}: vmap over seeds', tolerance)
  return after


def _annotated(stage: Stage, state: LearnerState, batch: MetaBatch):
  """The batch with what the stage adds to its queries, taken as sequences."""
  mask = jnp.ones(batch.query.reward.shape)
  annotate = jax.jit(jax.vmap(stage.annotate, (None, 0, 0)))
  added = annotate(state, batch.query, mask)
  for name, leaf in added.items():
    assert leaf.shape[:2] == mask.shape, (
      f'stage {stage.name!r}: annotate gave {name!r} of shape'
      f' {leaf.shape[1:]} for {mask.shape[1]} transitions'
    )
  _assert_finite(added, f'stage {stage.name!r}: annotate')
  # What does not count must not matter to what comes before it.
  cut, spoiled = jax.tree.map(np.array, (mask, batch.query))
  cut[:, -1] = 0.0
  for leaf in jax.tree.leaves(spoiled):
    leaf[:, -1] += 100.0
  kept = lambda found: jax.tree.map(lambda x: np.asarray(x)[:, :-1], found)
  _assert_like(
    kept(annotate(state, spoiled, cut)),
    kept(annotate(state, batch.query, cut)),
    f'stage {stage.name!r}: annotate with another entry where the mask is 0',
    0.0,
  )
  return batch._replace(
    query=batch.query._replace(extras={**batch.query.extras, **added})
  )


def _check_policy(
  policy: Policy,
  name: str,
  algorithm: Algorithm,
  params: Any,
  spec: EnvSpec,
  tolerance: float,
) -> None:
  keys = jax.random.split(jax.random.key(3), 4)
  size, valid = 6, jnp.array([1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
  data = algorithm.data
  if name != 'evaluate_given_context':  # collected by itself, in order
    data = DataSpec(sequence_episodes=1)
  context, other = [
    _random_transitions(key, _hashable(spec), (size,), data) for key in keys[:2]
  ]
  adapt = jax.jit(policy.adapt)
  prior = jax.jit(policy.init)(params, keys[2])
  state = adapt(params, prior, context, valid, keys[2])
  _assert_same_form(state, prior, f'{name}: the state after adapt')
  nothing = adapt(params, prior, context, 0.0 * valid, keys[2])
  _assert_like(
    nothing, prior, f'{name}: adapt with nothing valid, and init', tolerance
  )
  # In numpy: outside jit, jax compiles a program per operation and shape.
  context, other = jax.tree.map(np.asarray, (context, other))
  mixed = jax.tree.map(
    lambda a, b: np.concatenate([a[:3], b[3:]]), context, other
  )
  _assert_like(
    adapt(params, prior, mixed, valid, keys[2]),
    state,
    f'{name}: adapt with other entries where valid is 0',
    0.0,
  )
  kept = policy.keep(context)
  _assert_like(kept.reward, context.reward, f'{name}: keep, the reward', 0.0)
  _assert_like(
    adapt(params, prior, kept, valid, keys[2]),
    state,
    f'{name}: adapt to what keep leaves',
    0.0,
  )
  act, observe = jax.jit(policy.act), jax.jit(policy.observe)
  for i in range(3):
    step = jax.tree.map(lambda x: x[i], other)
    key = jax.random.fold_in(keys[3], i)
    observation = step.observation
    if spec.observation_dtype == 'float32':
      # Far beyond the data, where what is not squashed leaves [-1, 1].
      observation = 100.0 * observation
    chosen = act(params, state, observation, key)
    assert len(chosen) == 3, (
      f'{name}: act returns {len(chosen)} things, not action, state and extras'
    )
    action, seen, extras = chosen
    _assert_same_form(seen, state, f'{name}: the state after act')
    _assert_finite((seen, extras), f'{name}: act')
    assert action.shape == (spec.action_size,), (
      f'{name}: action of shape {action.shape}'
    )
    assert np.all(np.abs(action) <= 1.0), (
      f'{name}: action {action} is not in [-1, 1]'
    )
    new = observe(params, seen, step, key)
    _assert_same_form(new, state, f'{name}: the state after observe')
    _assert_finite(new, f'{name}: observe')
    state = new
  if algorithm.posterior is not None:
    mean, std = jax.jit(algorithm.posterior)(params, context, 0.0 * valid)
    _assert_like(
      (mean, std),
      (np.zeros_like(mean), np.ones_like(std)),
      'posterior of nothing, and N(0, I)',
      tolerance,
    )


def _check_finished(loop: Loop, state: LearnerState) -> None:
  if loop.finished is None:
    return
  finished = jax.jit(loop.finished)(state)
  assert finished.shape == () and finished.dtype == bool, (
    f'loop {loop.name!r}: finished gave {finished.dtype}{finished.shape},'
    ' expected one bool'
  )


def _check_finetune(
  algorithm: Algorithm,
  loop: Loop,
  states: list[LearnerState],
  spec: EnvSpec,
  tolerance: float,
  quick: bool,
) -> None:
  context = _random_transitions(
    jax.random.key(5), _hashable(spec), (6,), algorithm.data
  )
  begin = jax.jit(loop.begin)
  begun = [begin(state, context, jnp.ones(6)) for state in states]
  _assert_finite(begun[0], 'begin of finetune')
  _assert_same_form(
    algorithm.actor_params(begun[0]),
    algorithm.actor_params(states[0]),
    'begin of finetune: what the policies take as params',
  )
  for stage in loop.stages:
    draw = _drawing(algorithm, loop, stage, begun[0], spec)
    begun = _check_stage(stage, begun, draw, tolerance, quick)


def _check_relabel(
  algorithm: Algorithm, state: LearnerState, spec: EnvSpec
) -> None:
  keys = jax.random.split(jax.random.key(4), 3)
  context, data = [
    _random_transitions(key, _hashable(spec), (size,))
    for key, size in zip(keys, (5, 7))
  ]
  relabel = jax.jit(algorithm.relabel)
  labels = relabel(state, context, jnp.ones(5), data, keys[2])
  assert labels.shape == data.reward.shape, (
    f'relabel: rewards of shape {labels.shape}, not {data.reward.shape}'
  )
  _assert_finite(labels, 'relabel')
  poisoned = data._replace(reward=np.full_like(data.reward, np.nan))
  _assert_like(
    relabel(state, context, jnp.ones(5), poisoned, keys[2]),
    labels,
    'relabel: with data.reward poisoned',
    0.0,
  )


def _check_diagnose(
  algorithm: Algorithm, state: LearnerState, spec: EnvSpec
) -> None:
  def evidence():
    keys = jax.random.split(jax.random.key(7), 4)
    logged, own, rows = [
      probes.random_transitions(key, spec, (3, 5), algorithm.data)
      for key in keys[:3]
    ]
    mask = jnp.ones((3, 5)).at[:, 4].set(0.0)
    return Evidence(logged, mask, own, mask, rows, mask, keys[3])

  found = jax.jit(algorithm.diagnose)(state, jax.jit(evidence)())
  try:
    checked_diagnosis(found)
  except ValueError as error:
    raise AssertionError(str(error)) from error
  _assert_finite(found, 'diagnose')


def _assert_same_form(actual: Any, expected: Any, what: str) -> None:
  try:
    chex.assert_trees_all_equal_structs(actual, expected)
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
  except AssertionError as error:
    raise AssertionError(f'{what} has another form: {error}') from error


def _assert_finite(tree: Any, what: str) -> None:
  for path, leaf in jax.tree.leaves_with_path(tree):
    assert np.all(np.isfinite(numbers(leaf))), (
      f'{what}: {jax.tree_util.keystr(path)} is not finite'
    )


def _assert_like(
  actual: Any, expected: Any, what: str, tolerance: float
) -> None:
  _assert_same_form(actual, expected, what)
  for (path, a), b in zip(
    jax.tree.leaves_with_path(actual), jax.tree.leaves(expected)
  ):
    np.testing.assert_allclose(
      numbers(a),
      numbers(b),
      rtol=tolerance,
      atol=tolerance,
      err_msg=f'{what} differ at {jax.tree_util.keystr(path)}',
    )
