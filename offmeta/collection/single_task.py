"""One SAC learner per task, side by side: tasks take the place of seeds.

Each learner sees its own task alone. Its replay is its training history,
from random actions to the last policy: nothing is evicted, as in MACAW's data.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from offmeta import rollout
from offmeta.data import buffer as buffers, capacity
from offmeta.data.buffer import Replay
from offmeta.training import (
  gather as gathering,
  gatherers,
  loop,
  metrics,
  updates,
)
from offmeta.training.config import (
  ConfigError,
  SpecialistsConfig,
  Visits,
)
from offmeta.training.setup import Setup
from offmeta.types import Algorithm, EnvSpec, LearnerState


class Evaluator:
  """Scores the learners on their own tasks; compiled once.

  Args:
    setup: `train_tasks` leaves [M, ...] and as many seeds in this process.
    config: which SAC, and how many episodes (R).
  """

  def __init__(self, setup: Setup, config: SpecialistsConfig):
    family = setup.family
    algorithm = setup.algorithm('sac', config.sac)
    policy = rollout.uniform_at_first(
      algorithm.evaluate, family.spec.action_size
    )

    def one(state, uniform, task, key):
      acting = rollout.Acting(
        algorithm.actor_params(state), uniform.astype(jnp.int32)
      )

      def episode(r):
        k_init, k_episode = jax.random.split(jax.random.fold_in(key, r))
        belief = policy.init(acting, k_init)
        _, data, _ = rollout.episode(
          family, policy, acting, belief, task, k_episode
        )
        return jnp.sum(data.reward), jnp.sum(data.extras['diverged'])

      returns, diverged = jax.vmap(episode)(jnp.arange(config.num_episodes))
      return returns, jnp.sum(diverged)

    self._setup = setup
    self._keys = setup.seeds.streams('evaluation')
    self._score = setup.seeds.layout.compile(one, (0, 0, 0, 0))

  def score(
    self, state: LearnerState, number: int = 0, uniform: bool = False
  ) -> tuple[np.ndarray, np.ndarray]:
    """Deterministic policies, or the uniform one, in fresh episodes.

    Args:
      state: leaves [M, ...].
      number: which random numbers; 0 is taken along a training.
      uniform: score uniform random actions instead.

    Returns:
      Undiscounted returns [M, R], and how often the simulation blew up [M].
    """
    keys = jax.vmap(lambda k: jax.random.fold_in(k, number))(self._keys)
    flags = jnp.full(keys.shape, uniform)
    return jax.device_get(
      self._score(state, flags, self._setup.train_tasks, keys)
    )

  def curve(self, state: LearnerState, replay: Replay) -> dict:
    """Metrics [M] to log during training."""
    returns, diverged = self.score(state)
    return {
      'eval/return': returns.mean(axis=1),
      'eval/diverged': diverged,
      'eval/env_steps': np.asarray(replay.query.size[:, 0]),
    }


class Rounds(NamedTuple):
  """How a budget is spent, in rounds of `steps_per_iteration` steps.

  Attributes:
    initial: uniform rounds, all before the first update.
    iterations: the first has all the uniform rounds, later ones one round.
  """

  initial: int
  iterations: int


def rounds(config: SpecialistsConfig) -> Rounds:
  """The plan of a training.

  Raises:
    ConfigError: nothing would be left for the policy.
  """
  initial = max(1, config.initial_steps // config.steps_per_iteration)
  total = config.env_steps // config.steps_per_iteration
  if total <= initial:
    raise ConfigError(
      f'specialists: env_steps {config.env_steps} leave nothing after'
      f' {initial} initial rounds of steps_per_iteration'
      f' {config.steps_per_iteration}'
    )
  return Rounds(initial, total - initial + 1)


def gathered_steps(spec: EnvSpec, config: SpecialistsConfig) -> tuple[int, int]:
  """Fewest and most steps that a learner gathers.

  Raises:
    ConfigError: see `rounds`.
  """
  plan, quota = rounds(config), config.steps_per_iteration
  number = plan.initial + plan.iterations - 1
  most = capacity.longest(spec, quota)
  return number * (quota if spec.terminates else most), number * most


def rows(spec: EnvSpec, config: SpecialistsConfig) -> int:
  """Rows of a learner's replay; `append` writes whole episodes."""
  return gathered_steps(spec, config)[1] + spec.episode_length


