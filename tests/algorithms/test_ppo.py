"""PPO: its data, losses and updates against numpy, and what it learns."""

import dataclasses
import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference
import pytest

from offmeta import envs, optim, parallel, rollout, testing
from offmeta.algorithms import ppo
from offmeta.testing import probes
from offmeta.types import MetaBatch

CONFIG = ppo.Config(
  actor_hidden=(8,),
  value_hidden=(6,),
  initial_std=0.5,
  discount=0.8,
  gae_lambda=0.7,
  reward_scale=2.0,
  entropy_weight=0.1,
  num_envs=4,
  num_steps=6,
  num_epochs=3,
  num_minibatches=2,
)
_FAMILY = probes.AimFamily(episode_length=4)
_NETWORKS = ppo.make_networks(_FAMILY.spec, CONFIG)


@functools.cache
def _state(seed=0):
  @jax.jit
  def init(key):
    keys = jax.random.split(key, 3)
    return keys[2], {
      'actor': _NETWORKS.actor.init(keys[0]),
      'value': _NETWORKS.value.init(keys[1]),
    }

  key, params = init(jax.random.key(seed))
  params = helpers.shaken(params, seed)
  return _first_state(key, params)


@jax.jit
def _first_state(key, params):
  return optim.first_state(key, params, ppo.make_optimizers(CONFIG))


def _batch(query, slots=None):
  slots = np.arange(query.reward.shape[0]) if slots is None else slots
  return MetaBatch(0 * slots, slots, None, None, query)


def _collect(family, state, num_steps=6):
  """Steps [4, T] of the policy in four environments of one task."""
  policy = ppo.explore(_NETWORKS)
  tasks = {'slope': jnp.full((4,), 0.5)}
  args = family, policy, state.params['actor']
  actors = rollout.start_actors(*args, tasks, jax.random.key(1))
  return rollout.continue_rollout(
    *args, actors, tasks, num_steps, jax.random.key(2)
  )[1]


@pytest.fixture(scope='module')
def fresh():
  """A state, and what its policy has just collected, in numpy."""
  state = _state()
  steps = jax.jit(functools.partial(_collect, _FAMILY))(state)
  return state, jax.device_get(steps)


_update = jax.jit(
  lambda state, batch, config=CONFIG: ppo.update(
    state, batch, _NETWORKS, config, None
  ),
  static_argnums=2,
)
_prepare = jax.jit(
  lambda params, steps: ppo.prepare(params, steps, _NETWORKS, CONFIG)
)


# The policy and its data.


def test_the_policy_says_what_it_sampled(fresh):
  state, steps = fresh
  mean, log_std = _actor(state.params['actor'], steps.observation)
  sample = np.asarray(steps.extras['sample'])
  np.testing.assert_array_equal(steps.action, np.clip(sample, -1.0, 1.0))
  assert np.any(np.abs(sample) > 1.0) and np.any(np.abs(sample) < 1.0)
  expected = -0.5 * ((sample - mean) / np.exp(log_std)) ** 2
  expected -= log_std + 0.5 * np.log(2 * np.pi)
  np.testing.assert_allclose(
    steps.extras['log_prob'], expected.sum(-1), rtol=1e-4, atol=1e-5
  )
  action, _, said = jax.jit(ppo.evaluate(_NETWORKS).act)(
    state.params['actor'], (), steps.observation[0, 0], jax.random.key(0)
  )
  np.testing.assert_allclose(action, mean[0, 0], rtol=1e-4)
  assert said == {}


def _mlp(params, observation):
  """[E, T, O] -> [E, T, .]."""
  return np.stack(
    [numpy_reference.mlp(params, x) for x in observation.reshape(-1, 2)]
  ).reshape(observation.shape[:2] + (-1,))


def _actor(params, observation):
  mean = np.tanh(_mlp(params['mean'], observation))
  return mean, np.broadcast_to(np.asarray(params['log_std']), mean.shape)


def _value(params, observation):
  return _mlp(params, observation)[..., 0]


# The losses.


