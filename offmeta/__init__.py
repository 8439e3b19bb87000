"""offmeta: offline meta-reinforcement learning with online self-supervision."""

from offmeta.types import (
  Algorithm,
  BatchSpec,
  EnvFamily,
  EnvSpec,
  EnvState,
  LearnerState,
  MetaBatch,
  Network,
  Policy,
  Stage,
  Transition,
)

__version__ = '0.1.0'
__all__ = [
  'Algorithm',
  'BatchSpec',
  'EnvFamily',
  'EnvSpec',
  'EnvState',
  'LearnerState',
  'MetaBatch',
  'Network',
  'Policy',
  'Stage',
  'Transition',
]
