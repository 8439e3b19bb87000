"""BOReL experiments: get_config('cheetah_vel'), ...

Belief and policy see every episode from the first on, so a meta-test has no
episodes under the prior alone: the belief is carried on through all of them.
"""

from experiments.configs import base

# Whole lives, as published: nothing keeps this SAC near its data, so it needs
# to have seen what is worse, too (with their last quarters it stands still).
_WHOLE = {'log_slice': 'all', 'context_size': 0}
# 601 beliefs of 600 steps; fewer updates, each of them longer.
_ROBOT = {
  'cpu': {
    'collect': _WHOLE,
    'borel': {
      'vae': {'num_updates': 1000, 'num_decoded': 10, 'num_sequences': 4},
      'rl': {'num_updates': 8000, 'discount': 0.95},
    },
  }
}
_DYNAMICS = {'all': {'borel': {'relabel_rewards': False}}}
# Published for the sparse point robot.
_POINT = {
  'all': {'borel': {'decode_whole_step': False}},
  'paper': {
    'borel': {
      'vae': {'num_tasks': 8},
      'rl': {
        'critic_hidden': (128, 128),
        'actor_hidden': (128, 128),
        'temperature': 0.01,
        'discount': 0.9,
      },
    }
  },
}
# What SMAC's authors ran it with on the ant.
_ANT = {
  'paper': {'borel': {'rl': {'target_rate': 1e-4, 'learn_temperature': True}}}
}

SIZES = {
  'all': {
    'evaluation': {'num_prior_episodes': 0},
    # As many as a meta-test has (SMAC's comparison: 3 x 200 steps).
    'borel': {'num_episodes': 3},
  },
  'paper': {
    # All 601 beliefs against all 600 rewards take gigabytes.
    'borel': {'vae': {'num_decoded': 50}},
    # Its learners': 50 and 1000 x 2 episodes.
    'collect': {
      'specialists': {
        'env_steps': 410_000,
        'initial_steps': 10_000,
        'steps_per_iteration': 400,
        'sac': {
          'critic_hidden': (128, 128),
          'actor_hidden': (128, 128),
          'num_updates': 2000,
        },
      }
    },
  },
  'cpu': {
    'borel': {
      'gru_size': 64,
      'vae': {'num_updates': 2000, 'learning_rate': 1e-3, 'num_decoded': 20},
      'rl': {
        'critic_hidden': (64, 64),
        'actor_hidden': (64, 64),
        'discount': 0.9,
        'critic_lr': 1e-3,
        'actor_lr': 1e-3,
        'num_updates': 4000,
        'num_tasks': 8,
        'batch_size': 64,
      },
    }
  },
  'smoke': {
    'borel': {
      'gru_size': 16,
      'vae': {'num_updates': 10, 'num_decoded': 4, 'num_sequences': 2},
      'rl': {'num_updates': 20, 'num_tasks': 2, 'batch_size': 16},
    }
  },
}
FAMILIES = {
  'point_robot': _POINT,
  'sparse_point_robot': _POINT,
  'cheetah_vel': _ROBOT,
  'cheetah_dir': _ROBOT,
  'humanoid_dir': _ROBOT,
  'ant_dir': {**_ROBOT, **_ANT},
  'ant_goal': {**_ROBOT, **_ANT},
  'hopper_params': {**_ROBOT, **_DYNAMICS},
  'walker_params': {**_ROBOT, **_DYNAMICS},
}

ABLATIONS = {
  'no_relabelling': {'borel': {'relabel_rewards': False}},
  # In a comparison, whose `cpu` logs of robots are the end of each life.
  'whole_logs': {
    'description': 'all that was logged, as published; data of its own',
    'collect': _WHOLE,
  },
}

get_config = base.config_of('borel', SIZES, FAMILIES, robot_data='sac')
