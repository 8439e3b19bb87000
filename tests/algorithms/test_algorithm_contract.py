"""Every algorithm meets the contract, and the contract rejects what is not."""

import dataclasses

import helpers
import jax
import jax.numpy as jnp
import pytest

from offmeta import testing
from offmeta.algorithms import pearl, smac
from offmeta.types import (
  Algorithm,
  BatchSpec,
  LearnerState,
  Loop,
  Policy,
  Rows,
  Stage,
)

_BATCH = BatchSpec(2, Rows(4), Rows(3))


# Ours rather than the released switches: a superset of the code.
_SMAC = dataclasses.replace(
  helpers.SMAC,
  train_context_online=True,
  use_next_observation=True,
  latent_resample_period=0,
  online=dataclasses.replace(
    helpers.SMAC.online, context='episodes', sequence_size=7
  ),
)


@pytest.mark.parametrize(
  'module, config',
  [(smac, _SMAC), (pearl, helpers.PEARL)],
  ids=['smac', 'pearl'],
)
def test_contract(module, config):
  testing.check_algorithm(module.make, config, helpers.SPEC)


# A toy that meets the contract, and changes to it that do not.


def _toy(**changes):
  """make() of a linear policy, with parts replaced."""

  def init(key):
    return LearnerState(
      step=jnp.zeros((), jnp.int32),
      key=key,
      params={'w': jnp.ones(2)},
      target_params={},
      opt_state={},
      extras={},
    )

  def update(state, batch):
    w = state.params['w'] + 0.1 * jnp.mean(batch.query.reward)
    return state.replace(step=state.step + 1, params={'w': w}), {
      'a/loss': jnp.sum(w)
    }

  def adapt(params, state, context, valid, key):
    return jnp.sum(context.reward * valid)

  policy = Policy(
    init=lambda params, key: jnp.zeros(()),
    act=lambda params, state, observation, key: (
      jnp.tanh(params['w'] * jnp.sum(observation)),
      state,
      {},
    ),
    observe=lambda params, state, transition, key: state,
    adapt=adapt,
  )
  algorithm = Algorithm(
    init=init,
    loops=(Loop('online', (Stage('toy', 1, _BATCH, update),)),),
    explore=policy,
    evaluate=policy,
    evaluate_given_context=policy,
    actor_params=lambda state: state.params,
    relabel=lambda state, context, valid, data, key: data.action[..., 0],
    posterior=lambda params, context, valid: (
      jnp.zeros(1),
      jnp.ones(1) * jnp.where(jnp.any(valid > 0), 2.0, 1.0),
    ),
  )

  def make(problem, config, axis_name=None):
    new = algorithm
    for name, change in changes.items():
      if name == 'update':
        stage = (
          new.loops[0]
          .stages[0]
          ._replace(update=lambda s, b: change(update, s, b))
        )
        new = new._replace(loops=(new.loops[0]._replace(stages=(stage,)),))
      elif name in Loop._fields:
        new = new._replace(loops=(new.loops[0]._replace(**{name: change}),))
      elif name in Policy._fields:
        new = new._replace(evaluate=new.evaluate._replace(**{name: change}))
      else:
        new = new._replace(**{name: change})
    return new

  return make


def test_toy_meets_the_contract():
  diagnose = lambda state, evidence: {'reward': evidence.rows.reward}
  testing.check_algorithm(_toy(diagnose=diagnose), None, helpers.SPEC)


class _Host:
  """Python state that jit does not see."""

  count = 0


def _impure(update, state, batch):
  _Host.count += 1
  state, metrics = update(state, batch)
  return state, {**metrics, 'a/calls': jnp.float32(_Host.count)}


def _other_dtype(update, state, batch):
  state, metrics = update(state, batch)
  return state.replace(step=state.step.astype(jnp.float32)), metrics


def _weak_type(update, state, batch):
  """Equal shape and dtype, but traced anew when it comes back."""
  state, metrics = update(state, batch)
  return state.replace(step=jnp.where(state.step > 0, 1, 0)), metrics


def _grows(update, state, batch):
  state, metrics = update(state, batch)
  return state.replace(extras={'more': jnp.ones(2)}), metrics


def _nan(update, state, batch):
  state, metrics = update(state, batch)
  return state, {**metrics, 'a/nan': jnp.log(-jnp.ones(()))}


def _vector_metric(update, state, batch):
  state, metrics = update(state, batch)
  return state, {**metrics, 'a/vector': jnp.ones(2)}


def _new_key(update, state, batch):
  state, metrics = update(state, batch)
  return state.replace(key=jax.random.split(state.key)[0]), metrics


def _no_count(update, state, batch):
  return update(state.replace(step=state.step - 1), batch)


def _idle(update, state, batch):
  return state.replace(step=state.step + 1), update(state, batch)[1]


@pytest.mark.parametrize(
  'changes, message',
  [
    (dict(update=_impure), 'vmap over seeds'),
    (dict(update=_other_dtype), 'another form|traces'),
    (dict(update=_weak_type), 'traces'),
    (dict(update=_grows), 'another form|traces'),
    (dict(update=_nan), 'not finite'),
    (dict(update=_vector_metric), 'metric'),
    (dict(update=_new_key), 'root key'),
    (dict(update=_no_count), 'step went'),
    (dict(update=_idle), 'no parameter changed'),
    (dict(finished=lambda s: s.params['w'] > 0), 'expected one bool'),
    (
      dict(begin=lambda s: s.replace(extras=jnp.ones(1))),
      "begin of loop 'online' has another form",
    ),
    (dict(act=lambda p, s, o, k: (p['w'] * jnp.sum(o), s, {})), 'not in'),
    (
      dict(act=lambda p, s, o, k: (jnp.zeros((1, 2)), s, {})),
      'action of shape',
    ),
    (dict(act=lambda p, s, o, k: (jnp.zeros(2), s[None], {})), 'after act'),
    (dict(act=lambda p, s, o, k: (jnp.zeros(2), {})), 'returns'),
    (
      dict(
        adapt=lambda p, s, c, v, k: jnp.sum(c.action[:, 0] * v),
        keep=lambda t: t._replace(action=0.0 * t.action),
      ),
      'what keep leaves',
    ),
    (dict(keep=lambda t: t._replace(reward=0.0 * t.reward)), 'reward'),
    (dict(adapt=lambda p, s, c, v, k: jnp.sum(c.reward)), 'nothing valid'),
    (
      dict(
        adapt=lambda p, s, c, v, k: jnp.where(
          jnp.any(v > 0), jnp.sum(c.reward), 0.0
        )
      ),
      'valid is 0',
    ),
    (dict(observe=lambda p, s, t, k: t.reward[None]), 'after observe'),
    (dict(observe=lambda p, s, t, k: s / 0.0 * 0.0), 'observe'),
    (
      dict(posterior=lambda p, c, v: (jnp.ones(1), jnp.ones(1))),
      'posterior of nothing',
    ),
    (dict(relabel=lambda s, c, v, d, k: d.reward), 'poisoned'),
    (dict(relabel=lambda s, c, v, d, k: d.action), 'relabel'),
    (dict(diagnose=lambda s, e: {'a': e.own.action}), r"'a' has shape \[3"),
    (dict(diagnose=lambda s, e: {'a': jnp.log(-1.0)}), 'diagnose.*not finite'),
  ],
)
def test_broken_algorithms_are_rejected(changes, message):
  with pytest.raises(AssertionError, match=message):
    testing.check_algorithm(_toy(**changes), None, helpers.SPEC)
