"""Multi-task training with fine-tuning at meta-test: MACAW's data."""

from experiments.configs import base, robots

SIZES = {
  'cpu': {
    'multitask': {
      'hidden': (64, 64, 64),
      'discount': 0.9,
      'policy_lr': 1e-3,
      'value_lr': 1e-3,
      'finetune_policy_lr': 3e-3,
      'finetune_value_lr': 3e-3,
      'stride': 1,
      'num_updates': 4000,
      'num_tasks': 8,
      'query_size': 64,
    }
  },
  'smoke': {
    'multitask': {
      'hidden': (16, 16, 16),
      'num_updates': 20,
      'num_tasks': 2,
      'query_size': 16,
    }
  },
}
# Fewer updates than the published million leave more to be learnt.
_ROBOT = {'cpu': {'multitask': {'finetune_steps': 100}}}
FAMILIES = {
  **dict.fromkeys(robots.FAMILIES, _ROBOT),
  'cheetah_dir': {
    'all': {'multitask': {'num_tasks': 2}},
    'cpu': {'multitask': {'num_tasks': 2, 'finetune_steps': 100}},
  },
}

get_config = base.config_of('multitask', SIZES, FAMILIES, data='sac')
