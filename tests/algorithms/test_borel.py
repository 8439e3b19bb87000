"""BOReL: both stages against numpy, the belief along logs and while acting."""

import dataclasses
import functools
import itertools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference
import pytest
import recurrent_reference as reference

from offmeta import testing
from offmeta.algorithms import borel, latent, sac
from offmeta.networks.distributions import (
  ShiftedTanhNormal,
  TanhNormal,
  task_noise,
)
from offmeta.testing import probes
from offmeta.types import (
  BatchSpec,
  MetaBatch,
  Problem,
  Rows,
  Sequences,
)

SPEC = helpers.SPEC  # episodes of 5 steps
_T = 10  # two of them
CONFIG = borel.Config(
  latent_size=2,
  gru_size=6,
  observation_embedding=5,
  action_embedding=3,
  reward_embedding=4,
  decoder_hidden=(5, 4),
  kl_weight=0.3,
  vae=borel.VaeConfig(
    num_updates=4, num_tasks=2, num_sequences=2, learning_rate=0.01
  ),
  rl=borel.RlConfig(
    critic_hidden=(7,),
    actor_hidden=(6,),
    critic_lr=0.02,
    actor_lr=0.01,
    temperature_lr=0.05,
    target_rate=0.1,
    num_updates=4,
    num_tasks=2,
    batch_size=3,
  ),
)
# Lengths of the episodes of each sequence. That of 2 steps terminates, what
# follows the others is unknown or a time limit.
_EPISODES = ((5, 5), (2, 4), (5, 3), (1,))
_NETWORKS = borel.make_networks(SPEC, CONFIG)


# In numpy, and each function of jax compiled once: outside jit, jax compiles a
# program for every operation and shape.


@functools.cache
def _sequences():
  """Steps [4, T] with the episodes above, and their mask."""
  steps = helpers.random_transitions(1, SPEC, (len(_EPISODES), _T))
  time = np.zeros((len(_EPISODES), _T), np.float32)
  discount = np.ones_like(time)
  mask = np.zeros_like(time)
  for i, lengths in enumerate(_EPISODES):
    taken = np.concatenate([np.arange(length) for length in lengths])
    time[i, : len(taken)], mask[i, : len(taken)] = taken, 1.0
  discount[1, 1] = 0.0
  return steps._replace(discount=discount, extras={'time': time}), mask


@pytest.fixture(name='state', scope='module')
def _state():
  state = jax.jit(borel.make(Problem(SPEC), CONFIG).init)(jax.random.key(0))
  params = helpers.shaken(
    {k: state.params[k] for k in ('vae', 'critic', 'actor')}
  )
  return state.replace(
    params={**state.params, **params},
    target_params=helpers.shaken(state.target_params, 1),
  )


# The paper's ELBO, one time and one step at a time.


def _flags(steps, i):
  """What is appended to s and to s' of every step of sequence i."""
  time = np.asarray(steps.extras['time'][i])
  begins = [float(t > 0 and time[t] == 0) for t in range(_T)]
  ends = [
    float(time[t] >= SPEC.episode_length - 1 or steps.discount[i, t] == 0)
    for t in range(_T)
  ]
  return begins, ends


def _inputs(steps, i, t, flags):
  """(s, a, s') of one step."""
  begins, ends = flags
  return (
    np.append(steps.observation[i, t], begins[t]),
    steps.action[i, t],
    np.append(steps.next_observation[i, t], ends[t]),
  )


def _beliefs(encoder, steps, mask, i):
  """[(mean, log-variance)] before the first step and after each."""
  h, flags = np.zeros(CONFIG.gru_size), _flags(steps, i)
  found = [reference.read(encoder, h)]
  for t in range(int(mask[i].sum())):
    _, action, s2 = _inputs(steps, i, t, flags)
    h = reference.gru_step(encoder, h, s2, action, float(steps.reward[i, t]))
    found.append(reference.read(encoder, h))
  return found


def _kl(p, q):
  (mean_p, log_p), (mean_q, log_q) = p, q
  return 0.5 * np.sum(
    log_q - log_p - 1 + (np.exp(log_p) + (mean_p - mean_q) ** 2) / np.exp(log_q)
  )


