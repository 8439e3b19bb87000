"""SMAC on `manipulation`, our stand-in for the paper's Sawyer domain.

Published (spec smac 3.2, 4): scripted data, 50 episodes of 75 steps per task,
50 training and 10 test tasks, AWAC temperature 0.3, reward scale 1, no Q term
in the actor's loss. Two prior and three further episodes per visit, as in the
other families; the number of online iterations is not known.
"""

from experiments.configs import recipes

_EPISODE = 75

MANIPULATION = {
  'chunk': 250,
  'num_seeds': 4,
  'family': {
    'name': 'manipulation',
    'task_list': 'smac',
    'num_train': 50,
    'num_test': 10,
  },
  'collect': {'source': 'script', 'script_episodes': 50},
  'smac': {
    'awac_temperature': 0.3,
    'reward_scale': 1.0,
    'online_q_weight': 0.0,
    'online': {'sequence_size': 2 * _EPISODE},
  },
  'online': {
    'iterations': 50,
    'share_buffer': True,
    'gather': {
      'prior_steps': 2 * _EPISODE,
      'posterior_steps': 3 * _EPISODE,
    },
    'variants': recipes.PAPER_VARIANTS,
  },
  'evaluation': {'num_steps': 3 * _EPISODE, 'every_iterations': 5},
}
CPU = {
  'smac': {
    **recipes.widths(128),
    'context_lr': 1e-3,
    'critic_lr': 1e-3,
    'actor_lr': 1e-3,
    'target_rate': 0.01,
    'offline': {'num_updates': 5000, 'query_size': 64},
    'online': {'num_updates': 1000, 'query_size': 64},
  },
  'online': {
    'iterations': 3,
    'headline': 'matched',
    'gather': {'tasks_per_iteration': 25},
    'variants': {
      'matched': recipes.MATCHED,
      'oracle': recipes.ORACLE,
      'smac': recipes.RELEASED,
    },
  },
  'evaluation': {
    'num_train_tasks': 10,
    'every_updates': 5000,
    'every_iterations': 3,
  },
}
SMOKE = recipes.merge(
  recipes.merge(CPU, recipes.SMOKE),
  {
    'num_seeds': 1,
    'collect': {'script_episodes': 2},
    'online': {'iterations': 1},
    'evaluation': {'every_iterations': 1},
  },
)

FAMILIES = {
  'manipulation': (MANIPULATION, {'smoke': SMOKE, 'cpu': CPU, 'paper': {}}),
}
