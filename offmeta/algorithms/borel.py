"""BOReL: Bayes-optimal behaviour from the logs of single-task learners.

Dorfman, Shenfeld, Tamar: "Offline Meta Reinforcement Learning: Identifiability
Challenges and Effective Data Collection Strategies", NeurIPS 2021, arXiv
2008.02598. Two offline stages: a VAE learns a belief over
the task, q(z | all steps so far), from sequences of several episodes
(VariBAD); then every stored state gets the belief of its moment and SAC runs
on (state, belief) with the encoder fixed. While acting, the belief is updated
in every step and lives on from one episode to the next.

Defaults are the release's for cheetah-vel, all of them (`DIFFERENCES` is
empty). Deviations that are no settings:

* The state that follows an episode's last step is the first one of the next
  episode. In the release it is the last observation, from which the policy
  takes the next episode's first action unseen.
* Tasks and sequences are drawn with replacement, each task's for itself; the
  release takes all in turn, the same sequence numbers for all tasks.
* The release's terminals are 1 inside the goal of its sparse tasks and reset
  the belief; here they are true terminations, and nothing resets it.
* Mixed rewards (`relabel_rewards`, `data.prepare`) are those of the
  task; the release's cheetah-vel writes the task to where its reward function
  does not look.
* Its CQL penalty (off by default) is left out: where CQL has exp(Q) / density
  it has Q / density under the logarithm.
* The gradients of an RL update are taken at the same parameters (see `sac`).
* A context that is handed over is the beginning of a recorded sequence, from
  which the belief goes on; the release has no such test.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from offmeta import limits, optim, parallel
from offmeta.algorithms import belief, latent, sac
from offmeta.losses import (
  latent as latent_losses,
  policy as policy_losses,
  td,
)
from offmeta.networks import recurrent
from offmeta.networks.distributions import task_noise
from offmeta.types import (
  Algorithm,
  Array,
  BatchSpec,
  DataSpec,
  EnvSpec,
  Key,
  LearnerState,
  Loop,
  MetaBatch,
  Network,
  Params,
  Problem,
  Rows,
  Sequences,
  Stage,
  Transition,
)

# Settings whose defaults are not the release's: (here, released, why).
DIFFERENCES = {}


@dataclasses.dataclass(frozen=True)
class VaeConfig:
  """The stage that trains encoder and decoder."""

  # 100 epochs of 257 batches of 8 of the 2050 sequences per task, for each of
  # 25 batches of 4 of the 100 tasks.
  num_updates: limits.Count = 642_500
  num_tasks: limits.Count = 4  # meta-batch
  num_sequences: limits.Count = 8  # per task
  # Times per sequence whose belief is decoded; 0: all.
  num_decoded: limits.CountOrZero = 0
  learning_rate: limits.Weight = 3e-4


@dataclasses.dataclass(frozen=True)
class RlConfig(sac.Config):
  """The stage that trains the policy: SAC's settings, and the meta-batch."""

  hidden_bias: limits.Number = 0.1
  tanh_correction: Literal['exact', 'shifted'] = 'shifted'
  temperature: limits.Positive = 0.2  # alpha
  learn_temperature: bool = False  # True: alpha is where it starts
  num_updates: limits.Count = 1_000_000  # gradient steps in all
  num_tasks: limits.Count = 16  # meta-batch
  batch_size: limits.Count = 256  # transitions per task


@dataclasses.dataclass(frozen=True)
class Config:
  """Hyper-parameters (defaults: the release's)."""

  latent_size: limits.Width = 5  # dimensions of z
  gru_size: limits.Width = 128  # of the encoder's hidden state
  observation_embedding: limits.Width = 32  # widths, in encoder and decoder
  action_embedding: limits.Width = 16
  reward_embedding: limits.Width = 16  # encoder only
  decoder_hidden: limits.Widths = (32, 32)
  decode_whole_step: bool = True  # r(z, s, a, s'); False: r(z, s') (points)
  kl_weight: limits.Weight = 0.05  # on the sum of KL(q_t || q_t-1)
  num_episodes: limits.Count = 2  # in a sequence
  relabel_rewards: bool = True  # VAE data; False for families of dynamics
  vae: VaeConfig = VaeConfig()
  rl: RlConfig = RlConfig()


class Networks(NamedTuple):
  """Encoder (in the tracker), decoder, and what SAC needs."""

  tracker: belief.Tracker
  decoder: Network  # (z, s, a, s') -> rewards of all pairs
  critic: Network  # (augmented s, a) -> [2, ...]
  actor: Network  # augmented s -> TanhNormal