def _elbo(params, steps, mask, noise, config):
  """The two terms, and the mean squared error of one decoded reward.

  The noise is 'order' [4, T + 1] and 'latent' [4, D, Z]. The reward term is a
  mean over the steps that are decoded and a sum over the times.
  """
  rewards, kls, errors = [], [], []
  for i in range(len(_EPISODES)):
    q = _beliefs(params['encoder'], steps, mask, i)
    prior = (np.zeros(2), np.zeros(2))
    kls.append(sum(_kl(p, b) for p, b in zip(q, [prior] + q[:-1])))
    # The times with the largest numbers are decoded.
    chosen = np.argsort(-np.asarray(noise['order'][i, : len(q)]))
    chosen = chosen[: noise['latent'].shape[1]]
    flags, steps_decoded = _flags(steps, i), int(mask[i].sum())
    of_times = []
    for t, e in zip(chosen, np.asarray(noise['latent'][i], np.float64)):
      mean, log_variance = q[t]
      z = mean + np.exp(log_variance / 2) * e
      squared = []
      for k in range(steps_decoded):  # the past and the future
        decoded = reference.decode(
          params['decoder'],
          z,
          *_inputs(steps, i, k, flags),
          config.decode_whole_step,
        )
        squared.append((decoded - float(steps.reward[i, k])) ** 2)
      of_times.append(np.mean(squared))
    rewards.append(np.mean(of_times) * len(q))
    errors.append(np.mean(of_times))
  return {
    'reward': np.mean(rewards),
    'kl': config.kl_weight * np.mean(kls),
  }, np.mean(errors)


@functools.partial(jax.jit, static_argnums=1)
def _noise(state, number):
  """What an update draws, and the same for sequences in one row."""
  keys = [
    latent.slot_keys(state.key, state.step, jnp.arange(2), i) for i in range(2)
  ]
  noise = {
    'latent': task_noise(keys[0], (2, number, 2)),
    'order': jax.vmap(lambda key: jax.random.uniform(key, (2, _T + 1)))(
      keys[1]
    ),
  }
  return jax.tree.map(lambda x: x.reshape((4,) + x.shape[2:]), noise)


def _context_batch():
  """The sequences as the context of two tasks."""
  steps, mask = _sequences()
  flat = lambda x: x.reshape((2, 2 * _T) + x.shape[2:])
  return MetaBatch(
    task_id=np.arange(2),
    slot=np.arange(2),
    context=jax.tree.map(flat, steps),
    context_mask=flat(mask),
    query=None,
  )


@pytest.mark.parametrize(
  'num_decoded, whole_step', [(0, True), (4, True), (0, False)]
)
def test_vae_losses_against_numpy(num_decoded, whole_step):
  """In a whole update; 4 times are more than the shortest sequence has."""
  config = dataclasses.replace(
    CONFIG,
    decode_whole_step=whole_step,
    vae=dataclasses.replace(CONFIG.vae, num_decoded=num_decoded),
  )
  algorithm = borel.make(Problem(SPEC), config)
  state = jax.jit(algorithm.init)(jax.random.key(0))
  state = state.replace(params=helpers.shaken(state.params))
  after, logs = jax.jit(algorithm.loop('offline').stages[0].update)(
    state, _context_batch()
  )
  steps, mask = _sequences()
  noise = jax.device_get(_noise(state, num_decoded or _T + 1))
  elbo = lambda params: _elbo(params, steps, mask, noise, config)
  expected, error = elbo(state.params['vae'])
  np.testing.assert_allclose(
    logs['decoder/loss'], expected['reward'], rtol=2e-5
  )
  np.testing.assert_allclose(
    0.3 * np.asarray(logs['encoder/kl']), expected['kl'], rtol=2e-5
  )
  np.testing.assert_allclose(logs['decoder/squared_error'], error, rtol=2e-5)
  # Adam's first moment is a tenth of the gradient.
  leaves, structure = jax.tree.flatten(state.params['vae'])
  rng = np.random.default_rng(0)
  direction = [rng.normal(size=x.shape) for x in leaves]
  at = lambda step: sum(
    elbo(
      jax.tree.unflatten(
        structure,
        [
          np.asarray(x, np.float64) + step * d
          for x, d in zip(leaves, direction)
        ],
      )
    )[0].values()
  )
  moments = jax.tree.leaves(after.opt_state['vae'][0].mu)
  np.testing.assert_allclose(
    10 * sum(np.sum(np.asarray(m) * d) for m, d in zip(moments, direction)),
    (at(1e-6) - at(-1e-6)) / 2e-6,
    rtol=1e-3,
  )


