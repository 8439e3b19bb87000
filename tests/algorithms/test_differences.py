"""Each algorithm's list of differences against what its release has.

The numbers of the releases stand here once more, setting by
setting. A default that changes without its list fails, and so does a list
that changes without the default.
"""

import dataclasses
import importlib

import pytest

from offmeta.algorithms import ALGORITHMS, focal, pearl

_OURS = object()  # the release has no such choice, or it makes no difference


def _settings(config, prefix=''):
  """{dotted name: value} of a configuration."""
  found = {}
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      found |= _settings(value, f'{prefix}{field.name}.')
    else:
      found[prefix + field.name] = value
  return found


def _in(group, **settings):
  return {f'{group}.{name}': value for name, value in settings.items()}


# SMAC's release.
_SMAC = {
  'latent_size': 5,
  'encoder_hidden': (200, 200, 200),
  'decoder_hidden': (64, 64),
  'critic_hidden': (300, 300, 300),
  'actor_hidden': (300, 300, 300),
  'zero_last_bias': True,
  'context_lr': 3e-4,
  'critic_lr': 3e-4,
  'actor_lr': 3e-4,
  'discount': 0.99,
  'target_rate': 0.005,
  'reward_scale': 5.0,
  'kl_weight': 0.1,
  'kl_over_tasks': 'mean',
  'encoder_loss': 'reward',
  'actor': 'awac',
  'awac_temperature': 100.0,
  'awac_weight': 1.0,
  'online_q_weight': 1.0,
  # Of the paper's ablation, whose settings were not released.
  **_in(
    'sac',
    entropy_weight=_OURS,
    entropy_in_target=_OURS,
    mean_weight=_OURS,
    log_std_weight=_OURS,
  ),
  'independent_next_latent': True,
  'use_next_observation': False,
  'latent_resample_period': 1,
  'train_context_online': False,
  'label_with': 'snapshot',
  **_in(
    'offline', num_updates=50_000, num_tasks=4, query_size=128, context_size=64
  ),
  **_in(
    'online',
    num_updates=16_000,
    num_tasks=4,
    query_size=256,
    context_size=64,
    task_repeat=4,
    context='transitions',
    sequence_size=_OURS,
    offline_share=_OURS,
    online_share=-1.0,
  ),
}

# SMAC's behaviour policy.
_PEARL = {
  'latent_size': 5,
  'encoder_hidden': (200, 200, 200),
  'decoder_hidden': (64, 64),
  'critic_hidden': (300, 300, 300),
  'value_hidden': (300, 300, 300),
  'actor_hidden': (300, 300, 300),
  'hidden_bias': 0.0,
  'zero_last_bias': True,
  'tanh_correction': 'exact',
  'context_lr': 3e-4,
  'critic_lr': 3e-4,
  'value_lr': 1e-3,
  'actor_lr': 3e-4,
  'discount': 0.99,
  'target_rate': 0.005,
  'reward_scale': 5.0,
  'kl_weight': 0.1,
  'train_decoder': True,
  'backprop_q_into_encoder': True,
  'mean_weight': 1e-3,
  'mean_penalised': 'after_tanh',
  'log_std_weight': 1e-3,
  'use_next_observation': False,
  'latent_resample_period': 1,
  **_in(
    'online',
    num_updates=16_000,
    num_tasks=4,
    query_size=256,
    context_size=64,
    task_repeat=4,
  ),
}
# PEARL's first release, cheetah-vel.
_PEARL_FIRST = {
  **_PEARL,
  'decoder_hidden': _OURS,  # there is none
  'hidden_bias': 0.1,
  'zero_last_bias': False,
  'tanh_correction': 'shifted',
  'value_lr': 3e-4,
  'train_decoder': False,
  'mean_penalised': 'before_tanh',
  'latent_resample_period': 0,
  **_in(
    'online',
    num_updates=2000,
    num_tasks=16,
    query_size=256,
    context_size=100,
    task_repeat=1,
  ),
}

# Table 3 of the paper; it leaves the rest open.
_PPO = {
  'actor_hidden': (64, 64),
  'value_hidden': (64, 64),
  'initial_std': _OURS,
  'actor_lr': 3e-4,
  'value_lr': 3e-4,
  'adam_eps': _OURS,
  'max_grad_norm': _OURS,
  'discount': 0.99,
  'gae_lambda': 0.95,
  'clip': 0.2,
  'clip_value': False,
  'entropy_weight': 0.0,
  'standardise': _OURS,
  'reward_scale': 1.0,
  'num_envs': 1,
  'num_steps': 2048,
  'num_epochs': 10,
  'num_minibatches': 2048 // 64,
}

