"""offmeta: offline meta-reinforcement learning with online self-supervision."""

from offmeta.types import (
  Algorithm,
  BatchSpec,
  EnvFamily,
  EnvSpec,
  EnvState,
  Exploration,
  LearnerState,
  MetaBatch,
  Network,
  Policy,
  Rollout,
  Rows,
  Sequences,
  Slice,
  Stage,
  Trajectory,
  Transition,
  Windows,
)

__version__ = '0.1.0'
__all__ = [
  'Algorithm',
  'BatchSpec',
  'EnvFamily',
  'EnvSpec',
  'EnvState',
  'Exploration',
  'LearnerState',
  'MetaBatch',
  'Network',
  'Policy',
  'Rollout',
  'Rows',
  'Sequences',
  'Slice',
  'Stage',
  'Trajectory',
  'Transition',
  'Windows',
]
