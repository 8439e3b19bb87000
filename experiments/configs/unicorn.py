"""UNICORN experiments: get_config('cheetah_vel'), ..."""

from experiments.configs import base, focal

_settings = lambda published, **cpu: focal.settings('unicorn', published, **cpu)
# What the release calls SAC; its other agent is the default.
_SAC = {**focal.NO_DIVERGENCE, 'entropy_in_target': True, 'entropy_weight': 0.2}
_WIDE = {'encoder_hidden': (128, 128), 'decoder_hidden': (128, 128)}

_POINT = _settings(focal.POINT, reward_scale=1.0, divergence_weight=0.2)
FAMILIES = {
  'point_robot': _POINT,
  'sparse_point_robot': _POINT,
  'cheetah_vel': _settings({**_SAC, 'entropy_weight': 0.0}, **focal.ROBOT),
  'cheetah_dir': _settings({**_SAC, 'metric_weight': 0.01}, **focal.ROBOT),
  'ant_dir': _settings({}, **focal.ROBOT),
  'hopper_params': _settings(
    {**_SAC, **_WIDE, 'latent_size': 40, 'metric_weight': 1.5}, **focal.ROBOT
  ),
  'walker_params': _settings(
    {**_SAC, **_WIDE, 'latent_size': 32, 'metric_weight': 0.7}, **focal.ROBOT
  ),
}
ABLATIONS = {'classification': {'unicorn': {'supervision': 'classification'}}}

# Its latents stay together for a while before they part: more updates, a
# higher rate and larger contexts than FOCAL.
get_config = base.config_of(
  'unicorn',
  focal.sizes('unicorn', context_lr=3e-3, num_updates=5000, context_size=100),
  FAMILIES,
  robot_data='sac',
)
