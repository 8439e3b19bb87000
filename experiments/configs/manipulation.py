"""`manipulation`, our stand-in for SMAC's Sawyer domain; for any algorithm.

Published (SMAC's appendix): scripted data, 50 episodes of 75 steps per task,
50 training and 10 test tasks.
"""

from experiments.configs import recipes

EPISODE = 75

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
  'evaluation': {'num_steps': 3 * EPISODE, 'every_iterations': 5},
}
CPU = {
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
    'evaluation': {'every_iterations': 1},
  },
)

FAMILIES = {
  'manipulation': (MANIPULATION, {'smoke': SMOKE, 'cpu': CPU, 'paper': {}}),
}