# Table 1 of arXiv 1812.05905; what it does not say is ours.
_SAC = {
  'critic_hidden': (256, 256),
  'actor_hidden': (256, 256),
  'hidden_bias': _OURS,
  'max_log_std': _OURS,
  'tanh_correction': _OURS,
  'critic_lr': 3e-4,
  'actor_lr': 3e-4,
  'temperature_lr': 3e-4,
  'discount': 0.99,
  'target_rate': 0.005,
  'reward_scale': 1.0,
  'temperature': 1.0,
  'learn_temperature': True,
  'target_entropy_per_action': -1.0,
  'num_updates': _OURS,
  'batch_size': 256,
}

# BOReL's release, cheetah-vel.
_BOREL = {
  'latent_size': 5,
  'gru_size': 128,
  'observation_embedding': 32,
  'action_embedding': 16,
  'reward_embedding': 16,
  'decoder_hidden': (32, 32),
  'decode_whole_step': True,
  'kl_weight': 0.05,
  'num_episodes': 2,
  'relabel_rewards': True,
  **_in(
    'vae',
    num_updates=100 * 257 * 25,
    num_tasks=4,
    num_sequences=8,
    num_decoded=0,
    learning_rate=3e-4,
  ),
  **_in(
    'rl',
    critic_hidden=(256, 256),
    actor_hidden=(256, 256),
    hidden_bias=0.1,
    max_log_std=2.0,
    tanh_correction='shifted',
    critic_lr=3e-4,
    actor_lr=3e-4,
    temperature_lr=_OURS,
    discount=0.99,
    target_rate=0.005,
    reward_scale=1.0,
    temperature=0.2,
    learn_temperature=False,
    target_entropy_per_action=-1.0,
    num_updates=1_000_000,
    num_tasks=16,
    batch_size=256,
  ),
}

# FOCAL's later code.
_FOCAL = {
  'critic_hidden': (256, 256),
  'actor_hidden': (256, 256),
  'hidden_bias': 0.1,
  'max_log_std': 2.0,
  'tanh_correction': 'shifted',
  'critic_lr': 3e-4,
  'actor_lr': 3e-4,
  'discount': 0.99,
  'target_rate': 0.005,
  'reward_scale': 1.0,
  'value_network': False,
  'value_hidden': _OURS,
  'value_lr': _OURS,
  'entropy_weight': 1.0,
  'entropy_in_target': False,
  'mean_weight': 0.0,
  'log_std_weight': 0.0,
  'divergence_weight': 0.2,
  'learn_divergence_weight': False,
  'divergence_weight_rate': _OURS,  # it is not learned
  'target_divergence': _OURS,
  'max_divergence_weight': _OURS,
  'value_penalty': True,
  'policy_penalty': False,
  'divergence_hidden': (256, 256),
  'divergence_lr': 1e-4,
  'divergence_steps': 3,
  'gradient_penalty': 'value',
  'gradient_penalty_weight': 5.0,
  'latent_size': 5,
  'encoder_hidden': (64, 64),
  'use_next_observation': True,
  'use_terminal': True,
  'metric_weight': 1.0,
  'context_lr': 3e-4,
  'num_updates': 200_000,
  'num_tasks': 16,
  'query_size': 256,
  'context': 'sequences',
  'context_size': _OURS,  # one trajectory
}
_WIDE = dict.fromkeys(
  ('critic_hidden', 'actor_hidden', 'value_hidden', 'divergence_hidden'),
  (256, 256, 256),
)
# FOCAL's first release, cheetah-vel.
_FOCAL_FIRST = {
  **_FOCAL,
  **_WIDE,
  'max_log_std': 0.0,
  'reward_scale': 5.0,
  'value_network': True,
  'value_lr': 3e-4,
  'entropy_in_target': True,
  'mean_weight': 1e-3,
  'log_std_weight': 1e-3,
  'divergence_weight': 50.0,
  'learn_divergence_weight': True,
  'divergence_weight_rate': 1.0,
  'target_divergence': 0.05,
  'max_divergence_weight': 2000.0,
  'value_penalty': False,
  'policy_penalty': True,
  'latent_size': 20,
  'encoder_hidden': (200, 200, 200),
  'use_next_observation': False,
  'use_terminal': False,
  'metric_weight': 10.0,
  'num_updates': 500 * 200,
  'context': 'transitions',
  'context_size': 100,
}

# CSRO's release, cheetah-vel.
_CSRO = {
  **_FOCAL_FIRST,
  'num_updates': 105 * 1000,
  'mi_weight': 10.0,
  'model_weight': 10.0,
  'model_hidden': (200, 200, 200),
}

# UNICORN's release, ant-dir.
_UNICORN = {
  **_FOCAL,
  'metric_weight': 0.15,
  'supervision': 'reconstruction',
  'decoder_hidden': (64, 64),
  'decoder_start': 'truncated_normal',
}

