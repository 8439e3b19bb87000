"""Runs an experiment from data collection to report.

  python -m experiments.run
  python -m experiments.run --config=experiments/configs/smac.py:cheetah_vel \\
      --profile=cpu --workdir=runs/cheetah --seeds=3 --config.smac.kl_weight=1.0

The same command on an existing --workdir continues it. SIGTERM saves a
checkpoint and exits with status 143.
"""

import sys

from absl import app, flags

from experiments import launch

_CONFIG = launch.define_config_flag()
_PROFILE = flags.DEFINE_enum(
    'profile', 'cpu', ['smoke', 'cpu', 'paper'],
    'Size: smoke (seconds), cpu (minutes on 2 cores), paper (published).')
_WORKDIR = flags.DEFINE_string(
    'workdir', '', 'Where everything is written; default'
    ' runs/<config>-<family>-<profile>.')
_PHASES = flags.DEFINE_list(
    'phases', ['collect', 'offline', 'online', 'test', 'report'],
    'Which phases to run, in order.')
_SEEDS = flags.DEFINE_integer(
    'seeds', None, 'Number of seeds, run side by side in one program.')
_CHECKPOINT = flags.DEFINE_float(
    'checkpoint_every_s', 60.0, 'Wall seconds between checkpoints.')


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {" ".join(argv[1:])}')
  return launch.run(
      config_flag=_CONFIG,
      profile=_PROFILE.value,
      workdir=_WORKDIR.value,
      phases=tuple(_PHASES.value),
      seeds=_SEEDS.value,
      checkpoint_every_s=_CHECKPOINT.value,
      argv=sys.argv[1:],
  )


if __name__ == '__main__':
  app.run(main, flags_parser=launch.parse_flags)
