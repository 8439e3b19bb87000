"""Meta-behaviour-cloning experiments: MACAW's data and sizes."""

from experiments.configs import base, macaw

_COMMON = (
  'hidden',
  'latent_size',
  'policy_lr',
  'step_size_lr',
  'inner_policy_lr',
  'stride',
  'num_updates',
  'num_tasks',
  'context_size',
  'query_size',
)


def _shared(parts: dict) -> dict:
  """What MACAW's settings have in common with cloning's."""
  settings = parts.get('macaw', {})
  return {'meta_bc': {k: v for k, v in settings.items() if k in _COMMON}}


SIZES = {name: _shared(parts) for name, parts in macaw.SIZES.items()}
FAMILIES = {
  family: {name: _shared(parts) for name, parts in sizes.items()}
  for family, sizes in macaw.FAMILIES.items()
}

get_config = base.config_of('meta_bc', SIZES, FAMILIES, data='sac')
