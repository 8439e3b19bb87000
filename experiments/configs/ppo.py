"""PPO on one training task, from rollouts alone: get_config('point_robot'), ...

`paper` sizes are table 3 of the paper: a million steps of one environment. No
data are logged. The policy does not know tasks, so its scores on the held-out
task are those of a policy for another one; more training tasks
(--config.family.num_train, with as many environments or a multiple) give one
policy for all of them.
"""

from experiments.configs import base

SIZES = {
  'all': {
    'family': {'num_train': 1, 'num_test': 1},
    'online': {
      'iterations': 488,
      'headline': 'ppo',
      'oracle': '',
      'variants': {
        'ppo': {'description': 'on-policy, with the true rewards'},
      },
    },
    'evaluation': {'num_train_tasks': 1, 'every_iterations': 10},
  },
  # Point robots; on robots these are a start, nobody has tuned them.
  'cpu': {
    'ppo': {
      'actor_hidden': (32, 32),
      'value_hidden': (32, 32),
      'initial_std': 0.5,
      'actor_lr': 3e-3,
      'value_lr': 3e-3,
      'discount': 0.9,
      'num_envs': 16,
      'num_steps': 40,
      'num_epochs': 8,
      'num_minibatches': 4,
    },
    'online': {'iterations': 60},
  },
  'smoke': {
    'ppo': {'num_envs': 4, 'num_steps': 8, 'num_epochs': 2},
    'online': {'iterations': 4},
    'evaluation': {'every_iterations': 2},
  },
}
_ROBOT = {
  'cpu': {
    'ppo': {
      'actor_hidden': (64, 64),
      'value_hidden': (64, 64),
      'actor_lr': 1e-3,
      'value_lr': 1e-3,
      'discount': 0.97,
      'num_steps': 128,
      'num_minibatches': 8,
    },
    'online': {'iterations': 100},
  },
}
FAMILIES = {
  family: {} if family.endswith('point_robot') else _ROBOT
  for family in base.FAMILIES
}

get_config = base.config_of('ppo', SIZES, FAMILIES)
