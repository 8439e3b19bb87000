"""Four CPU devices in every test; must run before jax is imported."""

import os
import re

_FLAG = '--xla_force_host_platform_device_count'
_others = re.sub(rf'{_FLAG}=\S*', '', os.environ.get('XLA_FLAGS', ''))
os.environ['XLA_FLAGS'] = f'{_others} {_FLAG}=4'.strip()
os.environ['JAX_PLATFORMS'] = 'cpu'
