"""How much memory data that are gathered will take.

Which tasks are visited when is known before a run (`training/visits.py`), so
buffers are made exactly large enough and nothing is ever evicted.
"""

from typing import NamedTuple

import numpy as np

from offmeta.types import EnvSpec, Visits


def longest(spec: EnvSpec, quota: int) -> int:
  """Most steps that whole episodes take to reach a quota."""
  horizon = spec.episode_length
  if quota <= 0:
    return 0
  if spec.terminates:
    return quota + horizon - 1
  return -(-quota // horizon) * horizon


class Sizes(NamedTuple):
  """Capacities in transitions per task.

  Attributes:
    query, context: of the two buffers (equal when one serves both).
    sequences: longest list of exploration sequences of one task.
  """

  query: int
  context: int
  sequences: int


def sizes(
  spec: EnvSpec,
  gather: Visits,
  visited: np.ndarray,
  num_train: int,
  start_query: int,
  start_context: int,
  shared: bool,
) -> Sizes:
  """Capacities that hold the start data and every scheduled visit.

  Args:
    spec: of the family.
    gather: what one visit collects.
    visited: [S, iterations, K] task numbers.
    num_train: M.
    start_query, start_context: rows at the start.
    shared: one buffer serves both roles.
  """
  visited = np.asarray(visited)
  flat = visited.reshape(visited.shape[0], -1)
  counts = np.stack([np.bincount(row, minlength=num_train) for row in flat])
  most = int(counts.max()) if counts.size else 0
  prior = longest(spec, gather.prior_steps)
  posterior = longest(spec, gather.posterior_steps)
  margin = spec.episode_length  # append writes whole episodes
  query = start_query + most * (prior + posterior) + margin
  per_visit = prior + (posterior if gather.posterior_to_context else 0)
  if gather.clear_context:  # at most one iteration's visits stay
    per_iteration = (
      np.stack(
        [
          np.bincount(row, minlength=num_train)
          for row in visited.reshape(-1, visited.shape[-1])
        ]
      )
      if visited.size
      else np.zeros((1, 1))
    )
    repeated = int(per_iteration.max())
    context = max(start_context, repeated * per_visit) + margin
  else:
    context = start_context + most * per_visit + margin
  return Sizes(query, query if shared else context, max(most, 1))
