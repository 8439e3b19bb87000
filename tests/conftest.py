"""Four CPU devices in every test; must run before jax is imported."""

import os
import re

# Tests compile much and compute little: without LLVM's optimisations they
# take half the time.
_FLAGS = {
    '--xla_force_host_platform_device_count': '4',
    '--xla_backend_optimization_level': '0',
}
_others = os.environ.get('XLA_FLAGS', '')
for _flag in _FLAGS:
  _others = re.sub(rf'{_flag}=\S*', '', _others)
os.environ['XLA_FLAGS'] = ' '.join(
    _others.split() + [f'{flag}={value}' for flag, value in _FLAGS.items()])
os.environ['JAX_PLATFORMS'] = 'cpu'