def make_networks(spec: EnvSpec, config: Config) -> Networks:
  """All networks."""
  boundaries = config.num_episodes > 1
  o = spec.observation_size + boundaries
  a, z = spec.action_size, config.latent_size
  embeddings = (config.observation_embedding, config.action_embedding)
  encoder = recurrent.belief_encoder(
    o, a, z, config.gru_size, embeddings + (config.reward_embedding,)
  )
  of_states = sac.make_networks(
    spec._replace(observation_shape=(o + 2 * z,)), config.rl
  )
  return Networks(
    tracker=belief.Tracker(
      encoder, config.gru_size, spec.episode_length, boundaries
    ),
    decoder=recurrent.reward_decoder(
      o, a, z, config.decoder_hidden, embeddings, config.decode_whole_step
    ),
    critic=of_states.critic,
    actor=of_states.actor,
  )


def _choose_times(
  order: Array, counts: Array, number: int
) -> tuple[Array, Array]:
  """Which beliefs of a sequence are decoded, and their weights.

  Args:
    order: [..., T + 1], uniform in [0, 1).
    counts: [..., T + 1], a prefix of ones: the times that there are.
    number: D, how many to take; distinct ones where there are enough.

  Returns:
    Times [..., D], and weights [..., D] under which a sum over them is on
    average the sum over all times.
  """
  _, times = jax.lax.top_k(jnp.where(counts > 0, order, -1.0), number)
  known = jnp.sum(counts, axis=-1, keepdims=True)
  weights = jnp.take_along_axis(counts, times, axis=-1)
  return times, weights * known / jnp.minimum(known, number)


def vae_losses(
  params: dict[str, Params],
  steps: Transition,
  mask: Array,
  noise: dict[str, Array],
  networks: Networks,
  config: Config,
) -> tuple[dict[str, Array], dict[str, Array]]:
  """The negative ELBO, and what to log.

  A sample of every q_t decodes the rewards of all steps, past and future. The
  loss is a mean over the decoded steps, as released (the ELBO has a sum, under
  which the KL would weigh T times less), a sum over the times t, and a mean
  over sequences. Gradient routing: 'reward' reaches encoder and decoder, 'kl'
  the encoder.

  Args:
    params: 'encoder', 'decoder'.
    steps: sequences, leaves [..., T, ...].
    mask: [..., T], a prefix of ones: the steps that count.
    noise: 'latent' [..., D, Z], standard normal, and 'order' [..., T + 1],
      uniform, which chooses D of the T + 1 times.
    networks: see `make_networks`.
    config: hyper-parameters.

  Returns:
    Scalar terms {'reward', 'kl'} whose sum is minimised, scalars to log.
  """
  mean, log_variance = jnp.split(
    networks.tracker.along(params['encoder'], steps, mask), 2, axis=-1
  )
  counts = jnp.concatenate([jnp.ones_like(mask[..., :1]), mask], axis=-1)
  before = (
    lambda x: jnp.concatenate(  # q_-1 is N(0, I)
      [jnp.zeros_like(x[..., :1, :]), x[..., :-1, :]], axis=-2
    )
  )
  kl = latent_losses.kl_between(  # 0 past the end, where q_t stays
    mean, jnp.exp(log_variance), before(mean), jnp.exp(before(log_variance))
  )

  times, weights = _choose_times(
    noise['order'], counts, noise['latent'].shape[-2]
  )
  at_times = lambda x: jnp.take_along_axis(x, times[..., None], axis=-2)
  z = at_times(mean) + jnp.exp(0.5 * at_times(log_variance)) * noise['latent']
  decoded = networks.decoder.apply(
    params['decoder'],
    z,
    networks.tracker.observation(steps),
    steps.action,
    networks.tracker.next_observation(steps),
  )
  rewards = jnp.broadcast_to(steps.reward[..., None, :], decoded.shape)
  errors = weights * policy_losses.masked_mean(
    td.squared_error(decoded, rewards),
    jnp.broadcast_to(mask[..., None, :], decoded.shape),
  )
  terms = {
    'reward': jnp.mean(jnp.sum(errors, axis=-1)),
    'kl': config.kl_weight * jnp.mean(jnp.sum(kl, axis=-1)),
  }
  known = jnp.sum(weights, axis=-1)
  logs = {
    'decoder/loss': terms['reward'],
    'decoder/squared_error': jnp.mean(jnp.sum(errors, axis=-1) / known),
    'encoder/kl': jnp.mean(jnp.sum(kl, axis=-1)),
  }
  return terms, logs