def _advantage(steps, params):
  """GAE as a backward loop in numpy, with V of the true last observation."""
  value = _value(params, steps.observation)
  after = _value(params, steps.next_observation)
  result, later = np.zeros_like(value), np.zeros(len(value))
  for t in reversed(range(value.shape[1])):
    goes_on = np.asarray(steps.discount[:, t])
    delta = 2.0 * np.asarray(steps.reward[:, t]) - value[:, t]
    delta = delta + 0.8 * goes_on * after[:, t]
    ends = (goes_on == 0) | (np.asarray(steps.extras['truncated'][:, t]) > 0)
    later = delta + 0.8 * 0.7 * np.where(ends, 0.0, later)
    result[:, t] = later
  return value, result


@pytest.mark.parametrize('terminates', [False, True])
def test_advantages_of_both_kinds_of_ends(terminates):
  """The same episodes, cut or over after four steps."""
  state = _state()
  family = probes.AimFamily(episode_length=4, terminates=terminates)
  steps = jax.device_get(jax.jit(functools.partial(_collect, family))(state))
  ends = np.arange(6) % 4 == 3
  kept = 1.0 - steps.discount[0] if terminates else steps.extras['truncated'][0]
  np.testing.assert_array_equal(kept, ends)
  found = _prepare(state.params, steps)
  value, advantage = _advantage(steps, state.params['value'])
  np.testing.assert_allclose(found.value, value, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(found.advantage, advantage, rtol=1e-4, atol=1e-4)


def test_nothing_has_changed_at_the_first_minibatch(fresh):
  """The ratio is 1: the policy's gradient is the plain policy gradient."""
  state, steps = fresh
  data = jax.device_get(_prepare(state.params, steps))
  config = dataclasses.replace(CONFIG, entropy_weight=0.0)

  def actor_loss(params, clip):
    terms, logs = ppo.losses(
      params,
      data,
      data.advantage,
      _NETWORKS,
      dataclasses.replace(config, clip=clip),
    )
    return terms['actor'], logs

  def plain(params):
    log_prob = _NETWORKS.actor.apply(
      params['actor'], steps.observation
    ).log_prob(data.sample)
    return -jnp.mean(log_prob * data.advantage)

  gradient, logs = jax.jit(
    jax.grad(actor_loss, has_aux=True), static_argnums=1
  )(state.params, 0.2)
  helpers.assert_close(
    gradient, jax.jit(jax.grad(plain))(state.params), 1e-3, 1e-5
  )
  np.testing.assert_allclose(
    logs['actor/loss'], -np.mean(data.advantage), rtol=1e-5
  )
  assert float(logs['actor/kl']) < 1e-6 and float(logs['actor/clipped']) == 0


@pytest.mark.parametrize('clip_value', [False, True])
def test_losses_against_numpy(fresh, clip_value):
  """Under other parameters than those that acted."""
  state, steps = fresh
  data = jax.device_get(_prepare(state.params, steps))
  params = _state(seed=1).params
  config = dataclasses.replace(CONFIG, clip_value=clip_value)
  advantage = np.linspace(-1.0, 2.0, 24, dtype=np.float32).reshape(4, 6)
  losses = lambda p: ppo.losses(p, data, advantage, _NETWORKS, config)
  (terms, logs), gradients = jax.jit(
    lambda p: (losses(p), jax.jacrev(lambda p: losses(p)[0])(p))
  )(params)

  mean, log_std = _actor(params['actor'], steps.observation)
  log_prob = np.sum(
    -0.5 * ((data.sample - mean) / np.exp(log_std)) ** 2
    - log_std
    - 0.5 * np.log(2 * np.pi),
    axis=-1,
  )
  ratio = np.exp(log_prob - data.log_prob)
  assert np.any(ratio > 1.2) and np.any(ratio < 0.8)
  gain = np.minimum(ratio * advantage, np.clip(ratio, 0.8, 1.2) * advantage)
  entropy = np.mean(np.sum(log_std + 0.5 * np.log(2 * np.pi * np.e), axis=-1))
  np.testing.assert_allclose(
    terms['actor'], -np.mean(gain) - 0.1 * entropy, rtol=1e-4
  )
  np.testing.assert_allclose(
    logs['actor/clipped'], np.mean(np.abs(ratio - 1) > 0.2), rtol=1e-5
  )
  value, target = (
    _value(params['value'], steps.observation),
    (data.value + data.advantage),
  )
  error = (value - target) ** 2
  if clip_value:
    near = data.value + np.clip(value - data.value, -0.2, 0.2)
    error = np.maximum(error, (near - target) ** 2)
  np.testing.assert_allclose(terms['value'], np.mean(error), rtol=1e-4)
  # Each term reaches its own network only.
  for name, other in (('actor', 'value'), ('value', 'actor')):
    assert helpers.largest(gradients[name][name]) > 0
    assert helpers.largest(gradients[name][other]) == 0


# The update.


def test_every_epoch_sees_every_step_once(fresh):
  """Minibatches hold as many steps of every environment, in a new order."""
  _, steps = fresh
  names = np.arange(24, dtype=np.float32).reshape(4, 6, 1)
  seen = []
  spied = _NETWORKS._replace(
    value=_NETWORKS.value._replace(
      apply=lambda params, observation: (
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), observation)
        or params * observation[..., 0]
      )
    ),
    actor=_NETWORKS.actor._replace(
      apply=lambda params, observation: _NETWORKS.actor.apply(
        params, jnp.repeat(observation, 2, axis=-1)
      )
    ),
  )
  params = {
    'actor': _state().params['actor'],
    'value': np.ones((), np.float32),
  }
  state = _first_state(jax.random.key(0), params)
  query = steps._replace(observation=names, next_observation=names)
  jax.jit(lambda s, b: ppo.update(s, b, spied, CONFIG, None))(
    state, _batch(query)
  )
  jax.effects_barrier()
  parts = [x[..., 0] for x in seen if x.shape == (4, 3, 1)]
  assert len(parts) == 6
  epochs = [np.concatenate(parts[i : i + 2], axis=1) for i in (0, 2, 4)]
  for epoch in epochs:
    np.testing.assert_array_equal(np.sort(epoch, axis=1), names[..., 0])
  orders = {tuple(row - row.min()) for epoch in epochs for row in epoch}
  assert len(orders) > 9  # of 12: drawn per environment and epoch


