"""Renders a policy to a .gif, .html or .mp4 file.

  python -m experiments.render --family=ant_dir --out=ant.gif
  python -m experiments.render --config=examples/reacher.py --out=reacher.gif
  python -m experiments.render --workdir=runs/smac-point_robot-cpu \\
      --loop=online/matched --task=3 --out=point.html

With --workdir the first repetition of the meta-test is shown, as the phase
`test` scored it: episodes under the prior, then adapted ones. Otherwise a
family is shown under a simple policy.
"""

import sys

from absl import app, flags

from experiments.runs import configuration, jax_settings

_FAMILY = flags.DEFINE_string(
  'family', None, 'A family without a run, e.g. ant_dir.'
)
_CONFIG = flags.DEFINE_string(
  'config',
  None,
  'FILE or FILE:ARGUMENT, a config file that registers the'
  ' family; default for --family, and for --workdir if the file moved.',
)
_OPTION = flags.DEFINE_multi_string(
  'option', [], 'KEY=VALUE of the family, e.g. backend=mjx; repeatable.'
)
_POLICY = flags.DEFINE_enum(
  'policy',
  'random',
  ['random', 'zero', 'script'],
  "Who acts with --family; script: the family's scripted_policy().",
)
_WORKDIR = flags.DEFINE_string('workdir', None, 'A run of experiments.run.')
_LOOP = flags.DEFINE_string(
  'loop',
  'offline',
  'Whose policy of the run: offline, online/VARIANT or'
  ' collect (the behaviour policy).',
)
_SEED = flags.DEFINE_integer(
  'seed', 0, 'With --workdir which of its seeds, else the random seed.'
)
_TASK = flags.DEFINE_integer('task', 0, 'Which test task.')
_EPISODES = flags.DEFINE_list(
  'episodes', [], 'Which episodes, from 1; default all.'
)
_OUT = flags.DEFINE_string(
  'out',
  None,
  'File to write: .gif, .html or .mp4 (needs ffmpeg).',
  required=True,
)
_EVERY = flags.DEFINE_integer(
  'every',
  None,
  'Show every so-many-th step; default about 25 per second.',
  lower_bound=1,
)
_FPS = flags.DEFINE_float(
  'fps',
  None,
  'Pictures per second; default as fast as in the simulation.',
  lower_bound=0.1,
)
_WIDTH = flags.DEFINE_integer('width', 480, 'Pixels.', lower_bound=64)
_HEIGHT = flags.DEFINE_integer('height', 360, 'Pixels.', lower_bound=48)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {" ".join(argv[1:])}')
  fresh = _FAMILY.value or (_CONFIG.value and not _WORKDIR.value)
  if bool(fresh) == bool(_WORKDIR.value):
    print(
      'error: give one of --family, --config and --workdir', file=sys.stderr
    )
    return 1
  jax_settings.prepare_environment()
  from experiments.runs import rendering as playback

  show = playback.Show(
    task=_TASK.value,
    seed=_SEED.value,
    episodes=tuple(_EPISODES.value),
    out=_OUT.value,
    every=_EVERY.value,
    fps=_FPS.value,
    width=_WIDTH.value,
    height=_HEIGHT.value,
  )

  def perform():
    family = _FAMILY.value
    if _CONFIG.value:
      family = family or configuration.load_family(_CONFIG.value)
    if _WORKDIR.value:
      return playback.restored(show, _WORKDIR.value, _LOOP.value)
    return playback.fresh(show, family, _OPTION.value, _POLICY.value)

  return playback.run(show, perform)


if __name__ == '__main__':
  app.run(main, flags_parser=configuration.parse_flags)
