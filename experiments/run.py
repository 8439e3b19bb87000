"""Runs an experiment from data collection to report.

  python -m experiments.run
  python -m experiments.run --config=experiments/configs/smac.py:cheetah_vel \\
      --profile=cpu --workdir=runs/cheetah --seeds=3 --config.smac.kl_weight=1.0

The same command on an existing --workdir continues it. SIGTERM or Ctrl-C saves
a checkpoint and exits with status 143 (a second one ends it at once). Only one
process at a time may run in a workdir.

Several hosts: start the same command on each, on a file system that they
share, with --cluster where the job scheduler tells who is who, else with
--coordinator=HOST:PORT --num_processes=N --process_id=0, 1, ...
"""

import os
import sys
import traceback

from absl import app, flags

from experiments.runs import configuration, launch

_CONFIG = configuration.define_config_flag()
_PROFILE = flags.DEFINE_enum(
  'profile',
  'cpu',
  ['smoke', 'cpu', 'paper'],
  'Size: smoke (seconds), cpu (minutes on 2 cores), paper (published).',
)
_WORKDIR = flags.DEFINE_string(
  'workdir',
  '',
  'Where everything is written; default runs/<config>-<family>-<profile>.',
)
_PHASES = flags.DEFINE_list(
  'phases',
  ['collect', 'offline', 'online', 'finetune', 'test', 'report'],
  'Which phases to run, in order; those that the algorithm or configuration'
  ' does not have are left out.',
)
_SEEDS = flags.DEFINE_integer(
  'seeds', None, 'Number of seeds, run side by side in one program.'
)
_PRECISION = flags.DEFINE_string(
  'matmul_precision',
  None,
  'Of the networks in updates: float32 (default),'
  ' tensorfloat32 (GPUs) or bfloat16; short for config.matmul_precision.',
)
_CHECKPOINT = flags.DEFINE_float(
  'checkpoint_every_s', 60.0, 'Wall seconds between checkpoints.'
)
_KEEP = flags.DEFINE_bool(
  'keep_checkpoints', False, 'Keep those of finished stages, with replays.'
)
_DEVICES = flags.DEFINE_integer(
  'max_devices',
  None,
  'Devices to use in each process; default all.',
  lower_bound=1,
)
_SHARE = flags.DEFINE_enum(
  'share',
  'seeds',
  ['seeds', 'tasks'],
  'What devices share: seeds, or the'
  ' tasks of every meta-batch, which takes an exchange in every update.',
)
_REPLAY = flags.DEFINE_enum(
  'replay',
  'device',
  ['device', 'host'],
  "Where the replay is kept; from the host's memory batches are streamed.",
)
_CLUSTER = flags.DEFINE_bool(
  'cluster',
  False,
  'One of several processes; who is who is read from the'
  ' environment of SLURM, Open MPI, GKE or Cloud TPU.',
)
_COORDINATOR = flags.DEFINE_string(
  'coordinator', None, 'HOST:PORT of process 0, for several processes.'
)
_PROCESSES = flags.DEFINE_integer(
  'num_processes', None, 'How many there are.', lower_bound=1
)
_PROCESS = flags.DEFINE_integer(
  'process_id', None, 'Which this is, from 0.', lower_bound=0
)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {" ".join(argv[1:])}')
  short = {'num_seeds': _SEEDS.value, 'matmul_precision': _PRECISION.value}
  connect = {
    'coordinator': _COORDINATOR.value,
    'num_processes': _PROCESSES.value,
    'process_id': _PROCESS.value,
  }
  several = _CLUSTER.value or any(v is not None for v in connect.values())
  try:
    status = launch.run(
      config_flag=_CONFIG,
      profile=_PROFILE.value,
      workdir=_WORKDIR.value,
      phases=tuple(_PHASES.value),
      overrides={k: v for k, v in short.items() if v is not None},
      runtime={
        'checkpoint_every_s': _CHECKPOINT.value,
        'keep_checkpoints': _KEEP.value,
        'max_devices': _DEVICES.value,
        'share': _SHARE.value,
        'replay': _REPLAY.value,
      },
      connect=connect if several else None,
      argv=sys.argv[1:],
    )
  except Exception:  # pylint: disable=broad-exception-caught
    if not several:
      raise
    traceback.print_exc()
    status = 1
  if several and status == 1:
    # An orderly exit would wait for the other processes, which wait for this.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # pylint: disable=protected-access
  return status


if __name__ == '__main__':
  app.run(main, flags_parser=configuration.parse_flags)
