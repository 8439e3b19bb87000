"""FLOPs of a program: multiply-adds of its matrix products only."""

from collections.abc import Callable
import math
from typing import Any

import jax
from jax.interpreters import partial_eval


def count(function: Callable[..., Any], *arguments: Any) -> float:
  """FLOPs of one call; a product [N, K] x [K, M] is 2 N K M.

  Bodies of scans count as often as they run, of branches the most expensive
  one. What the results do not depend on counts nothing: XLA removes it.

  Args:
    function: of pytrees of arrays; it is traced, not run.
    *arguments: arrays or their shapes.

  Raises:
    ValueError: products in a loop of unknown length, or convolutions.
  """
  jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
  jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
  return _of_program(jaxpr)


def _of_program(jaxpr: Any) -> float:
  return sum(map(_of_equation, jaxpr.eqns))


def _of_equation(equation: Any) -> float:
  name, params = equation.primitive.name, equation.params
  if name == 'dot_general':
    (contracted, _), _ = params['dimension_numbers']
    shape = equation.invars[0].aval.shape
    return (
      2.0
      * equation.outvars[0].aval.size
      * math.prod(shape[axis] for axis in contracted)
    )
  # Programs in it, whatever it calls them.
  inner = [
    _of_program(part)
    for part in jax.tree.leaves(dict(params))
    if hasattr(part, 'eqns')
  ]
  if name == 'conv_general_dilated' or (name == 'while' and any(inner)):
    raise ValueError(f'flops: those of {name!r} cannot be counted')
  if name == 'cond':
    return max(inner)
  return sum(inner) * (params['length'] if name == 'scan' else 1)