def test_one_device_and_many(fresh):
  """Tasks shared out: each device has two of the four environments."""
  state, steps = fresh
  layout = parallel.make_layout(1, 2, max_devices=2, share='tasks')
  axis = layout.axis_name

  def shared(state, steps):
    slots = parallel.local_slots(4, axis)
    query = jax.tree.map(lambda x: x[slots], steps)
    return ppo.update(state, _batch(query, slots), _NETWORKS, CONFIG, axis)

  add = jax.jit(lambda tree: jax.tree.map(lambda x: x[None], tree))
  found = layout.compile(shared, (0, 0))(add(state), add(steps))
  helpers.assert_close(
    jax.jit(lambda tree: jax.tree.map(lambda x: x[0], tree))(found),
    _update(state, _batch(steps)),
    1e-4,
    1e-5,
  )


@pytest.mark.parametrize('where', ['batch', 'none'])
def test_standardised_elsewhere(fresh, where):
  """One epoch of one minibatch: 'batch' is 'minibatch', 'none' is not."""
  state, steps = fresh
  config = dataclasses.replace(CONFIG, num_epochs=1, num_minibatches=1)
  other = dataclasses.replace(config, standardise=where)
  a, b = [_update(state, _batch(steps), c)[0].params for c in (config, other)]
  helpers.assert_close(a['value'], b['value'], 1e-6)
  same = all(
    np.allclose(x, y, rtol=1e-6)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b))
  )
  assert same == (where == 'batch')


# Learning.


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _learn(family, config, iterations, task, key):
  """A state after so many iterations in environments of one task."""
  networks = ppo.make_networks(family.spec, config)
  params = {
    'actor': networks.actor.init(key),
    'value': networks.value.init(key),
  }
  state = optim.first_state(key, params, ppo.make_optimizers(config))
  tasks = jax.tree.map(
    lambda x: jnp.broadcast_to(x, (config.num_envs, *x.shape)), task
  )
  policy = ppo.explore(networks)
  start = rollout.start_actors(
    family, policy, state.params['actor'], tasks, key
  )

  def body(carry, key):
    state, actors = carry
    actors, steps = rollout.continue_rollout(
      family,
      policy,
      state.params['actor'],
      actors,
      tasks,
      config.num_steps,
      key,
    )
    state, _ = ppo.update(state, _batch(steps), networks, config, None)
    return (state, actors), jnp.mean(steps.reward)

  keys = jax.random.split(key, iterations)
  (state, _), rewards = jax.lax.scan(body, (state, start), keys)
  return state, rewards


