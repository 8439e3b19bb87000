"""Arrays of any kind as numpy, for comparisons."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def numbers(leaf: Any) -> np.ndarray:
  """A leaf as numpy; PRNG keys as their data."""
  if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    leaf = jax.random.key_data(leaf)
  return np.asarray(leaf)
