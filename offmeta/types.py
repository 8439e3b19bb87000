"""Every interface and data container of the package: read this page first.

Axis letters, used in every docstring: M tasks, E episodes, T time, C buffer
capacity, N context size, B query batch, O observation, A action, F reward
features, Z latent, K ensemble, S seeds, R repetitions.

Containers that cross a `jit` boundary are pytrees of arrays. Bundles of
functions (`Policy`, `Stage`, `Loop`, `Algorithm`, `Network`) hold no arrays.

Words. A *loop* is training that is run, saved and scored as one (a folder of
the workdir), a *stage* one kind of gradient step in it. A run *collects* its
logged data once; a loop *gathers* new data as it goes.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from flax import struct
import jax
import numpy as np

from offmeta import limits

Array = jax.Array
Key = jax.Array  # a typed key: jax.random.key
Params = Any  # pytree of arrays
Task = Any  # dict of arrays; leaves [...] for one task, [M, ...] for many
PolicyState = Any  # pytree of arrays: the belief over one task
Metrics = dict[str, Array]  # 'stage/part/quantity' -> scalar


class Transition(NamedTuple):
  """Steps of a Markov decision process, any leading shape [...].

  Attributes:
    observation: [..., O].
    action: [..., A], in [-1, 1].
    reward: [...], raw environment units (never rescaled in storage).
    discount: [...], 0 only at a true termination; a time limit keeps 1.
    next_observation: [..., O]. None in data that store every frame once
      (`data/frames.py`): it is then the observation of the next row.
    extras: further leaves, e.g. 'features' [..., F].
  """

  observation: Array
  action: Array
  reward: Array
  discount: Array
  next_observation: Array | None
  extras: Mapping[str, Array] = {}  # never written to


class Trajectory(NamedTuple):
  """Consecutive steps of one episode, any leading shape [...].

  Attributes:
    observation: [..., T + 1, O]; step t leads from entry t to entry t + 1.
    action, reward, discount: [..., T, A], [..., T], [..., T].
    mask: [..., T], 1 where the step exists: a prefix. After it the last
      observation and some step are repeated.
    extras: as of the transitions, leaves [..., T, ...].
  """

  observation: Array
  action: Array
  reward: Array
  discount: Array
  mask: Array
  extras: Mapping[str, Array] = {}


class MetaBatch(NamedTuple):
  """A batch over tasks.

  Attributes:
    task_id: [M] int32, position in the training task list.
    slot: [M] int32, position in the whole meta-batch (over all devices);
      the name under which a task's random numbers are drawn.
    context: leaves [M, N, ...]: what adaptation may look at; None if the
      stage asks for none.
    context_mask: [M, N], 1 where the context entry counts; None with it.
    query: leaves [M, B, ...]: what the losses are taken on. For `Windows` a
      Trajectory, leaves [M, count, length (+ 1), ...]. Of a
      `Rollout` leaves [E, T, ...], in order, with task_id and slot [E].
  """

  task_id: Array
  slot: Array
  context: Transition | None
  context_mask: Array | None
  query: Transition | Trajectory


class EnvSpec(NamedTuple):
  """Static facts of a family.

  Attributes:
    name: the key under which the family is registered.
    observation_shape: (O,) of vectors; of images (height, width, channels).
    action_size, feature_size: A, F.
    episode_length: time limit in steps.
    terminates: whether a true termination can happen before the limit.
    options: everything that changes the data (backend, timestep, observation
      variant, package versions); recorded in manifests and compared on load.
    observation_dtype: of what is stored and batched, 'float32' or 'uint8';
      networks that need numbers cast.
  """

  name: str
  observation_shape: tuple[int, ...]
  action_size: int
  feature_size: int
  episode_length: int
  terminates: bool
  options: Mapping[str, Any]
  observation_dtype: str = 'float32'

  @property
  def observation_size(self) -> int:
    """O, of families that observe vectors.

    Raises:
      ValueError: observations are images.
    """
    if len(self.observation_shape) != 1:
      raise ValueError(
        f'family {self.name!r} observes arrays of shape'
        f' {self.observation_shape}, not vectors; choose an algorithm for'
        ' images, or a family that observes vectors'
      )
    return self.observation_shape[0]


class EnvState(NamedTuple):
  """State of one environment (no batch axis; batch with vmap).

  Attributes:
    physics: simulator state, any pytree.
    observation: [O], or an image.
    reward: [], reward of the step that led here; 0 after a reset.
    terminal: [], 1.0 at a true termination, else 0.0 (a time limit is the
      caller's business).
    features: [F], what `EnvFamily.reward` needs beyond the action.
    diverged: [], 1.0 if the simulation blew up in this step, else 0.0. All
      other leaves are finite even so: the physics from before the step, and
      the reward as if the body had rested there. A family that terminates
      sets `terminal` too; what others store: `offmeta.rollout.episode`.
  """

  physics: Any
  observation: Array
  reward: Array
  terminal: Array
  features: Array
  diverged: Array = np.float32(0.0)


@runtime_checkable
class EnvFamily(Protocol):
  """A distribution of MDPs that share spaces; a task is a dict of arrays.

  A family may also have `position(observation [..., O]) -> [..., 2]`: where the
  agent is on a plane, in units of length. If it does, the report draws paths of
  held-out episodes, and a task's 'goal' [2], where it has one, in the same
  coordinates.
  """

  spec: EnvSpec

  def sample_tasks(self, key: Key, num_tasks: int) -> Task:
    """Fresh tasks, leaves [num_tasks, ...]."""

  def task_list(self, name: str) -> tuple[Task, Task]:
    """A published (train, test) list by name; ValueError names the known."""

  def reset(self, key: Key, task: Task) -> EnvState:
    """A random start state."""

  def step(self, state: EnvState, action: Array, task: Task) -> EnvState:
    """One control step; action [A] is clipped to [-1, 1]."""

  def reward(self, features: Array, action: Array, task: Task) -> Array:
    """The reward [...] of features [..., F] and action [..., A]."""


class Network(NamedTuple):
  """A neural network without its library."""

  init: Callable[..., Params]  # (key) -> params
  apply: Callable[..., Any]  # (params, *inputs) -> outputs


class Policy(NamedTuple):
  """Acting. The state is one task's belief (posterior, GRU carry, ...).

  Attributes:
    init: (params, key) -> state, the prior.
    act: (params, state, observation [O], key) -> (action [A], state, extras):
      the state may take in the observation (a filter sees an episode's first
      one here), extras are what else there is to say of the choice, e.g.
      'log_prob' and 'value'; `rollout.continue_rollout` stores them.
    observe: (params, state, transition, key) -> state, called after every step
      with the state that `act` left.
    adapt: (params, state, context [N, ...], valid [N], key) -> state, called
      before every episode; with no valid entry the result is the prior.
    keep: (transition [...]) -> transition [...]: what `adapt` needs of steps,
      with rewards and extras['time'] as they are; a policy that reads a task
      off something smaller drops frames here. What is collected for its own
      adaptation is stored so; other contexts may hold more.
  """

  init: Callable[..., PolicyState]
  act: Callable[..., tuple[Array, PolicyState, Mapping[str, Array]]]
  observe: Callable[..., PolicyState]
  adapt: Callable[..., PolicyState]
  keep: Callable[[Transition], Transition] = lambda transition: transition


@struct.dataclass
class LearnerState:
  """All that a learner changes; arrays only, so it can be saved and vmapped.

  Attributes:
    step: [] int32, number of updates.
    key: root of the learner's random streams; never changes, streams are
      `fold_in` of the step.
    params, target_params, opt_state: pytrees.
    extras: frozen copies and the like (SMAC: the labelling networks).
    memory: what only a running loop needs (imagined transitions); made by the
      loop's `begin`, kept in its checkpoints, dropped when it ends.
  """

  step: Array
  key: Key
  params: Params
  target_params: Params
  opt_state: Any
  extras: Any
  memory: Any = ()


@dataclasses.dataclass(frozen=True)
class Visits:
  """Data gathered before an iteration (as SMAC's and PEARL's releases do)."""

  tasks_per_iteration: limits.Count = 5  # drawn uniformly with replacement
  prior_steps: limits.CountOrZero = 400  # under the prior; into both buffers
  # First episode prior, then posterior.
  posterior_steps: limits.CountOrZero = 600
  posterior_to_context: bool = False  # released: query buffer only
  clear_context: bool = False  # PEARL: True, SMAC: False
  context_size: limits.Count = 256  # transitions behind a posterior rollout
  label_context_size: limits.Count = 256  # offline transitions behind a label
  # 'decoder': self-supervised; 'true': the oracle.
  rewards: Literal['decoder', 'true'] = 'decoder'


class Rows(NamedTuple):
  """Loose transitions of a task, drawn uniformly.

  Attributes:
    size: how many.
    part: 'all' there are, or 'offline': only what was there at the start.
    online_share: how many of them (rounded) are drawn from what came after the
      offline data, the others from the offline data; all are offline while
      nothing came. Negative: uniform over the part, so that the share grows as
      data arrive.
    replacement: whether a row can be drawn twice. Where there are too few, all
      are taken and what is missing is drawn with replacement.
  """

  size: int
  part: str = 'all'
  online_share: float = -1.0
  replacement: bool = True


class Slice(NamedTuple):
  """`size` rows in a row from a random start; a shorter log is taken whole."""

  size: int


class Sequences(NamedTuple):
  """Whole sequences of the task (`DataSpec.sequence_episodes`), with
  replacement.

  Attributes:
    count: how many, one after the other: N = count * length.
    length: steps to which each is padded; it counts in a prefix of them.
  """

  count: int
  length: int


class Exploration(NamedTuple):
  """A context composed as at meta-test.

  Attributes:
    size: of a context of loose offline transitions.
    sequence_size: longest sequence in steps; a longer one is cut.
    offline_share: the share of tasks that get loose offline transitions; the
      others get all steps of one prior-exploration sequence, if they have any.
  """

  size: int
  sequence_size: int
  offline_share: float


class Windows(NamedTuple):
  """Consecutive steps of recorded sequences: the query is a Trajectory.

  Each window lies within one sequence, drawn uniformly from the task's (its
  episodes, with `DataSpec.sequence_episodes` 1), at a start that is uniform
  among those that leave it whole. A sequence that is shorter is taken whole
  and masked after its end.

  Attributes:
    count: windows per task.
    length: steps T of each.
  """

  count: int
  length: int


class Rollouts(NamedTuple):
  """On-policy data before every iteration: what a loop may gather.

  The algorithm's `explore` goes on in the same environments from iteration to
  iteration, in the training tasks with their true rewards.

  Attributes:
    num_envs: E, spread evenly over the training tasks.
    num_steps: T of each per iteration.
  """

  num_envs: int
  num_steps: int


class Rollout(NamedTuple):
  """The fresh rollouts of this iteration, leaves [E, T, ...].

  `BatchSpec.num_tasks` is then E, the number of environments, and the update
  does all its epochs and minibatches itself.
  """


class BatchSpec(NamedTuple):
  """What one update of a stage is fed.

  Attributes:
    num_tasks: M, tasks drawn uniformly.
    query: what the losses are taken on, from the query buffer.
    context: what adaptation may look at, from the context buffer, drawn
      independently of the query; None: nothing.
    task_repeat: the same tasks serve this many consecutive updates.
    replacement: whether a task can be drawn twice for one meta-batch. Without,
      the meta-batch must not ask for more than there are.
  """

  num_tasks: int
  query: Rows | Windows | Rollout
  context: Rows | Slice | Sequences | Exploration | None = None
  task_repeat: int = 1
  replacement: bool = True


class DataSpec(NamedTuple):
  """How logs are prepared for an algorithm, once, before training.

  Attributes:
    returns_discount: if not None, every transition's extras hold what
      `losses.returns.annotate` computes under this discount.
    stride: keep every so-manieth row, counted from the end of the log
      (MACAW's `buffer_skip`).
    sequence_episodes: so many consecutive episodes of a task are one sequence
      (BOReL's meta-episode; what is left over is a shorter one); 0: none.
    shared: contexts come from the query data even if the dataset has context
      data of its own; so they do wherever returns or sequences are asked for.
    mix_rewards: BOReL's reward relabelling. In about 63%
      of the context sequences the first half of the episodes is replaced by
      episodes of another task from the same place in a sequence, with rewards
      recomputed for this one; queries stay what they were.
    context_part: contexts, at meta-test too, come from `context_rows`
      consecutive rows of each log, without stride: 'first', 'middle' or 'last'
      (MACAW's ablation of data quality); 'all': from what queries come from.
    context_rows: see there.
  """

  returns_discount: float | None = None
  stride: int = 1
  sequence_episodes: int = 0
  mix_rewards: bool = False
  shared: bool = False
  context_part: str = 'all'
  context_rows: int = 0


class Problem(NamedTuple):
  """What an algorithm is made for.

  Attributes:
    spec: of the family.
    num_tasks: training tasks; at least 1.
    num_rows: logged transitions of the training task with the fewest; 0 where
      there are no logs, or none yet.
    termination: (observation [..., O], action [..., A], next observation
      [..., O]) -> 1.0 where an episode ends, for algorithms that imagine
      transitions; None if the family has no such rule of its own.
  """

  spec: EnvSpec
  num_tasks: int = 1
  num_rows: int = 0
  termination: Callable[..., Array] | None = None


class Stage(NamedTuple):
  """One kind of gradient step.

  Attributes:
    name: prefix of its metrics.
    num_steps: updates in each iteration of its loop.
    batch: what each update is fed.
    update: (LearnerState, MetaBatch) -> (LearnerState, Metrics).
    annotate: (LearnerState, Transition [W, ...], mask [W]) -> extras to add,
      leaves [W, ...]; run over each sequence of the query data with the state
      at the start of the stage (BOReL: beliefs of its trained encoder). What
      it depends on must not change in the stage. In loops of one iteration
      over fixed data only.
  """

  name: str
  num_steps: int
  batch: BatchSpec
  update: Callable[[LearnerState, MetaBatch], tuple[LearnerState, Metrics]]
  annotate: Callable[..., Mapping[str, Array]] | None = None


def _unchanged(state: LearnerState) -> LearnerState:
  return state


class Loop(NamedTuple):
  """Training that is run, saved, resumed and scored as one.

  In every iteration data may be gathered, then the stages run one after the
  other. Work that is due every so many updates is a stage of its own: e.g. 100
  updates of a policy and one of its value's estimate, in 1,000 iterations.
  (A `lax.cond` inside `update` would not do: under the vmap over seeds it
  computes both branches in every update.)

  Attributes:
    name: its phase, and its folder under the workdir: 'offline', 'online' or
      'finetune', one of each at most; 'offline/NAME' for those before the
      last of the phase 'offline'.
    stages: at least one.
    iterations: how many; None: the experiment says (`config.online.iterations`,
      `config.finetune.iterations`), as it must where data are gathered by
      visits of tasks.
    gather: before every iteration. None: nothing in an 'offline' loop; in the
      others what the experiment says (`config.online.gather`: `Visits`).
      `Rollouts` are for an 'online' loop.
    begin: (LearnerState) -> LearnerState, at its start. Of 'finetune', which
      trains one learner per task: (LearnerState, context [N, ...], valid [N]).
    finished: (LearnerState) -> [] bool, asked before every iteration. A seed
      for which it holds keeps its state and logs nothing more, and the loop
      ends when it holds for all (noticed at the end of a compiled call, which
      may be several iterations); None: never.
  """

  name: str
  stages: tuple[Stage, ...]
  iterations: int | None = 1
  gather: Rollouts | None = None
  begin: Callable[..., LearnerState] = _unchanged
  finished: Callable[[LearnerState], Array] | None = None

  @property
  def phase(self) -> str:
    """The phase of a run that it belongs to."""
    return self.name.split('/')[0]


class Algorithm(NamedTuple):
  """What the runner sees of an algorithm.

  Attributes:
    init: (key) -> LearnerState.
    loops: run in order, each from where the one before it ended. 'offline'
      loops train on the fixed data; an 'online' loop on data that it gathers
      in the training tasks before every iteration, once per variant of the
      experiment; a 'finetune' loop in each held-out task on data of its own.
    explore: collects data.
    evaluate: scored with context that it collected itself.
    evaluate_given_context: scored with a context that was handed to it: loose
      transitions, or, with `data.sequence_episodes` above 1, the beginning of
      a recorded sequence; None if neither means anything to it.
    actor_params: (LearnerState) -> what the policies take as params.
    relabel: (LearnerState, context [N, ...], valid [N], data [T, ...], key)
      -> rewards [T] without access to `data.reward`; None if there is none.
    posterior: (actor params, context [N, ...], valid [N]) -> (mean [Z],
      std [Z]); None for algorithms without a Gaussian latent.
    data: how logs are prepared; None: it has no use for logs.
    diagnose: (LearnerState, Evidence) -> {name: array}, what the report shows
      of a learner besides its returns, of one seed: [], [K], [K, L], or points
      [n, 2]. It gets the whole state, because models and critics are not among
      what acting needs. A name is words with underscores; in 'y_by_x' they are
      the labels of the axes, and an entry 'x' of shape [K], if there is one,
      holds the places (points have both as columns: x, y); in 'value_by_y_by_x'
      they are those of a heat map [K, L]. Asked for once per scored loop, where
      there are logs. None if there is nothing to show.
  """

  init: Callable[[Key], LearnerState]
  loops: tuple[Loop, ...]
  explore: Policy
  evaluate: Policy
  evaluate_given_context: Policy | None
  actor_params: Callable[[LearnerState], Params]
  relabel: Callable[..., Array] | None = None
  posterior: Callable[..., tuple[Array, Array]] | None = None
  data: DataSpec | None = DataSpec()
  diagnose: Callable[..., Mapping[str, Array]] | None = None

  def in_phase(self, phase: str) -> tuple[Loop, ...]:
    """Its loops of a phase, in order."""
    return tuple(loop for loop in self.loops if loop.phase == phase)

  def loop(self, name: str) -> Loop:
    """The loop of that name.

    Raises:
      KeyError: there is none.
    """
    for loop in self.loops:
      if loop.name == name:
        return loop
    raise KeyError(f'no loop {name!r}; known: {[x.name for x in self.loops]}')


class Evidence(NamedTuple):
  """What `Algorithm.diagnose` may look at: M training tasks, one seed.

  Attributes:
    logged: leaves [M, N, ...], contexts from the logs, as they are handed over.
    logged_mask: [M, N], 1 where an entry counts.
    own: leaves [M, W, ...], what the policy collected itself and keeps
      (`Policy.keep`), in order.
    own_mask: [M, W].
    rows: leaves [M, B, ...], consecutive steps of the query data, from
      a random start, or, with `DataSpec.sequence_episodes`, of one sequence
      from its beginning; there episodes begin where extras['time'] is 0.
    rows_mask: [M, B].
    key: random key.
  """

  logged: Transition
  logged_mask: Array
  own: Transition
  own_mask: Array
  rows: Transition
  rows_mask: Array
  key: Key


def checked_diagnosis(found: Mapping[str, Array]) -> dict[str, Array]:
  """What `Algorithm.diagnose` returned, if the report can show it.

  Raises:
    ValueError: an entry has more than two axes, or no numbers.
  """
  found = {name: jax.numpy.asarray(value) for name, value in found.items()}
  for name, value in found.items():
    if value.ndim > 2 or not value.size:
      raise ValueError(
        f'Algorithm.diagnose: {name!r} has shape {list(value.shape)}; return'
        ' one number, a line [K], a map [K, L] or points [n, 2]'
      )
  return found