def test_fewer_decoded_times_are_unbiased(state):
  """Exactly: averaged over all orders, each of which is equally likely."""
  steps, mask = jax.tree.map(lambda x: x[1:, :4], _sequences())
  mask = mask.copy()
  mask[1, 2:] = 0.0  # 4, 2 and 1 steps
  orders = np.float32(list(itertools.permutations(np.arange(5) / 5)))

  @jax.jit
  def reward(order, number):
    noise = {'order': jnp.broadcast_to(order, (3, 5)), 'latent': 0.0 * number}
    return borel.vae_losses(
      state.params['vae'], steps, mask, noise, _NETWORKS, CONFIG
    )[0]['reward']

  whole = float(reward(orders[0], np.zeros((3, 5, 2), np.float32)))
  all_orders = jax.jit(jax.vmap(reward, (0, None)))
  for number in (1, 2, 3):
    some = np.asarray(all_orders(orders, np.zeros((3, number, 2), np.float32)))
    assert some.std() > 2e-3 * whole
    np.testing.assert_allclose(some.mean(), whole, rtol=1e-5)


def test_reward_term_does_not_grow_with_the_steps_decoded(state):
  """Only with the times: a sum would make the KL weigh T times less."""
  encoder, decoder = (
    state.params['vae']['encoder'],
    {
      'params': jax.tree.map(
        np.zeros_like, state.params['vae']['decoder']['params']
      )
    },
  )
  steps, _ = _sequences()
  steps = steps._replace(reward=np.full_like(steps.reward, 2.0))

  @jax.jit
  def reward(length):
    mask = jnp.broadcast_to(1.0 * (jnp.arange(_T) < length), (4, _T))
    noise = {
      'order': jnp.zeros((4, _T + 1)).at[:, 0].set(1.0),
      'latent': jnp.zeros((4, _T + 1, 2)),
    }
    terms, _ = borel.vae_losses(
      {'encoder': encoder, 'decoder': decoder},
      steps,
      mask,
      noise,
      _NETWORKS,
      CONFIG,
    )
    return terms['reward']

  # Every error is 2^2, at length + 1 times.
  np.testing.assert_allclose(reward(4), 4.0 * 5, rtol=1e-6)
  np.testing.assert_allclose(reward(10), 4.0 * 11, rtol=1e-6)


def test_gradient_routing(state):
  """'reward' reaches encoder and decoder, 'kl' the encoder alone."""
  steps, mask = _sequences()
  noise = _noise(state, 3)
  found = jax.jit(
    jax.jacrev(
      lambda params: borel.vae_losses(
        params, steps, mask, noise, _NETWORKS, CONFIG
      )[0]
    )
  )(state.params['vae'])
  reached = {
    term: {part for part, tree in parts.items() if helpers.largest(tree) > 1e-4}
    for term, parts in found.items()
  }
  assert reached == {'reward': {'encoder', 'decoder'}, 'kl': {'encoder'}}
  assert helpers.largest(found['kl']['decoder']) == 0.0


# The belief along a log.


_ALGORITHM = borel.make(Problem(SPEC), CONFIG)
_annotate = jax.jit(
  jax.vmap(_ALGORITHM.loop('offline').stages[1].annotate, (None, 0, 0))
)


def _annotated(state):
  steps, mask = _sequences()
  return steps, mask, jax.device_get(_annotate(state, steps, mask))