@pytest.mark.parametrize('terminates', [False, True])
def test_it_learns_a_known_answer(terminates):
  """Action = slope * mark; cut episodes are worth 1 / (1 - gamma) at any time,
  those that are over what is left."""
  family = probes.AimFamily(episode_length=4, terminates=terminates)
  config = ppo.Config(
    actor_hidden=(16,),
    value_hidden=(16,),
    initial_std=0.5,
    actor_lr=1e-2,
    value_lr=1e-2,
    discount=0.8,
    num_envs=16,
    num_steps=16,
    num_epochs=4,
    num_minibatches=4,
  )
  state, rewards = _learn(
    family, config, 60, {'slope': np.float32(0.7)}, jax.random.key(0)
  )
  rewards = np.asarray(rewards)
  assert rewards[0] < 0.7 and rewards[-1] > 0.97
  networks = ppo.make_networks(family.spec, config)
  mark, time = np.meshgrid(np.linspace(-0.7, 0.7, 8), np.arange(4) / 4)
  observation = np.float32(np.stack([mark, time], axis=-1))
  mean, value = jax.jit(
    lambda params: (
      networks.actor.apply(params['actor'], observation).mean[..., 0],
      networks.value.apply(params['value'], observation),
    )
  )(state.params)
  np.testing.assert_allclose(mean, 0.7 * mark, atol=0.1)
  left = 1 - 0.8 ** (4 * (1 - time)) if terminates else np.ones_like(time)
  np.testing.assert_allclose(value, left / 0.2, rtol=0.1)


def test_it_learns_one_task_of_the_point_robot():
  """The best return there is: full speed along each axis, then rest."""
  family = envs.make('point_robot')
  task = envs.take_tasks(jax.device_get(family.task_list('default')[0]), 0)
  config = ppo.Config(
    actor_hidden=(32, 32),
    value_hidden=(32, 32),
    initial_std=0.5,
    actor_lr=3e-3,
    value_lr=3e-3,
    discount=0.9,
    num_envs=16,
    num_steps=40,
    num_epochs=8,
    num_minibatches=4,
  )
  state, _ = _learn(family, config, 40, task, jax.random.key(0))
  policy = ppo.evaluate(ppo.make_networks(family.spec, config))
  returns = jax.jit(
    jax.vmap(
      lambda key: jnp.sum(
        rollout.episode(family, policy, state.params['actor'], (), task, key)[
          1
        ].reward
      )
    )
  )(jax.random.split(jax.random.key(1), 32))
  best = _best_return(np.asarray(task['goal']))
  assert np.mean(returns) > best - 1.0, (np.mean(returns), best)


def _best_return(goal):
  """From the origin, 0.1 per axis and step at most; reward -distance."""
  left, total = np.abs(goal), 0.0
  for _ in range(20):
    left = np.maximum(left - 0.1, 0.0)
    total -= np.linalg.norm(left)
  return total


# The contract, and settings.


def test_contract():
  testing.check_algorithm(ppo.make, CONFIG, _FAMILY.spec)


@pytest.mark.parametrize(
  'changes, message',
  [
    (dict(num_minibatches=5), '5 does not divide the num_steps=6'),
    (dict(standardise='no'), "standardise: 'no'; choose"),
    (dict(clip=0.0), 'ppo.clip: must be above 0'),
  ],
)
def test_settings_that_cannot_be(changes, message):
  with pytest.raises(ValueError, match=message):
    ppo.validate(dataclasses.replace(CONFIG, **changes))


def test_published_defaults():
  """Table 3 of the paper; the optimiser's epsilon is that of the authors."""
  c = ppo.Config()
  ppo.validate(c)
  assert c.actor_hidden == c.value_hidden == (64, 64)
  assert c.actor_lr == c.value_lr == 3e-4 and c.adam_eps == 1e-5
  assert (c.discount, c.gae_lambda, c.clip) == (0.99, 0.95, 0.2)
  assert c.num_envs * c.num_steps == 2048 and c.num_epochs == 10
  assert c.num_envs * c.num_steps // c.num_minibatches == 64
