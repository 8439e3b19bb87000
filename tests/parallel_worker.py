"""Ten updates of every algorithm; one of two processes that share them out."""

import dataclasses
import types

import connect
import helpers
import jax
import jax.numpy as jnp
import numpy as np

from offmeta import parallel, processes
from offmeta.algorithms import (
  borel,
  focal,
  macaw,
  meta_bc,
  multitask,
  pearl,
  sac,
  smac,
)
from offmeta.data import buffer as buffers
from offmeta.data.buffer import Replay
from offmeta.testing import probes
from offmeta.training import updates
from offmeta.training.seeds import Seeds
from offmeta.training.setup import Runtime
from offmeta.types import DataSpec, Problem

NUM_SEEDS = NUM_TASKS = 4
UPDATES = 10
_COLD = dataclasses.replace(helpers.SMAC, awac_temperature=0.1)
_OURS = dataclasses.replace(
  _COLD,
  train_context_online=True,
  kl_over_tasks='sum',
  encoder_loss='both',
  online=dataclasses.replace(_COLD.online, context='episodes', sequence_size=8),
)
_SAC = sac.Config(
  critic_hidden=(7,),
  actor_hidden=(6,),
  critic_lr=0.02,
  actor_lr=0.01,
  temperature_lr=0.01,
  target_rate=0.1,
  batch_size=3,
)
_BOREL = borel.Config(
  latent_size=2,
  gru_size=6,
  observation_embedding=5,
  action_embedding=3,
  reward_embedding=4,
  decoder_hidden=(5,),
  kl_weight=0.3,
  vae=borel.VaeConfig(
    num_tasks=4, num_sequences=2, num_decoded=4, learning_rate=1e-3
  ),
  rl=borel.RlConfig(
    critic_hidden=(7,),
    actor_hidden=(6,),
    critic_lr=0.02,
    actor_lr=0.01,
    temperature_lr=0.05,
    target_rate=0.1,
    num_tasks=4,
    batch_size=3,
  ),
)
_OFFLINE = dict(
  latent_size=2,
  encoder_hidden=(6,),
  critic_hidden=(7,),
  actor_hidden=(6,),
  value_hidden=(5,),
  divergence_hidden=(5,),
  context_lr=0.01,
  critic_lr=0.02,
  actor_lr=0.01,
  value_lr=0.03,
  divergence_lr=0.01,
  target_rate=0.1,
  num_tasks=4,
  query_size=3,
  context_size=5,
)
_MAML = dict(
  hidden=(6,), latent_size=3, policy_lr=1e-3, num_tasks=4, query_size=4
)
_MACAW = macaw.Config(
  **_MAML,
  head_hidden=4,
  value_lr=1e-3,
  inner_policy_lr=0.02,
  inner_value_lr=0.02,
  advantage_coef=0.3,
  # Few rows have a small spread in places, by which rounding is divided.
  adv_std_eps=1.0,
  context_size=5,
)

PROBLEM = Problem(helpers.SPEC, 6)
# Name -> (make, config, phase, number of the stage). Updates of CSRO, UNICORN
# and, with more settings, FOCAL are put on four devices in their own tests.
CASES = {
  'smac offline': (smac.make, _COLD, 'offline', 0),
  'smac online': (smac.make, _OURS, 'online', 0),
  'smac sac': (
    smac.make,
    dataclasses.replace(
      helpers.SMAC,
      actor='sac',
      encoder_loss='q',
      train_context_online=True,
      online=dataclasses.replace(helpers.SMAC.online, online_share=0.5),
    ),
    'online',
    0,
  ),
  'pearl': (pearl.make, helpers.PEARL, 'online', 0),
  'sac': (sac.make, _SAC, 'online', 0),
  'macaw': (macaw.make, _MACAW, 'offline', 0),
  'meta_bc': (
    meta_bc.make,
    meta_bc.Config(**_MAML, context_size=5),
    'offline',
    0,
  ),
  'multitask': (
    multitask.make,
    multitask.Config(**_MAML, value_lr=1e-3),
    'offline',
    0,
  ),
  'borel vae': (borel.make, _BOREL, 'offline', 0),
  'borel rl': (borel.make, _BOREL, 'offline', 1),
  'focal': (focal.make, focal.Config(**_OFFLINE), 'offline', 0),
}
# Case, and what the two processes share out. Every kind of exchange is there:
# means, SMAC's softmax over all tasks, FOCAL's gathered embeddings.
SPLIT = (
  ('smac online', 'tasks'),
  ('focal', 'tasks'),
  ('smac online', 'seeds'),
)


def make_replay():
  """Tasks of very different reward and action, so that advantages differ."""
  data = jax.jit(
    lambda key: probes.random_transitions(
      key, helpers.SPEC, (6, 30), DataSpec(0.99, sequence_episodes=2)
    )
  )(jax.random.key(1))
  scale = 4.0 * jnp.arange(6.0)[:, None]
  data = data._replace(
    reward=data.reward * scale - scale,
    action=jnp.clip(data.action + 0.2 * scale[..., None] - 2.0, -1, 1),
  )
  buffer = buffers.make(data, jnp.full(6, 30), 30, 2)
  for task in range(6):
    buffer = buffers.record_sequence(buffer, task, jnp.int32(3), jnp.int32(9))
  return Replay(buffer, None)


def run(case, replay, **layout):
  """The states [S] of this process's seeds, before and after, and metrics.

  Args:
    case: name in `CASES`.
    replay: of `make_replay`.
    **layout: options of `parallel.make_layout`.
  """
  make, config, phase, number = CASES[case]

  def make_stage(axis_name):
    stage = make(PROBLEM, config, axis_name).loop(phase).stages[number]
    # SAC's own meta-batch is one task; its update takes any number.
    return stage._replace(batch=stage.batch._replace(num_tasks=NUM_TASKS))

  keys = jax.random.split(jax.random.key(0), NUM_SEEDS)
  seeds = Seeds(keys, parallel.make_layout(NUM_SEEDS, NUM_TASKS, **layout))
  start = jax.jit(jax.vmap(make(PROBLEM, config).init))(keys)
  start = start.replace(params=helpers.shaken(start.params))
  start = jax.tree.map(seeds.mine, start)
  update = updates.make_update(make_stage, seeds, UPDATES, shared_replay=True)
  stage, extras = make_stage(None), {}
  if stage.annotate is not None:
    extras = updates.annotate(
      types.SimpleNamespace(runtime=Runtime()), seeds, stage, start, replay
    )
  copied = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))(start)
  return start, *update(copied, replay, extras)


def by_path(tree):
  """{path: numpy array} of every leaf."""
  return {
    jax.tree_util.keystr(path): helpers.numbers(leaf)
    for path, leaf in jax.tree.leaves_with_path(tree)
  }


def main(folder):
  replay = make_replay()
  for case, share in SPLIT:
    layout = parallel.make_layout(NUM_SEEDS, NUM_TASKS, share=share)
    over = {device.process_index for device in layout.devices}
    if share == 'tasks':
      assert over == {0, 1} and len(layout.devices) == 4 and not layout.split
    else:
      assert over == {jax.process_index()} and layout.split
    _, *result = run(case, replay, share=share)
    # Process after process: all seeds once, or, with shared tasks, twice.
    arrays = {
      name: processes.concatenate(leaf)
      for name, leaf in by_path(result).items()
    }
    if processes.is_main():
      np.savez(folder / f'{case} {share}.npz', **arrays)


if __name__ == '__main__':
  connect.run(main)
