"""The rate of matrix products: what updates are measured against."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarking.options import Options
from experiments.benchmarking.timing import Timed, rounded
from offmeta.networks import base

_LONGEST_S = 0.4  # of a timing: there is one beside every run


def _product(x, kernel):
  """[N, I], [I, O] -> [N, O], as in the layers of networks."""
  return base.product(x, kernel, (((1,), (0,)), ((), ())))


def make_ceiling(options: Options) -> dict[str, Timed]:
  """Ways to multiply float32 matrices; units are GFLOP.

  They multiply as the updates do, at the same precision; the default of a GPU
  is lower than float32.
  """
  rows, width, large, length = (
    (256, 64, 128, 8) if options.profile == 'smoke' else (4096, 300, 1536, 20)
  )
  scale = width**-0.5
  x = jax.random.normal(jax.random.key(0), (rows, width))
  w = scale * jax.random.normal(jax.random.key(1), (width, width))
  square = jax.random.normal(jax.random.key(2), (large, large)) * large**-0.5

  def scan(step, carry):
    def call(c):
      with jax.default_matmul_precision(options.matmul_precision):
        return jax.lax.scan(lambda c, _: (step(c), None), c, length=length)[0]

    return jax.jit(call), carry

  chain_flop = 2.0 * rows * width * width * length / 1e9
  quarter = tuple(jnp.split(x, 4))
  # (function, argument, GFLOP per call)
  ways = {
    'chain': (*scan(lambda c: _product(c, w), x), chain_flop),
    'four_chains': (
      *scan(lambda c: tuple(_product(part, w) for part in c), quarter),
      chain_flop,
    ),
    'square': (
      *scan(lambda c: _product(c, square), square),
      2.0 * large**3 * length / 1e9,
    ),
  }

  def timed(fn, argument, gflop):
    call = lambda: jax.block_until_ready(fn(argument))
    call()
    return Timed(call, gflop, min(options.repeat_s, _LONGEST_S))

  return {name: timed(*way) for name, way in ways.items()}


def record(ways: Mapping[str, Timed], options: Options) -> dict[str, Any]:
  """What goes to the JSON file of ways that have been measured."""
  best = max(ways, key=lambda name: ways[name].rate)
  return {
    'best': best,
    'gflops': {name: rounded(way.rate) for name, way in ways.items()},
    'spread': {name: way.spread for name, way in ways.items()},
    'dtype': 'float32',
    'matmul_precision': options.matmul_precision,
    'definition': 'best way by median over the run; all cores',
    'sizes': 'smoke'
    if options.profile == 'smoke'
    else 'chain [4096,300]x[300,300], square 1536',
  }
