"""Which tasks are visited when: a function of the seeds, known before a run."""

import jax

from offmeta import processes
from offmeta.data import capacity
from offmeta.training import memory
from offmeta.training.config import ConfigError, ExperimentConfig
from offmeta.training.seeds import Seeds, stream
from offmeta.types import Array, EnvSpec, Key, Visits


def visits(keys: Key, iterations: int, gather: Visits, num_train: int) -> Array:
  """Task numbers [S, iterations, K], uniform with replacement.

  Raises:
    ConfigError: the list itself would not fit into the memory.
  """
  shape = (iterations, gather.tasks_per_iteration)
  _check_length(len(keys), *shape, num_train)
  return jax.vmap(
    lambda k: jax.random.randint(stream(k, 'visits'), shape, 0, num_train)
  )(keys)


def _check_length(num_seeds: int, iterations: int, each: int, num_train: int):
  """Counts what `visits` and `capacity.sizes` make, in Python's integers."""
  # Random bits and numbers of visits; how often each task is, per iteration.
  size = num_seeds * iterations * (24 * each + 8 * num_train)
  demand = memory.Demand(
    'list of visits',
    size,
    f'{memory.times(num_seeds, "seed")} x {iterations:,} iterations'
    f' x {each:,} visits',
  )

  def check():
    try:
      memory.check(
        [demand],
        memory.available_bytes(jax.local_devices()),
        'Make fewer iterations, or visit fewer tasks in each'
        ' (gather.tasks_per_iteration).',
      )
    except memory.MemoryBudgetError as error:
      raise ConfigError(str(error)) from error

  processes.in_all(check)


def online_visits(config: ExperimentConfig, seeds: Seeds) -> Array:
  """Task numbers [S, iterations, K] of the online phase, of all seeds."""
  return visits(
    seeds.all_keys,
    config.online.iterations,
    config.online.gather,
    config.family.num_train,
  )


def online_sizes(
  spec: EnvSpec,
  config: ExperimentConfig,
  seeds: Seeds,
  start_query: int,
  start_context: int,
) -> capacity.Sizes:
  """Capacities of the online phase, the same in all processes.

  Args:
    spec: of the family.
    config: of the variant.
    seeds: of the run.
    start_query, start_context: rows of the dataset; without context data of its
      own 0, and the query data serve.
  """
  return capacity.sizes(
    spec,
    config.online.gather,
    online_visits(config, seeds),
    config.family.num_train,
    start_query,
    start_context or start_query,
    config.online.share_buffer,
  )
