"""FOCAL experiments: get_config('cheetah_vel'), ...

`paper` sizes are the authors' later code (spec baselines A3.4). ABLATIONS have
their first release (A3.3) for Cheetah-Velocity.
"""

from experiments.configs import base, recipes

# How these algorithms are told to leave the behaviour divergence out.
NO_DIVERGENCE = {'divergence_weight': 0.0, 'learn_divergence_weight': False}
FIRST_RELEASE = {
    'latent_size': 20,
    'encoder_hidden': (200, 200, 200),
    'use_terminal': False,
    'use_next_observation': False,
    'critic_hidden': (256, 256, 256),
    'actor_hidden': (256, 256, 256),
    'value_hidden': (256, 256, 256),
    'divergence_hidden': (256, 256, 256),
    'value_network': True,
    'entropy_in_target': True,
    'reward_scale': 5.0,
    'mean_weight': 1e-3,
    'log_std_weight': 1e-3,
    'divergence_weight': 50.0,
    'learn_divergence_weight': True,
    'value_penalty': False,
    'context_size': 100,
    'num_updates': 100_000,
}

_SMALL = {
    'encoder_hidden': (64, 64),
    'critic_hidden': (64, 64),
    'actor_hidden': (64, 64),
    'value_hidden': (64, 64),
    'divergence_hidden': (64, 64),
    'discount': 0.9,
    'context_lr': 1e-3,
    'critic_lr': 1e-3,
    'actor_lr': 1e-3,
    'value_lr': 1e-3,
    'target_rate': 0.01,
    'num_updates': 3000,
    'num_tasks': 16,
    'query_size': 32,
    'context_size': 64,
}
_TINY = {
    'num_updates': 20, 'num_tasks': 2, 'query_size': 16, 'context_size': 16}


def sizes(name: str, **small) -> dict:
  """The sizes of an algorithm that is made of FOCAL's parts."""
  return {'cpu': {name: {**_SMALL, **small}}, 'smoke': {name: _TINY}}


def settings(name: str, all_sizes: dict, **cpu) -> dict:
  """One family's changes: those of all sizes, and further ones of `cpu`."""
  return {
      'all': {name: all_sizes},
      'cpu': {name: recipes.merge(all_sizes, cpu)},
  }


# What 2 cores do on a robot.
ROBOT = {
    'encoder_hidden': (128, 128), 'critic_hidden': (128, 128),
    'actor_hidden': (128, 128), 'value_hidden': (128, 128),
    'divergence_hidden': (128, 128), 'discount': 0.95, 'query_size': 64,
    'context_size': 128,
}
FAMILIES = {
    'cheetah_vel': settings('focal', {
        **NO_DIVERGENCE, 'entropy_weight': 0.0}, **ROBOT),
    'cheetah_dir': settings('focal', {'divergence_lr': 4e-5}, **ROBOT),
    'ant_dir': settings('focal', {}, **ROBOT),
}
ABLATIONS = {'first_release': {'focal': FIRST_RELEASE}}

get_config = base.config_of('focal', sizes('focal'), FAMILIES)
