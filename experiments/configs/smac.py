"""SMAC experiments: get_config('point_robot' | 'cheetah_vel' | 'ant_dir').

Each family lists what differs from the defaults of
`offmeta.training.config.ExperimentConfig` (the published sizes), and each
size profile what differs from the family's own. `matched` is a recipe of this
project, not of the paper; see `MATCHED`.
"""

import copy

import ml_collections

from offmeta.training import config as configs

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


def _merge(base: dict, changes: dict) -> dict:
  """`base` with nested `changes` applied; neither argument is altered."""
  merged = copy.deepcopy(base)
  for key, value in changes.items():
    if isinstance(value, dict) and isinstance(merged.get(key), dict):
      merged[key] = _merge(merged[key], value)
    else:
      merged[key] = copy.deepcopy(value)
  return merged


ORACLE = _merge(MATCHED, {
    'description': 'oracle: as matched, with true rewards online',
    'online': TRUE_REWARDS,
})
RELEASED_ORACLE = _merge(RELEASED, {
    'description': 'oracle: released recipe with true rewards online',
    'online': TRUE_REWARDS,
})
OFFLINE_CONTEXTS = _merge(MATCHED, {
    'description': 'ablation: as matched, contexts from offline data only',
    'smac': {'online': {'context': 'offline'}},
})
VARIANTS = {
    'matched': MATCHED,
    'oracle': ORACLE,
    'released': RELEASED,
    'offline_contexts': OFFLINE_CONTEXTS,
}


def _widths(size: int) -> dict:
  """Networks of one width for the small profiles."""
  three = (size,) * 3
  return {
      'encoder_hidden': (size,) * 2,
      'decoder_hidden': (size,) * 2,
      'critic_hidden': three,
      'actor_hidden': three,
  }


POINT_ROBOT = {
    'family': {
        'name': 'point_robot',
        'options': {'goals': 'semicircle'},
        'task_list': 'default',
        'num_train': 32,
        'num_test': 20,
    },
    'collect': {
        'iterations': 40,
        'initial_steps': 200,
        'rl_size': 800,
        'gather': {
            'tasks_per_iteration': 16,
            'prior_steps': 40,
            'posterior_steps': 60,
            'context_size': 64,
        },
        'behaviour': {
            **_widths(64),
            'value_hidden': (64, 64, 64),
            'online': {
                'num_updates': 250,
                'num_tasks': 8,
                'query_size': 64,
                'context_size': 40,
                'task_repeat': 1,
            },
        },
    },
    'smac': {
        **_widths(64),
        'awac_temperature': 5.0,
        'offline': {
            'num_updates': 4000,
            'num_tasks': 8,
            'query_size': 32,
            'context_size': 64,
        },
        'online': {
            'num_updates': 2000,
            'num_tasks': 8,
            'query_size': 32,
            'context_size': 64,
            'task_repeat': 1,
            'sequence_size': 40,
        },
    },
    'online': {
        'iterations': 4,
        'headline': 'matched',
        'oracle': 'oracle',
        'variants': VARIANTS,
        'gather': {
            'tasks_per_iteration': 32,
            'prior_steps': 40,
            'posterior_steps': 60,
            'context_size': 64,
            'label_context_size': 64,
        },
    },
    'evaluation': {
        'num_repeats': 4,
        'num_steps': 60,
        'context_size': 64,
        'num_train_tasks': 32,
        'every_updates': 1000,
    },
}
FAMILIES = {
    'point_robot': (POINT_ROBOT, {}),
}


def get_config(family: str = 'point_robot') -> ml_collections.ConfigDict:
  """The configuration of a family, with its size profiles under 'profiles'.

  Raises:
    ValueError: an unknown family; names the known ones.
  """
  if family not in FAMILIES:
    raise ValueError(
        f'no config for family {family!r}; known: {", ".join(FAMILIES)}')
  changes, profiles = FAMILIES[family]
  base = configs.from_dict(changes)
  config = ml_collections.ConfigDict(configs.to_dict(base))
  config.profiles = ml_collections.ConfigDict(profiles)
  return config
