"""What the families' experiments share: variants, ablations and sizes."""

from collections.abc import Mapping
import copy
import math

# Ours. The released recipe draws training contexts as loose transitions and
# freezes the encoder online. At meta-test the context is something else: all
# steps of a few whole episodes that the policy collected under the prior. So
# (1) online training contexts are composed like that, (2) encoder and decoder
# keep training on self-labelled data, labels coming from a copy taken at the
# phase switch. README and BUILD_NOTES.md show what each part adds.
MATCHED = {
  'description': (
    'ours: contexts composed as at meta-test, encoder and decoder trained'
    ' online on self-labelled data'
  ),
  'smac': {
    'train_context_online': True,
    'online': {'context': 'episodes'},
  },
}
RELEASED = {'description': 'released recipe: loose contexts, frozen encoder'}
_TRUE_REWARDS = {'online': {'gather': {'rewards': 'true'}}}


def merge(base: Mapping, changes: Mapping) -> dict:
  """`base` with nested `changes` applied; neither argument is altered."""
  merged = copy.deepcopy(dict(base))
  for key, value in changes.items():
    if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
      merged[key] = merge(merged[key], value)
    else:
      merged[key] = copy.deepcopy(value)
  return merged


# What a recipe is changed by: name -> (in words, changes).
_CHANGES = {
  'oracle': ('with true rewards online', _TRUE_REWARDS),
  'offline_contexts': (
    'contexts from offline data only',
    {'smac': {'online': {'context': 'offline'}}},
  ),
  'no_q': (
    'the online actor without its term of Q (pure AWAC)',
    {'smac': {'online_q_weight': 0.0}},
  ),
  'half_online': (
    'half of the query transitions from online, however much there is',
    {'smac': {'online': {'online_share': 0.5}}},
  ),
  'no_self_supervision': (
    'as many more updates on the offline data alone',
    {'smac': {'online': {'online_share': 0.0, 'context': 'offline'}}},
  ),
}


def _changed(recipe: dict, name: str, prefix: str) -> dict:
  words, changes = _CHANGES[name]
  kind = 'oracle' if name == 'oracle' else 'ablation'
  description = f'{kind}: {prefix}, {words}'
  return merge(merge(recipe, changes), {'description': description})


# Every variant of the online phase, all from one offline phase, which is itself
# SMAC without self-supervision as the paper shows it (its online step 0). What
# ends in `_released` changes the released recipe `smac`, the others `matched`.
ONLINE_VARIANTS = {
  'matched': MATCHED,
  'smac': RELEASED,
  **{name: _changed(MATCHED, name, 'as matched') for name in _CHANGES},
  **{
    f'{name}_released': _changed(RELEASED, name, 'released recipe')
    for name in _CHANGES
  },
  # The two parts of `matched`, each left out.
  'frozen': merge(
    MATCHED,
    {
      'description': 'ablation: as matched, encoder and decoder frozen',
      'smac': {'train_context_online': False},
    },
  ),
  'loose_contexts': merge(
    MATCHED,
    {
      'description': 'ablation: as matched, contexts of loose transitions',
      'smac': {'online': {'context': 'transitions'}},
    },
  ),
  # What the released code's own switch for true rewards does.
  'oracle_trained': merge(
    RELEASED,
    {
      'description': (
        'oracle: released recipe with true rewards online, encoder and'
        ' decoder trained on them'
      ),
      'smac': {'train_context_online': True},
      **_TRUE_REWARDS,
    },
  ),
}

# Ablations that change the offline phase too: experiments of their own, with
# all variants. Name -> changes to the whole experiment; on the command line
# e.g. --config.smac.actor=sac.
ABLATIONS = {
  'sac_actor': {
    'description': "PEARL's SAC actor instead of AWAC, in both phases",
    'smac': {'actor': 'sac'},
  },
  'q_encoder': {
    'description': 'encoder trained by the TD error instead of the reward',
    'smac': {'encoder_loss': 'q'},
  },
  'both_encoder': {
    'description': 'encoder trained by reward and TD error',
    'smac': {'encoder_loss': 'both'},
  },
  'meta_bc': {
    'description': 'meta behaviour cloning: uniform weights, no Q term',
    'smac': {'awac_temperature': math.inf, 'online_q_weight': 0.0},
  },
}

ORACLE = ONLINE_VARIANTS['oracle']
VARIANTS = {
  name: ONLINE_VARIANTS[name]
  for name in ('matched', 'oracle', 'smac', 'offline_contexts')
}
PAPER_VARIANTS = {
  'smac': RELEASED,
  'oracle': ONLINE_VARIANTS['oracle_released'],
  'matched': MATCHED,
}


def widths(size: int) -> dict:
  """Networks of one width for the small profiles."""
  three = (size,) * 3
  return {
    'encoder_hidden': (size,) * 2,
    'decoder_hidden': (size,) * 2,
    'critic_hidden': three,
    'actor_hidden': three,
  }


def specialists(
  env_steps: int,
  initial_steps: int,
  per_iteration: int,
  updates: int,
  width: int,
  batch_size: int,
  discount: float,
  lr: float = 3e-3,
  target_rate: float = 0.02,
) -> dict:
  """Settings of `collect.source='sac'` for the small profiles."""
  return {
    'env_steps': env_steps,
    'initial_steps': initial_steps,
    'steps_per_iteration': per_iteration,
    'num_evaluations': 8,
    'num_episodes': 2,
    'sac': {
      'critic_hidden': (width, width),
      'actor_hidden': (width, width),
      'critic_lr': lr,
      'actor_lr': lr,
      'temperature_lr': lr,
      'discount': discount,
      'target_rate': target_rate,
      'batch_size': batch_size,
      'num_updates': updates,
    },
  }


SMOKE = {
  'num_seeds': 2,
  'chunk': 10,
  'family': {'num_train': 4, 'num_test': 3},
  'collect': {
    'iterations': 2,
    'gather': {'tasks_per_iteration': 4},
    'behaviour': {'online': {'num_updates': 10}},
    'specialists': specialists(600, 200, 200, 4, 16, 16, 0.9),
  },
  'evaluation': {'num_repeats': 2, 'num_train_tasks': 4, 'every_updates': 10},
}