def test_annotations_against_numpy(state):
  steps, mask, found = _annotated(state)
  encoder = state.params['vae']['encoder']
  for i, lengths in enumerate(_EPISODES):
    q = [np.concatenate(b) for b in _beliefs(encoder, steps, mask, i)]
    rows = sum(lengths)
    np.testing.assert_allclose(
      found['belief'][i, :rows], q[:-1], rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(
      found['next_belief'][i, :rows], q[1:], rtol=1e-4, atol=1e-5
    )
    for t in range(rows):
      begins = len(lengths) > 1 and t == lengths[0]
      follows = len(lengths) > 1 and t == lengths[0] - 1
      assert found['begins'][i, t] == begins
      assert found['next_begins'][i, t] == follows
      np.testing.assert_array_equal(
        found['next_observation'][i, t],
        steps.observation[i, t + 1]
        if follows
        else steps.next_observation[i, t],
      )


_observe = jax.jit(_ALGORITHM.evaluate.observe)
_adapt = jax.jit(_ALGORITHM.evaluate.adapt)
_init = jax.jit(_ALGORITHM.evaluate.init)
_read = jax.jit(
  lambda params, belief: _NETWORKS.tracker.encoder.read(
    params['encoder'], belief.hidden
  )
)


@pytest.mark.parametrize('i', [0, 1])
def test_acting_follows_the_annotations(state, i):
  """Step by step, with an adaptation between the episodes."""
  steps, mask, found = _annotated(state)
  params = _ALGORITHM.actor_params(state)
  row = jax.tree.map(lambda x: x[i], steps)
  key = jax.random.key(0)
  belief = _init(params, key)
  for t in range(sum(_EPISODES[i])):
    if t == _EPISODES[i][0]:
      valid = np.arange(_T) < t
      belief = _adapt(params, _init(params, key), row, valid, key)
    assert float(belief.begins) == found['begins'][i, t]
    np.testing.assert_allclose(
      _read(params, belief), found['belief'][i, t], rtol=1e-5, atol=1e-6
    )
    step = jax.tree.map(lambda x, t=t: x[t], row)
    belief = _observe(params, belief, step, key)
    np.testing.assert_allclose(
      _read(params, belief), found['next_belief'][i, t], rtol=1e-5, atol=1e-6
    )
  assert helpers.largest(found['belief'][i, 1:3] - found['belief'][i, 0]) > 0.1


def test_policies(state):
  """tanh(mean) of the actor on (s, boundary, mean, log-variance)."""
  algorithm = _ALGORITHM
  params = algorithm.actor_params(state)
  steps, mask = _sequences()
  row = jax.tree.map(lambda x: x[0], steps)
  key = jax.random.key(0)
  belief = _adapt(params, _init(params, key), row, mask[0], key)
  assert float(belief.begins) == 1.0
  q = np.concatenate(_beliefs(params['encoder'], steps, mask, 0)[-1])
  observation = np.float32([0.5, -1.0, 2.0])
  act = jax.jit(algorithm.evaluate.act)
  explore = jax.jit(
    jax.vmap(
      lambda k, b: algorithm.explore.act(params, b, observation, k)[0],
      (0, None),
    )
  )
  for begins in (1.0, 0.0):
    belief = belief._replace(begins=np.float32(begins))
    mean, log_std = numpy_reference.normal_tanh(
      params['actor'], np.concatenate([observation, [begins], q]), []
    )
    action, _, _ = act(params, belief, observation, key)
    np.testing.assert_allclose(action, np.tanh(mean), rtol=1e-4, atol=1e-5)
    samples = explore(jax.random.split(key, 2000), belief)
    below = np.mean(
      np.asarray(samples) < np.tanh(mean + 0.5 * np.exp(log_std)), axis=0
    )
    np.testing.assert_allclose(below, 0.6915, atol=0.05)
  assert algorithm.posterior is None and algorithm.in_phase('online') == ()


# RL on the belief MDP.


def _query_batch(state):
  """Three annotated steps of two tasks; among them ends and a beginning."""
  steps, _, extras = _annotated(state)
  full = steps._replace(extras={**steps.extras, **extras})
  where = (np.array([[0, 0, 0], [1, 1, 2]]), np.array([[4, 5, 9], [1, 3, 4]]))
  query = jax.tree.map(lambda x: x[where], full)
  return MetaBatch(
    task_id=np.arange(2),
    slot=np.arange(2),
    context=None,
    context_mask=None,
    query=query,
  )


def test_rl_losses_against_numpy(state):
  batch = _query_batch(state)
  query, extras = batch.query, batch.query.extras
  after, logs = jax.jit(
    borel.make(Problem(SPEC), CONFIG).loop('offline').stages[1].update
  )(state, batch)
  after, logs = jax.device_get((after, logs))
  noise = jax.device_get(
    jax.jit(
      lambda: [
        task_noise(
          latent.slot_keys(state.key, state.step, batch.slot, i), (3, 2)
        )
        for i in range(2)
      ]
    )()
  )
  params, alpha = state.params, CONFIG.rl.temperature

  def act(s, e):
    mean, log_std = numpy_reference.normal_tanh(params['actor'], s, [])
    x = mean + np.exp(log_std) * np.asarray(e, np.float64)
    return np.tanh(x), numpy_reference.tanh_log_prob(
      x, mean, log_std, 'shifted'
    )

  critic, actor = [], []
  for m in range(2):
    for b in range(3):
      s = np.concatenate(
        [
          query.observation[m, b],
          [extras['begins'][m, b]],
          extras['belief'][m, b],
        ]
      )
      s2 = np.concatenate(
        [
          extras['next_observation'][m, b],
          [extras['next_begins'][m, b]],
          extras['next_belief'][m, b],
        ]
      )
      a2, log_prob = act(s2, noise[1][m, b])
      y = float(query.reward[m, b]) + 0.99 * float(query.discount[m, b]) * (
        numpy_reference.min_q(state.target_params, s2, a2, [])
        - alpha * log_prob
      )
      critic.append(
        sum(
          (numpy_reference.mlp(c, s, query.action[m, b])[0] - y) ** 2
          for c in params['critic']
        )
      )
      own, log_prob = act(s, noise[0][m, b])
      actor.append(
        alpha * log_prob - numpy_reference.min_q(params['critic'], s, own, [])
      )
  np.testing.assert_allclose(logs['critic/loss'], np.mean(critic), rtol=2e-5)
  np.testing.assert_allclose(logs['actor/loss'], np.mean(actor), rtol=2e-5)
  np.testing.assert_allclose(logs['temperature/alpha'], 0.2, rtol=1e-6)
  helpers.assert_close(
    after.target_params,
    jax.tree.map(
      lambda t, c: 0.9 * t + 0.1 * c,
      state.target_params,
      after.params['critic'],
    ),
    rtol=1e-5,
    atol=1e-6,
  )


def test_rl_networks_start_as_released():
  """Hidden biases of 0.1, and the shifted tanh correction; SAC has neither."""
  key, observation = jax.random.key(0), np.ones(3 + 1 + 2 * 2, np.float32)
  of_sac = sac.make_networks(
    SPEC._replace(observation_shape=observation.shape), sac.Config()
  )
  for networks, bias, kind in (
    (_NETWORKS, 0.1, ShiftedTanhNormal),
    (of_sac, 0.0, TanhNormal),
  ):

    @jax.jit
    def run(key, networks=networks):
      actor = networks.actor.init(key)
      made = networks.actor.apply(actor, observation)
      return (actor, *networks.critic.init(key)), made

    everything, made = run(key)
    for params in everything:
      found = params['params']['Dense_0']['bias']
      np.testing.assert_array_equal(found, np.full_like(found, bias))
    assert type(made) is kind


def test_each_stage_trains_its_own_parts(state):
  """The encoder is fixed while the policy trains on its beliefs."""
  everything = {'vae', 'critic', 'actor', 'temperature', 'targets'}

  def changed(config, stage, batch):
    before = state
    after, _ = jax.jit(
      borel.make(Problem(SPEC), config).loop('offline').stages[stage].update
    )(before, batch)
    found = set()
    for name in everything:
      pairs = [(before.target_params, after.target_params)]
      if name != 'targets':
        pairs = [
          (before.params[name], after.params[name]),
          (before.opt_state[name], after.opt_state[name]),
        ]
      same = {
        np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, zip(*pairs)))
      }
      assert len(same) == 1, name  # all of it or nothing
      if same == {False}:
        found.add(name)
    return found

  learns = dataclasses.replace(
    CONFIG, rl=dataclasses.replace(CONFIG.rl, learn_temperature=True)
  )
  sequences, queries = _context_batch(), _query_batch(state)
  assert changed(CONFIG, 0, sequences) == {'vae'}
  assert changed(CONFIG, 1, queries) == {'critic', 'actor', 'targets'}
  assert changed(learns, 1, queries) == everything - {'vae'}


