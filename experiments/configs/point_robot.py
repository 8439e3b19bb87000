"""Point robots: tasks, data, evaluation; for any algorithm."""

from experiments.configs import recipes

# For rewards of magnitude 1, 20-step episodes and few updates.
SMALL = {
  'discount': 0.9,
  'kl_weight': 0.003,
  'context_lr': 1e-3,
  'critic_lr': 1e-3,
  'actor_lr': 1e-3,
}
POINT_ROBOT = {
  'num_seeds': 6,
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
    'log_size': 800,
    'gather': {
      'tasks_per_iteration': 16,
      'prior_steps': 40,
      'posterior_steps': 60,
      'context_size': 64,
    },
    'specialists': recipes.specialists(
      3000, 400, 100, 100, width=64, batch_size=64, discount=0.9
    ),
    'behaviour': {
      **recipes.widths(64),
      'value_hidden': (64, 64, 64),
      **SMALL,
      'value_lr': 1e-3,
      # One latent per episode, as in PEARL's first release: prior
      # episodes then head for other tasks' goals, and a task's data
      # leave the task ambiguous given the state.
      'latent_resample_period': 0,
      'online': {
        'num_updates': 250,
        'num_tasks': 8,
        'query_size': 64,
        'context_size': 40,
        'task_repeat': 1,
      },
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
_PUBLISHED_NETS = {
  'encoder_hidden': (200, 200, 200),
  'decoder_hidden': (64, 64),
  'critic_hidden': (300, 300, 300),
  'actor_hidden': (300, 300, 300),
}

# PEARL's point robot (goals in a square, reward scale 100) at published network
# and batch sizes.
PUBLISHED = {
  **_PUBLISHED_NETS,
  'discount': 0.99,
  'kl_weight': 0.1,
  'context_lr': 3e-4,
  'critic_lr': 3e-4,
  'actor_lr': 3e-4,
  'reward_scale': 100.0,
}
POINT_ROBOT_PAPER = {
  'family': {
    'options': {'goals': 'square'},
    'task_list': 'pearl',
    'num_train': 80,
    'num_test': 20,
  },
  'collect': {
    'iterations': 50,
    'log_size': 400,
    'gather': {
      'tasks_per_iteration': 40,
      'prior_steps': 200,
      'posterior_steps': 200,
    },
    'behaviour': {
      **PUBLISHED,
      'value_hidden': (300, 300, 300),
      'value_lr': 3e-4,
      'online': {
        'num_updates': 1000,
        'num_tasks': 16,
        'query_size': 256,
        'context_size': 64,
      },
    },
  },
  'evaluation': {'num_train_tasks': 20, 'every_updates': 10_000},
}

# The sparse reward serves contexts, losses and scores alike (in PEARL the
# losses see the dense one; a family has one reward here).
_SPARSE = {'family': {'name': 'sparse_point_robot'}}

_PROFILES = {
  'smoke': recipes.merge(recipes.SMOKE, {'collect': {'log_size': 200}}),
  'cpu': {},
  'paper': POINT_ROBOT_PAPER,
}
FAMILIES = {
  'point_robot': (POINT_ROBOT, _PROFILES),
  'sparse_point_robot': (
    recipes.merge(POINT_ROBOT, _SPARSE),
    {
      **_PROFILES,
      # oyster's sparse point robot: the semicircle's 80 and 20 goals.
      'paper': recipes.merge(
        POINT_ROBOT_PAPER, {'family': {'options': {'goals': 'semicircle'}}}
      ),
    },
  ),
}