def validate(config: Config):
  """Checks what types cannot say.

  Raises:
    ValueError: names the setting and what it takes.
  """
  limits.check(config, 'borel')
  if config.relabel_rewards and config.num_episodes == 1:
    raise ValueError(
      'borel: relabel_rewards replaces the first half of the episodes of a'
      ' sequence, and num_episodes=1 has none; set one of the two'
    )


def _vae_optimizer(config: Config) -> dict[str, optax.GradientTransformation]:
  return {'vae': optax.adam(config.vae.learning_rate)}


def init_state(key: Key, networks: Networks, config: Config) -> LearnerState:
  """An untrained learner; target critics are copies."""
  keys = [jax.random.fold_in(key, i) for i in range(4)]
  params = {
    'vae': {
      'encoder': networks.tracker.encoder.init(keys[0]),
      'decoder': networks.decoder.init(keys[1]),
    },
    **sac.init_params(keys[2], networks, config.rl),
  }
  optimizers = _vae_optimizer(config) | sac.make_optimizers(config.rl)
  return optim.first_state(keys[3], params, optimizers, params['critic'])


def vae_update(
  state: LearnerState,
  batch: MetaBatch,
  networks: Networks,
  config: Config,
  axis_name: str | None,
) -> tuple[LearnerState, dict[str, Array]]:
  """One step of encoder and decoder; all else stays what it is."""
  number = config.vae.num_sequences
  length = batch.context_mask.shape[1] // number
  decoded = min(config.vae.num_decoded or length + 1, length + 1)
  steps, mask = jax.tree.map(
    lambda x: x.reshape((x.shape[0], number, length) + x.shape[2:]),
    (batch.context, batch.context_mask),
  )
  latent_keys, order_keys = [
    latent.slot_keys(state.key, state.step, batch.slot, i) for i in (0, 1)
  ]
  noise = {
    'latent': task_noise(latent_keys, (number, decoded, config.latent_size)),
    'order': jax.vmap(
      lambda key: jax.random.uniform(key, (number, length + 1))
    )(order_keys),
  }

  def total(params):
    terms, logs = vae_losses(params, steps, mask, noise, networks, config)
    return sum(terms.values()), logs

  gradients, logs = parallel.pmean(
    jax.grad(total, has_aux=True)(state.params['vae']), axis_name
  )
  params, opt_state = optim.step_groups(
    _vae_optimizer(config), {'vae': gradients}, state.opt_state, state.params
  )
  return state.replace(
    step=state.step + 1, params=params, opt_state=opt_state
  ), logs


def make_stages(
  networks: Networks, length: int, config: Config, axis_name: str | None
) -> tuple[Stage, Stage]:
  """The VAE on sequences of `length` steps, then SAC under its beliefs."""
  vae, rl, tracker = config.vae, config.rl, networks.tracker

  def rl_update(state, batch):
    return sac.update(
      state, tracker.augment(batch.query), batch.slot, networks, rl, axis_name
    )

  def annotate(state, steps, mask):
    return tracker.annotate(state.params['vae']['encoder'], steps, mask)

  return Stage(
    'vae',
    vae.num_updates,
    BatchSpec(
      num_tasks=vae.num_tasks,
      query=Rows(1),
      context=Sequences(vae.num_sequences, length),
    ),
    lambda state, batch: vae_update(state, batch, networks, config, axis_name),
  ), Stage(
    'rl',
    rl.num_updates,
    BatchSpec(num_tasks=rl.num_tasks, query=Rows(rl.batch_size)),
    rl_update,
    annotate,
  )


def make(
  problem: Problem, config: Config, axis_name: str | None = None
) -> Algorithm:
  """BOReL for one family; it has no online phase.

  Args:
    problem: what it is for.
    config: hyper-parameters.
    axis_name: device axis when the meta-batch is sharded.

  Raises:
    ValueError: see `validate`.
  """
  validate(config)
  networks = make_networks(problem.spec, config)
  length = config.num_episodes * problem.spec.episode_length
  tracker = networks.tracker

  def actor_params(state):
    return {
      'encoder': state.params['vae']['encoder'],
      'actor': state.params['actor'],
    }

  return Algorithm(
    init=lambda key: init_state(key, networks, config),
    loops=(Loop('offline', make_stages(networks, length, config, axis_name)),),
    explore=tracker.policy(networks.actor, deterministic=False),
    evaluate=tracker.policy(networks.actor, deterministic=True),
    evaluate_given_context=tracker.policy(networks.actor, True),
    actor_params=actor_params,
    data=DataSpec(
      sequence_episodes=config.num_episodes, mix_rewards=config.relabel_rewards
    ),
  )