# The whole.


def test_contract():
  testing.check_algorithm(borel.make, CONFIG, SPEC)


def test_one_episode_has_no_boundary():
  config = dataclasses.replace(CONFIG, num_episodes=1, relabel_rewards=False)
  algorithm = borel.make(Problem(SPEC), config)
  assert not algorithm.data.mix_rewards
  vae, rl = algorithm.loop('offline').stages
  assert vae.batch.context.length == 5
  key = jax.random.key(0)
  state = jax.eval_shape(algorithm.init, key)
  first = lambda part: part['params']['Dense_0']['kernel'].shape[0]
  assert first(state.params['actor']) == 3 + 4
  assert first(state.params['vae']['encoder']['embed']) == 3
  assert first(state.params['vae']['decoder']) == 3

  def run(state):
    """Everything that sees an observation."""
    for stage in (vae, rl):
      batch = probes.random_batch(key, SPEC, stage.batch, algorithm.data)
      query = batch.query
      if stage.annotate is not None:
        query = query._replace(
          extras={
            **query.extras,
            **jax.vmap(stage.annotate, (None, 0, 0))(
              state, query, jnp.ones_like(query.reward)
            ),
          }
        )
      state, _ = stage.update(state, batch._replace(query=query))
    policy, params = algorithm.evaluate, algorithm.actor_params(state)
    steps = jax.tree.map(lambda x: x[0], query)
    belief = policy.adapt(
      params, policy.init(params, key), steps, jnp.ones(3), key
    )
    return policy.act(params, belief, steps.observation[0], key)[0]

  assert jax.eval_shape(run, state).shape == (2,)