# MACAW's 'standard.json', and its code for what no file says.
_MACAW = {
  'hidden': (100, 100, 100),
  'head_hidden': 32,
  'layer': 'wlinear',
  'latent_size': 100,
  'head_relu_on_action': True,
  'action_std': 0.2,
  'discount': 0.99,
  'policy_lr': 1e-4,
  'value_lr': 1e-5,
  'step_size_lr': 1e-3,
  'inner_policy_lr': 1e-3,
  'inner_value_lr': 1e-3,
  'advantage_coef': 0.01,
  'temperature': 1.0,
  'max_weight': 20.0,
  'adv_std_eps': 0.0,
  'target_rate': 0.1,
  'adapt': 'all',
  'bootstrap_terminal': 'release',
  'mask_bootstrap_on_death': False,
  'train_inner_sampling': 'contiguous',
  'disjoint_batches': False,
  'outer_norm': 'n_train',
  'stride': 7,
  'context_part': 'all',
  'context_rows': 100_000,
  'num_updates': 1_000_000,
  'num_tasks': 5,
  'context_size': 256,
  'query_size': 256,
  'task_loop': _OURS,
  **_in(
    'finetune', lr=1e-5, value_updates=100, policy_updates=200, batch_size=256
  ),
}
# MACAW's 'overrides/imitation.json'.
_META_BC = {
  name: _MACAW[name]
  for name in (
    'hidden',
    'layer',
    'latent_size',
    'action_std',
    'policy_lr',
    'step_size_lr',
    'inner_policy_lr',
    'train_inner_sampling',
    'stride',
    'num_updates',
    'num_tasks',
    'context_size',
    'query_size',
    'task_loop',
  )
}
# MACAW's 'multitask_standard.json'.
_MULTITASK = {
  **{
    name: _MACAW[name]
    for name in (
      'hidden',
      'action_std',
      'discount',
      'policy_lr',
      'value_lr',
      'temperature',
      'max_weight',
      'stride',
      'num_updates',
      'num_tasks',
      'query_size',
    )
  },
  'layer': 'bias_linear',
  'latent_size': _OURS,
  'finetune_steps': 20,
  'finetune_policy_lr': 1e-3,
  'finetune_value_lr': 1e-5,
}

_RELEASED = {
  'borel': _BOREL,
  'csro': _CSRO,
  'focal': _FOCAL,
  'macaw': _MACAW,
  'meta_bc': _META_BC,
  'multitask': _MULTITASK,
  'pearl': _PEARL,
  'ppo': _PPO,
  'sac': _SAC,
  'smac': _SMAC,
  'unicorn': _UNICORN,
}


def _differences(settings, released):
  """{name: (here, released)} of what differs."""
  return {
    name: (value, released[name])
    for name, value in settings.items()
    if released[name] is not _OURS and released[name] != value
  }


def _module(name):
  return importlib.import_module(f'offmeta.algorithms.{name}')


def test_every_algorithm_is_here():
  assert set(_RELEASED) == set(ALGORITHMS)


@pytest.mark.parametrize('name', sorted(_RELEASED))
def test_the_list_is_what_differs(name):
  settings = _settings(ALGORITHMS[name].config())
  released = _RELEASED[name]
  assert set(settings) == set(released), 'say here what the release has'
  listed = {
    setting: (here, there)
    for setting, (here, there, _) in _module(name).DIFFERENCES.items()
  }
  assert listed == _differences(settings, released)


@pytest.mark.parametrize('name', sorted(_RELEASED))
def test_every_difference_has_its_reason(name):
  module = _module(name)
  for setting, (_, _, why) in module.DIFFERENCES.items():
    assert why and why == why.strip(), setting
  if name not in ('meta_bc', 'multitask', 'ppo', 'sac'):
    assert 'DIFFERENCES' in module.__doc__


def _is_size(name):
  return name.endswith('_hidden') or name.split('.')[-1] in (
    'num_updates',
    'num_tasks',
    'query_size',
    'context_size',
    'task_repeat',
  )


@pytest.mark.parametrize(
  'module, released, left',
  [
    (pearl, _PEARL_FIRST, set()),
    (focal, _FOCAL_FIRST, {'gradient_penalty'}),
  ],
  ids=['pearl', 'focal'],
)
def test_the_switches_to_the_first_release(module, released, left):
  """Whatever is not a size, and nothing that the defaults have already."""
  differences = _differences(_settings(module.Config()), released)
  switches = {
    name: there
    for name, (_, there) in differences.items()
    if not _is_size(name)
  }
  assert {k: v for k, v in switches.items() if k not in left} == (
    module.FIRST_RELEASE
  )
  assert left <= set(switches)
  switched = dataclasses.replace(module.Config(), **module.FIRST_RELEASE)
  remaining = _differences(_settings(switched), released)
  assert {name for name in remaining if not _is_size(name)} == left
