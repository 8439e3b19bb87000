"""MACAW experiments: get_config('cheetah_dir'), get_config('cheetah_vel'), ...

Its data are whole lives of one SAC learner per task, so that is the source
here; `paper` sizes are the authors'.
"""

from experiments.configs import base

SIZES = {
  'cpu': {
    'macaw': {
      'hidden': (64, 64, 64),
      'latent_size': 32,
      'discount': 0.9,
      'policy_lr': 1e-3,
      'value_lr': 1e-3,
      'step_size_lr': 1e-2,
      'inner_policy_lr': 1e-2,
      'inner_value_lr': 1e-2,
      'stride': 1,
      'num_updates': 4000,
      'num_tasks': 8,
      'context_size': 64,
      'query_size': 64,
      'context_rows': 100,  # of `context_part`
      # With `--config.finetune.iterations`: fewer and larger steps.
      'finetune': {
        'lr': 3e-4,
        'value_updates': 10,
        'policy_updates': 20,
        'batch_size': 64,
      },
    }
  },
  'smoke': {
    'macaw': {
      'hidden': (16, 16, 16),
      'latent_size': 8,
      'num_updates': 20,
      'num_tasks': 2,
      'context_size': 16,
      'query_size': 16,
      'context_rows': 100,
    }
  },
  'paper': {
    # 500 episodes of 200 steps, the first 25 before any update; scores
    # fall on 10,000 and 20,000 steps.
    'finetune': {'iterations': 475, 'every_iterations': 5},
  },
}
FAMILIES = {
  'cheetah_dir': {
    'all': {'macaw': {'num_tasks': 2}},
    'cpu': {'macaw': {'num_tasks': 2}},
  },
}
# Data quality: parts of the logs that there are. At `cpu` those of robots are
# the last quarter of each life; for parts of whole lives, as published, set
# collect.log_slice to 'all'.
ABLATIONS = {
  'no_head': {'macaw': {'advantage_coef': 0.0}},
  'bias_linear': {'macaw': {'layer': 'bias_linear'}},
  **{
    f'{part}_data': {'macaw': {'context_part': part}}
    for part in ('first', 'middle', 'last')
  },
}

get_config = base.config_of('macaw', SIZES, FAMILIES, data='sac')