def _gatherer(setup: Setup, config: SpecialistsConfig, initial: int):
  """The loop's `gather`: every learner acts in its own task."""
  plain = setup.algorithm('sac', config.sac)
  algorithm = plain._replace(
    explore=rollout.uniform_at_first(
      plain.explore, setup.family.spec.action_size
    ),
    actor_params=lambda state: rollout.Acting(
      plain.actor_params(state), (state.step == 0).astype(jnp.int32)
    ),
  )
  quota = Visits(
    tasks_per_iteration=1,
    prior_steps=config.steps_per_iteration,
    posterior_steps=0,
    context_size=1,
    rewards='true',
  )
  # All uniform rounds come before the first update.
  return gatherers.own_gatherer(
    setup,
    algorithm,
    quota,
    lambda iteration: range(
      0 if iteration == 0 else initial + iteration - 1, initial + iteration
    ),
  )


def _start(setup: Setup, config: SpecialistsConfig, algorithm: Algorithm):
  """Untrained learners [M, ...] and empty replays [M, 1, C, ...]."""
  example = gathering.example_transition(setup.family, setup.train_tasks)
  empty = Replay(
    buffers.empty(example, 1, rows(setup.family.spec, config)), None
  )
  num_tasks = len(setup.seeds.layout.seeds)
  replay = jax.tree.map(
    lambda x: jnp.zeros((num_tasks, *x.shape), x.dtype), empty
  )
  return loop.start(updates.init_states(algorithm, setup.seeds), replay)


def train(
  setup: Setup,
  config: SpecialistsConfig,
  evaluator: Evaluator,
  stage: str = 'specialists',
  matmul_precision: str = 'float32',
) -> loop.Progress:
  """Trains one learner per task to the end of its budget, or goes on.

  An iteration takes at least its quota of steps, in whole episodes, so a
  learner may use more than `env_steps`; the sizes of the replays tell.

  Args:
    setup: `train_tasks` leaves [M, ...] and as many seeds, one per task; both
      of this process. Its `config` names what the checkpoints belong to.
    config: budget and SAC.
    evaluator: of the same setup and config.
    stage: folder under the workdir.
    matmul_precision: of the networks in updates.

  Returns:
    The learners [M] and their replays, leaves [M, 1, C, ...] in order, which
    are always on the devices.

  Raises:
    ConfigError: the budget is too small.
    Interrupted: a stop was requested; the same call continues.
  """
  plan = rounds(config)
  algorithm = setup.algorithm('sac', config.sac)
  updater = updates.Updater(
    lambda axis: setup.algorithm('sac', config.sac, axis).loop('online'),
    setup.seeds,
    config.sac.num_updates,
    shared_replay=False,
    iterations=plan.iterations,
    matmul_precision=matmul_precision,
  )
  every = max(1, plan.iterations // config.num_evaluations)
  return loop.run_loop(
    setup,
    stage,
    _start(setup, config, algorithm),
    updater,
    show=('eval/return',),
    label='sac',
    gather=_gatherer(setup, config, plan.initial),
    evaluate=evaluator.curve,
    evaluate_every=every * updater.total,
  )


def curves(setup: Setup, folder: str = 'specialists') -> dict[str, np.ndarray]:
  """What a training logged, by metric: [K, M] at its K logged updates.

  Raises:
    MetricsFileError: the file cannot be read.
  """
  series = metrics.read_series(setup.workdir / folder / 'metrics.jsonl')
  return {name: values for name, (_, values) in series.items()}
