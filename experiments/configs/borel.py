"""BOReL experiments: get_config('cheetah_vel'), ...

Belief and policy see every episode from the first on, so a meta-test has no
episodes under the prior alone: the belief is carried on through all of them.
"""

from experiments.configs import base

_DYNAMICS = {'all': {'borel': {'relabel_rewards': False}}}
_STATE_ONLY = {'all': {'borel': {'decode_whole_step': False}}}

SIZES = {
    'all': {'evaluation': {'num_prior_episodes': 0}},
    'cpu': {'borel': {
        'gru_size': 64,
        'vae': {
            'num_updates': 2000, 'learning_rate': 1e-3, 'num_decoded': 20},
        'rl': {
            'critic_hidden': (64, 64), 'actor_hidden': (64, 64),
            'discount': 0.9, 'critic_lr': 1e-3, 'actor_lr': 1e-3,
            'num_updates': 4000, 'num_tasks': 8, 'batch_size': 64},
    }},
    'smoke': {'borel': {
        'gru_size': 16,
        'vae': {'num_updates': 10, 'num_decoded': 4, 'num_sequences': 2},
        'rl': {'num_updates': 20, 'num_tasks': 2, 'batch_size': 16},
    }},
}
FAMILIES = {
    'point_robot': _STATE_ONLY,
    'sparse_point_robot': _STATE_ONLY,
    'hopper_params': _DYNAMICS,
    'walker_params': _DYNAMICS,
}

get_config = base.config_of('borel', SIZES, FAMILIES)