@pytest.mark.parametrize(
  'changes, message',
  [
    (
      dict(num_episodes=0, relabel_rewards=False),
      'num_episodes: must be at least 1, not 0',
    ),
    (dict(num_episodes=1), 'relabel_rewards'),
    (
      dict(vae=borel.VaeConfig(num_decoded=-1)),
      'num_decoded: must be at least 0, not -1',
    ),
  ],
)
def test_settings_that_make_no_sense(changes, message):
  with pytest.raises(ValueError, match=message):
    borel.make(Problem(SPEC), dataclasses.replace(CONFIG, **changes))


def test_published_defaults():
  """Those of the release, cheetah-vel."""
  c = borel.Config()
  assert (c.latent_size, c.gru_size, c.kl_weight) == (5, 128, 0.05)
  assert c.decoder_hidden == (32, 32) and c.decode_whole_step
  assert (c.observation_embedding, c.action_embedding, c.reward_embedding) == (
    32,
    16,
    16,
  )
  assert c.vae.learning_rate == c.rl.critic_lr == c.rl.actor_lr == 3e-4
  assert c.rl.critic_hidden == c.rl.actor_hidden == (256, 256)
  assert (c.rl.temperature, c.rl.learn_temperature) == (0.2, False)
  assert (c.rl.discount, c.rl.target_rate, c.rl.reward_scale) == (
    0.99,
    0.005,
    1.0,
  )
  epoch = -(-2050 // 8) * -(-100 // 4)
  assert c.vae.num_updates == 100 * epoch
  assert c.rl.num_updates == 1000 * 1000
  algorithm = borel.make(Problem(SPEC), c)
  vae, rl = algorithm.loop('offline').stages
  assert (vae.name, rl.name) == ('vae', 'rl')
  assert vae.batch == BatchSpec(4, Rows(1), Sequences(8, 10))
  assert rl.batch == BatchSpec(16, Rows(256))
  assert algorithm.data.sequence_episodes == 2 and algorithm.data.mix_rewards
