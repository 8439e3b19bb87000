"""What the families' experiments share: variants and sizes."""

import copy

# Ours. The released recipe draws training contexts as loose transitions and
# freezes the encoder online. At meta-test the context is something else: all
# steps of a few whole episodes that the policy collected under the prior. So
# (1) online training contexts are composed like that, (2) encoder and decoder
# keep training on self-labelled data, labels coming from a copy taken at the
# phase switch. README and BUILD_NOTES.md show what each part adds.
MATCHED = {
    'description': (
        'ours: contexts composed as at meta-test, encoder and decoder trained'
        ' online on self-labelled data'),
    'smac': {
        'train_context_online': True,
        'online': {'context': 'episodes'},
    },
}
RELEASED = {'description': 'released recipe: loose contexts, frozen encoder'}
TRUE_REWARDS = {'gather': {'rewards': 'true'}}


def merge(base: dict, changes: dict) -> dict:
  """`base` with nested `changes` applied; neither argument is altered."""
  merged = copy.deepcopy(base)
  for key, value in changes.items():
    if isinstance(value, dict) and isinstance(merged.get(key), dict):
      merged[key] = merge(merged[key], value)
    else:
      merged[key] = copy.deepcopy(value)
  return merged


ORACLE = merge(MATCHED, {
    'description': 'oracle: as matched, with true rewards online',
    'online': TRUE_REWARDS,
})
RELEASED_ORACLE = merge(RELEASED, {
    'description': 'oracle: released recipe with true rewards online',
    'online': TRUE_REWARDS,
})
OFFLINE_CONTEXTS = merge(MATCHED, {
    'description': 'ablation: as matched, contexts from offline data only',
    'smac': {'online': {'context': 'offline'}},
})
VARIANTS = {
    'matched': MATCHED,
    'oracle': ORACLE,
    'smac': RELEASED,
    'offline_contexts': OFFLINE_CONTEXTS,
}
PAPER_VARIANTS = {
    'smac': RELEASED,
    'oracle': RELEASED_ORACLE,
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


SMOKE = {
    'num_seeds': 2,
    'chunk': 10,
    'family': {'num_train': 4, 'num_test': 3},
    'collect': {
        'iterations': 2,
        'gather': {'tasks_per_iteration': 4},
        'behaviour': {'online': {'num_updates': 10}},
    },
    'smac': {'offline': {'num_updates': 20}, 'online': {'num_updates': 10}},
    'online': {'iterations': 2, 'gather': {'tasks_per_iteration': 4}},
    'evaluation': {
        'num_repeats': 2, 'num_train_tasks': 4, 'every_updates': 10},
}
