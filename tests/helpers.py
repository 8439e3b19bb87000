"""Small settings shared by the tests of algorithms."""

import jax
import numpy as np

from offmeta import parallel
from offmeta.algorithms import pearl, smac
from offmeta.testing import probes
from offmeta.testing.arrays import numbers
from offmeta.training.seeds import Seeds
from offmeta.types import EnvSpec

SPEC = EnvSpec(
  name='none',
  observation_shape=(3,),
  action_size=2,
  feature_size=1,
  episode_length=5,
  terminates=False,
  options={},
)

_SIZES = dict(
  latent_size=2,
  encoder_hidden=(6,),
  decoder_hidden=(5,),
  critic_hidden=(7,),
  actor_hidden=(6,),
)

SMAC = smac.Config(
  # A temperature at which weights differ; a high rate, so that the old and
  # the new parameters can be told apart.
  **_SIZES,
  awac_temperature=3.0,
  context_lr=0.01,
  critic_lr=0.02,
  actor_lr=0.01,
  target_rate=0.1,
  offline=smac.OfflineConfig(
    num_updates=4, num_tasks=4, query_size=3, context_size=5
  ),
  online=smac.OnlineConfig(
    num_updates=4, num_tasks=4, query_size=3, context_size=5, task_repeat=2
  ),
)

PEARL = pearl.Config(
  **_SIZES,
  value_hidden=(5,),
  context_lr=0.01,
  critic_lr=0.02,
  value_lr=0.03,
  actor_lr=0.01,
  target_rate=0.1,
  online=pearl.OnlineConfig(
    num_updates=4, num_tasks=4, query_size=3, context_size=5, task_repeat=2
  ),
)


def seeds(keys, **layout):
  """Seeds of these keys, on one device unless `layout` says otherwise."""
  layout = layout or {'max_devices': 1}
  return Seeds(keys, parallel.make_layout(keys.shape[0], **layout))


def shaken(tree, seed=0, scale=0.3):
  """Parameters moved off their small start, so that every term is at work.

  In numpy: what a test computes of them costs no compilation.
  """
  leaves, structure = jax.tree.flatten(tree)
  rng = np.random.default_rng(seed)
  return jax.tree.unflatten(
    structure,
    [
      np.asarray(leaf) + np.float32(scale * rng.normal(size=leaf.shape))
      for leaf in leaves
    ],
  )


_random_transitions = jax.jit(
  probes.random_transitions, static_argnums=(1, 2, 3, 4)
)
_random_batch = jax.jit(probes.random_batch, static_argnums=(1, 2, 3))


def random_transitions(seed, spec, *given):
  """`probes.random_transitions` in numpy, of one program."""
  spec = spec._replace(options=())  # to be hashed
  return jax.device_get(_random_transitions(jax.random.key(seed), spec, *given))


def random_batch(seed, spec, *given):
  """`probes.random_batch` in numpy, of one program."""
  spec = spec._replace(options=())
  return jax.device_get(_random_batch(jax.random.key(seed), spec, *given))


def assert_close(actual, desired, rtol, atol=0.0, leaf_rtol=0.0):
  """Leaf by leaf, with the path of the first leaf that differs.

  `leaf_rtol` is relative to the leaf's largest entry: a sum of float32 terms
  that nearly cancel keeps the rounding error of its terms.
  """
  actual = jax.tree.leaves_with_path(actual)
  desired = jax.tree.leaves_with_path(desired)
  assert [p for p, _ in actual] == [p for p, _ in desired]
  for (path, a), (_, d) in zip(actual, desired):
    inexact = np.issubdtype(numbers(d).dtype, np.floating)
    scale = np.max(np.abs(numbers(d)), initial=0.0) if inexact else 0.0
    np.testing.assert_allclose(
      numbers(a),
      numbers(d),
      rtol=rtol,
      atol=atol + leaf_rtol * scale,
      err_msg=jax.tree_util.keystr(path),
    )


def assert_same(actual, desired):
  """Bit for bit."""
  assert jax.tree.structure(actual) == jax.tree.structure(desired)
  for (path, a), (_, d) in zip(
    jax.tree.leaves_with_path(actual), jax.tree.leaves_with_path(desired)
  ):
    np.testing.assert_array_equal(
      numbers(a), numbers(d), err_msg=jax.tree_util.keystr(path)
    )


def in_numpy(tree):
  """`numbers` of every leaf: to index and cut without compiling anything."""
  return jax.tree.map(numbers, tree)


def largest(tree):
  """Largest absolute value of a tree."""
  return max(float(np.max(np.abs(x))) for x in jax.tree.leaves(tree))
