"""CSRO experiments: get_config('cheetah_vel'), ..."""

from experiments.configs import base, focal

_settings = lambda published, **cpu: focal.settings('csro', published, **cpu)
_POINT = _settings(
  {
    **focal.POINT,
    'mi_weight': 25.0,
    'context_size': 1024,
    'num_updates': 65_000,
  },
  latent_size=5,
  reward_scale=5.0,
)
_ROBOT = focal.ROBOT

FAMILIES = {
  'point_robot': _POINT,
  'sparse_point_robot': _POINT,
  'cheetah_vel': _settings({}, **_ROBOT),
  'cheetah_dir': _settings({}, **_ROBOT),
  'ant_dir': _settings({}, **_ROBOT),
  'ant_goal': _settings(
    {
      'num_tasks': 10,
      'mi_weight': 50.0,
      'context_size': 512,
      'divergence_weight': 500.0,
      'num_updates': 210_000,
    },
    **_ROBOT,
  ),
  'humanoid_dir': _settings(
    {
      'mi_weight': 50.0,
      'context_size': 256,
      'divergence_weight': 500.0,
    },
    **_ROBOT,
  ),
  'walker_params': _settings(
    {
      'mi_weight': 25.0,
      'context_size': 256,
      'latent_size': 40,
      'max_divergence_weight': 1e4,
      'use_next_observation': True,
    },
    **_ROBOT,
  ),
  'hopper_params': _settings(
    {
      'mi_weight': 25.0,
      'context_size': 256,
      'max_divergence_weight': 1e4,
      'use_next_observation': True,
    },
    **_ROBOT,
  ),
}

# What is left of it without its mechanism, all else equal.
ABLATIONS = {'no_bound': {'csro': {'mi_weight': 0.0}}}

get_config = base.config_of(
  'csro', focal.sizes('csro', model_hidden=(64, 64)), FAMILIES, robot_data='sac'
)
