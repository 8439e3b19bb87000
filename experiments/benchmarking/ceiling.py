"""The rate of float32 matrix products: what updates are measured against."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarking.timing import rounded, Timed

PRECISION = 'float32'  # of the products of updates and ceiling


def make_ceiling(profile: str, repeat_s: float) -> dict[str, Timed]:
  """Ways to do float32 matrix products; units are GFLOP.

  They run at the precision of the updates; the default of a GPU is lower.
  """
  rows, width, large, length = (
      (256, 64, 128, 8) if profile == 'smoke' else (4096, 300, 1536, 20))
  scale = width ** -0.5
  x = jax.random.normal(jax.random.key(0), (rows, width))
  w = scale * jax.random.normal(jax.random.key(1), (width, width))
  square = jax.random.normal(jax.random.key(2), (large, large)) * large ** -0.5

  def scan(step, carry):
    def call(c):
      with jax.default_matmul_precision(PRECISION):
        return jax.lax.scan(
            lambda c, _: (step(c), None), c, length=length)[0]

    return jax.jit(call), carry

  chain_flop = 2.0 * rows * width * width * length / 1e9
  quarter = tuple(jnp.split(x, 4))
  # (function, argument, GFLOP per call)
  ways = {
      'chain': (*scan(lambda c: c @ w, x), chain_flop),
      'four_chains': (
          *scan(lambda c: tuple(part @ w for part in c), quarter), chain_flop),
      'square': (*scan(lambda c: c @ square, square),
                 2.0 * large ** 3 * length / 1e9),
  }

  def timed(fn, argument, gflop):
    call = lambda: jax.block_until_ready(fn(argument))
    call()
    return Timed(call, gflop, repeat_s)

  return {name: timed(*way) for name, way in ways.items()}


def record(ways: Mapping[str, Timed], profile: str) -> dict[str, Any]:
  """What goes to the JSON file of ways that have been measured."""
  best = max(ways, key=lambda name: ways[name].rate)
  return {
      'best': best,
      'gflops': {name: rounded(way.rate) for name, way in ways.items()},
      'spread': {name: way.spread for name, way in ways.items()},
      'dtype': 'float32',
      'matmul_precision': PRECISION,
      'definition': 'best way by median over the run; all cores',
      'sizes': profile if profile == 'smoke' else
               'chain [4096,300]x[300,300], square 1536',
  }
