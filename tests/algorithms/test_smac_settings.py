"""SMAC's settings: the contract, what is refused, and the named recipes."""

import dataclasses

import helpers
import jax
import numpy as np
import pytest

from experiments.configs import recipes
from offmeta import testing
from offmeta.algorithms import smac
from offmeta.training import config as configs
from offmeta.types import Problem

SPEC, CONFIG = helpers.SPEC, helpers.SMAC


def _with(**changes):
  return dataclasses.replace(CONFIG, **changes)


@pytest.mark.parametrize(
  'changes',
  [
    dict(actor='sac', encoder_loss='q', train_context_online=True),
    dict(awac_temperature=np.inf, online_q_weight=0.0, encoder_loss='both'),
  ],
  ids=str,
)
def test_contract(changes):
  testing.check_algorithm(smac.make, _with(**changes), SPEC, quick=True)


_STAGE, _SAC = CONFIG.online, smac.SacActorConfig


@pytest.mark.parametrize(
  'changes, message',
  [
    (dict(kl_over_tasks='median'), "kl_over_tasks: 'median'; choose .*sum"),
    (dict(label_with='x'), "label_with: 'x'; choose .*current"),
    (dict(label_with='current', train_context_online=True), 'drifting'),
    (dict(actor='bc'), "smac.actor: 'bc'; choose .*awac, sac"),
    (dict(encoder_loss='kl'), "encoder_loss: 'kl'; choose .*reward, q"),
    (dict(awac_temperature=0.0), 'awac_temperature: must be above 0'),
    (dict(awac_temperature=np.nan), 'awac_temperature: must be a finite'),
    (dict(awac_weight=-1.0), 'smac.awac_weight: must be at least 0'),
    (dict(online_q_weight=-1.0), 'online_q_weight: must be at least 0'),
    (
      dict(sac=_SAC(entropy_weight=-1.0)),
      'sac.entropy_weight: must be at least 0',
    ),
    (dict(awac_weight=0.0, online_q_weight=0.0), 'nothing would train'),
    (
      dict(online=dataclasses.replace(_STAGE, context='any')),
      "smac.online.context: 'any'; choose .*episodes",
    ),
    (
      dict(online=dataclasses.replace(_STAGE, online_share=1.5)),
      'online_share: must be from 0 to 1, or -1',
    ),
    (
      dict(online=dataclasses.replace(_STAGE, online_share=-0.5)),
      'online_share: must be from 0 to 1, or -1',
    ),
    (
      dict(online=dataclasses.replace(_STAGE, offline_share=2.0)),
      'offline_share: must be at most 1',
    ),
    (
      dict(online=dataclasses.replace(_STAGE, task_repeat=0)),
      'smac.online.task_repeat: must be at least 1, not 0',
    ),
    (
      dict(offline=dataclasses.replace(CONFIG.offline, query_size=0)),
      'smac.offline.query_size: must be at least 1, not 0',
    ),
  ],
)
def test_bad_settings_raise(changes, message):
  with pytest.raises(ValueError, match=message):
    smac.make(Problem(SPEC), _with(**changes))


def test_the_online_share_reaches_the_sampler():
  online = dataclasses.replace(_STAGE, online_share=0.25)
  algorithm = smac.make(Problem(SPEC), _with(online=online))
  assert algorithm.loop('online').stages[0].batch.query.online_share == 0.25
  assert algorithm.loop('offline').stages[0].batch.query.online_share == -1
  assert (
    smac.make(Problem(SPEC), CONFIG)
    .loop('online')
    .stages[0]
    .batch.query.online_share
    == -1
  )


# Names.

# True rewards, encoder and decoder trained, contexts, online share, Q term.
_ONLINE = {
  'smac': (False, False, 'transitions', -1, 1),
  'matched': (False, True, 'episodes', -1, 1),
  'oracle': (True, True, 'episodes', -1, 1),
  'oracle_released': (True, False, 'transitions', -1, 1),
  'oracle_trained': (True, True, 'transitions', -1, 1),
  'offline_contexts': (False, True, 'offline', -1, 1),
  'offline_contexts_released': (False, False, 'offline', -1, 1),
  'loose_contexts': (False, True, 'transitions', -1, 1),
  'frozen': (False, False, 'episodes', -1, 1),
  'no_q': (False, True, 'episodes', -1, 0),
  'no_q_released': (False, False, 'transitions', -1, 0),
  'half_online': (False, True, 'episodes', 0.5, 1),
  'half_online_released': (False, False, 'transitions', 0.5, 1),
  'no_self_supervision': (False, True, 'offline', 0, 1),
  'no_self_supervision_released': (False, False, 'offline', 0, 1),
}


def test_online_variants_are_what_they_are_called():
  config = configs.from_dict({'online': {'variants': recipes.ONLINE_VARIANTS}})
  configs.validate(config)
  described = {}
  for name in recipes.ONLINE_VARIANTS:
    changed = configs.variant(config, name)
    settings = changed.settings
    described[name] = (
      changed.online.gather.rewards == 'true',
      settings.train_context_online,
      settings.online.context,
      settings.online.online_share,
      settings.online_q_weight,
    )
    for field in smac.VARIANT_FIXED:
      assert getattr(settings, field) == getattr(config.settings, field)
  assert described == _ONLINE
  descriptions = [
    variant['description'] for variant in recipes.ONLINE_VARIANTS.values()
  ]
  assert len(set(descriptions)) == len(descriptions)


def test_ablations_are_experiments_of_their_own():
  base = {'online': {'variants': recipes.ONLINE_VARIANTS}}
  default = configs.from_dict(base)
  expected = {
    'sac_actor': {'actor': 'sac'},
    'q_encoder': {'encoder_loss': 'q'},
    'both_encoder': {'encoder_loss': 'both'},
    'meta_bc': {'awac_temperature': np.inf, 'online_q_weight': 0.0},
  }
  assert set(recipes.ABLATIONS) == set(expected)
  for name, ablation in recipes.ABLATIONS.items():
    changes = {k: v for k, v in ablation.items() if k != 'description'}
    config = configs.from_dict(recipes.merge(base, changes))
    configs.validate(config)
    assert config == dataclasses.replace(
      default, settings=dataclasses.replace(default.settings, **expected[name])
    )


@pytest.mark.parametrize(
  'changes',
  [
    {'actor': 'sac'},
    {'encoder_loss': 'q'},
    {'latent_size': 3},
    {'critic_hidden': (5,)},
    {'offline': {'num_updates': 1}},
    {'use_next_observation': True},
    {'latent_resample_period': 0},
  ],
  ids=str,
)
def test_a_variant_cannot_change_the_offline_phase(changes):
  (field,) = changes
  assert field in smac.VARIANT_FIXED
  variants = {**recipes.PAPER_VARIANTS, 'mine': {'smac': changes}}
  with pytest.raises(configs.ConfigError, match=f'mine.*{field}'):
    configs.validate(configs.from_dict({'online': {'variants': variants}}))


def test_last_biases_can_start_at_zero():
  """As released; the default is the older rule, and so are its numbers."""
  start = lambda zero: (
    jax.jit(smac.make(Problem(SPEC), _with(zero_last_bias=zero)).init)(
      jax.random.key(0)
    ).params
  )
  old, new = start(False), start(True)
  changed = [
    (leaf, was)
    for leaf, was in zip(*map(jax.tree.leaves, (new, old)))
    if not np.array_equal(leaf, was)
  ]
  # Encoder, decoder, two critics, the actor's mean.
  assert len(changed) == 5
  for leaf, was in changed:
    assert not leaf.any() and 0 < np.abs(was).max() <= 3e-3
