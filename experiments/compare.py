"""Compares algorithms on one family: one dataset, one protocol, one table.

  python -m experiments.compare --family=point_robot --profile=cpu
  python -m experiments.compare --family=cheetah_vel --data=sac --seeds=3 \\
      --algorithms=smac,focal,examples/cloning.py --ablations=sac_actor

Data of training and held-out tasks are made once, then every algorithm runs on
them, one after the other: NAME is experiments/configs/NAME.py, whatever ends in
.py a file of your own with a `get_config(family)`. Ablations are those that the
files list. The same command goes on where it was stopped (SIGTERM or Ctrl-C
saves and exits with status 143) and leaves finished runs alone; with other
algorithms it adds to the table. --only_table prints it again.

WORKDIR holds `data`, a workdir of `experiments.run` for each algorithm, and
`comparison` with the table as text, Markdown, CSV and JSON and a picture.
"""

import dataclasses
import os
import pathlib
import shlex
import sys
from typing import Any, NamedTuple

# Quiet before jax and its friends are imported.
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')

from absl import app, flags  # pylint: disable=g-import-not-at-top

from experiments.configs import base, recipes
from experiments.runs import cells, configuration, jax_settings, launch
from offmeta.results import comparison
from offmeta.training import config as configs, stopping, workdir_lock
from offmeta.training.config import ConfigError, ExperimentConfig

ALGORITHMS = (
  'smac',
  'macaw',
  'borel',
  'focal',
  'csro',
  'unicorn',
  'meta_bc',
  'multitask',
)


@dataclasses.dataclass(frozen=True)
class Options:
  """The flags of the command."""

  family: str = 'point_robot'
  profile: str = 'cpu'
  algorithms: tuple[str, ...] = ALGORITHMS
  ablations: tuple[str, ...] = ()  # NAME of any algorithm, or ALGORITHM/NAME
  data: str = ''  # source; empty: the family's own
  seeds: int = 0  # 0: the profile's
  workdir: str = ''  # empty: runs/compare-FAMILY-PROFILE
  only_table: bool = False
  runtime: dict[str, Any] = dataclasses.field(default_factory=dict)


class Chosen(NamedTuple):
  """An algorithm's file.

  Attributes:
    name: of the algorithm.
    file: path.
    ablations: '' and those asked for -> changes to the experiment.
  """

  name: str
  file: str
  ablations: dict[str, dict]


def run(options: Options, command: str, stop: stopping.StopRequest) -> int:
  """Runs what is not finished and prints the table; returns the exit status.

  Args:
    options: what to compare.
    command: recorded with every run and with the table.
    stop: asks to stop.

  Raises:
    ConfigError: an option that cannot be met.
    WorkdirBusyError: another process compares in the workdir.
    Interrupted: a stop was requested; the same call continues.
    Those of the phase `collect`, which makes the data.
  """
  workdir = _workdir(options)
  launch.check_folder(workdir)
  _check(options)
  chosen, failed = _choose(options)
  if options.only_table:
    failed = {}  # of files that are not needed
  else:
    data = _data_config(options)
    collect = _with_dataset(data, workdir / comparison.DATA)
    runs = _resolve(options, chosen, collect, failed)
    if not runs:
      raise ConfigError(
        '--algorithms: none can be run: '
        + '; '.join(f'{name}: {why}' for name, why in failed.items())
      )
    with workdir_lock.hold(workdir):
      _make_data(data, options, workdir, command, stop)
      for number, cell in enumerate(runs, start=1):
        print(f'\n{cell.name} ({number} of {len(runs)})', flush=True)
        message = cells.run(
          cell,
          workdir / comparison.folder_name(cell.name),
          options.profile,
          options.runtime,
          command,
          stop,
        )
        if message:
          failed[cell.name] = message
  for name, message in failed.items():
    print(f'failed: {name}: {message}', file=sys.stderr)
  _print_table(workdir, chosen, command, failed)
  return 1 if failed else 0


def _workdir(options: Options) -> pathlib.Path:
  source = f'-{options.data}' if options.data else ''
  default = f'runs/compare-{options.family}{source}-{options.profile}'
  return pathlib.Path(options.workdir or default).expanduser().absolute()


def _check(options: Options):
  """Refuses flags that mean nothing, before anything is made.

  Raises:
    ConfigError: names the flag.
  """
  if not options.algorithms:
    raise ConfigError(
      f'--algorithms: empty; known: {", ".join(ALGORITHMS)}, or a file'
    )
  if options.seeds < 0:
    raise ConfigError(
      f"--seeds: must be at least 1, or 0 for the profile's, not"
      f' {options.seeds}'
    )
  for given in () if options.only_table else options.algorithms:
    if not _file(given).is_file():
      raise ConfigError(
        f'--algorithms: no {given!r}; known: {", ".join(ALGORITHMS)}, or a file'
      )


def _file(given: str) -> pathlib.Path:
  """The config file that a name stands for."""
  if given.endswith('.py'):
    return pathlib.Path(given)
  return configuration.ROOT / 'experiments' / 'configs' / f'{given}.py'


def _choose(options: Options) -> tuple[list[Chosen], dict[str, str]]:
  """The algorithms' files; run -> message for those that cannot be read.

  Raises:
    ConfigError: an ablation that no file lists, or an algorithm named twice.
  """
  chosen, failed, known = [], {}, {}
  for given in options.algorithms:
    file = str(_file(given))
    name = pathlib.Path(file).stem
    if any(name == other.name for other in chosen):
      raise ConfigError(f'--algorithms: {name} is named twice')
    status, message = launch.attempt(
      lambda f=file, n=name: known.update({n: configuration.load_ablations(f)})
    )
    if status:
      failed[name] = message
      continue
    wanted = {
      ablation: changes
      for ablation, changes in known[name].items()
      if {ablation, f'{name}/{ablation}'} & set(options.ablations)
    }
    chosen.append(Chosen(name, file, {'': {}, **wanted}))
  names = {
    f'{name}/{ablation}' for name, table in known.items() for ablation in table
  }
  for given in options.ablations:
    if given not in names and given not in {n.split('/')[1] for n in names}:
      raise ConfigError(
        f'--ablations: no {given!r}; known: {", ".join(sorted(names))}'
      )
  return chosen, failed


def _data_config(options) -> ExperimentConfig:
  """What makes the data of all runs."""
  try:
    values = base.data_config(options.family, options.data)
  except ValueError as error:
    raise ConfigError(f'--family: {error}') from error
  return configuration.resolve(values, options.profile, {'num_seeds': 1})


def _with_dataset(data: ExperimentConfig, folder) -> dict[str, Any]:
  """The group `collect` of all runs, whose data are in a folder."""
  return {
    **configs.to_dict(data.collect),
    'dataset': str(folder / 'dataset'),
    'test_dataset': str(folder / 'dataset_test'),
  }


def _make_data(config, options, workdir, command, stop):
  """Makes the data if they are not made."""
  print(f'data of {options.family}', flush=True)
  launch.execute(
    config,
    workdir / comparison.DATA,
    ('collect',),
    stop,
    options.runtime,
    options.profile,
    command,
    '',
  )


def _resolve(
  options: Options,
  chosen: list[Chosen],
  collect: dict[str, Any],
  failed: dict[str, str],
) -> list[cells.Cell]:
  """The runs, ablations after their algorithm; adds to `failed`."""
  runs = []
  seeds = {'num_seeds': options.seeds} if options.seeds else {}

  def resolve(name, file, changes):
    common = collect
    if 'collect' in changes:  # other data, which the run makes itself
      common = {**collect, 'dataset': '', 'test_dataset': ''}
    own = {k: v for k, v in changes.items() if k != 'description'}
    config_file = f'{file}:{options.family}'
    runs.append(
      cells.Cell(
        name,
        configuration.from_root(config_file),
        configuration.resolve(
          configuration.load_config(config_file),
          options.profile,
          recipes.merge({'collect': common, **seeds}, own),
        ),
      )
    )

  for algorithm in chosen:
    for ablation, changes in algorithm.ablations.items():
      name = _run_name(algorithm.name, ablation)
      status, message = launch.attempt(
        lambda n=name, f=algorithm.file, c=changes: resolve(n, f, c)
      )
      if status:
        failed[name] = cells.one_line(message)
  return runs


def _run_name(algorithm: str, ablation: str) -> str:
  return f'{algorithm}/{ablation}' if ablation else algorithm


def _print_table(workdir, chosen, command, failed):
  """Writes the comparison and prints it."""
  described = {
    _run_name(algorithm.name, ablation): changes.get('description', '')
    for algorithm in chosen
    for ablation, changes in algorithm.ablations.items()
  }
  try:
    result = comparison.build(workdir, described, command, failed)
  except ValueError as error:
    raise ConfigError(str(error)) from error
  print()
  print(comparison.text_table(result))
  print(f'comparison: {workdir / "comparison"}')


def _main():
  # Here, because experiments.run defines some of the same names.
  family = flags.DEFINE_string('family', 'point_robot', 'Environment family.')
  profile = flags.DEFINE_enum(
    'profile',
    'cpu',
    ['smoke', 'cpu', 'paper'],
    'Size: smoke (does it run), cpu (2 cores), paper (published).',
  )
  algorithms = flags.DEFINE_list(
    'algorithms',
    list(ALGORITHMS),
    'Names in experiments/configs, or files of your own.',
  )
  ablations = flags.DEFINE_list(
    'ablations', [], 'Further runs: names in ABLATIONS of the files.'
  )
  data = flags.DEFINE_enum(
    'data',
    '',
    ['', *configs.SOURCES],
    "Where the data come from; empty: the family's own source.",
  )
  seeds = flags.DEFINE_integer('seeds', 0, "Number of seeds; 0: the profile's.")
  workdir = flags.DEFINE_string(
    'workdir', '', 'Default runs/compare-<family>-<profile>.'
  )
  only_table = flags.DEFINE_bool(
    'only_table', False, 'Run nothing; print the table of what is there.'
  )
  checkpoint = flags.DEFINE_float(
    'checkpoint_every_s', 60.0, 'Wall seconds between checkpoints.'
  )
  max_devices = flags.DEFINE_integer(
    'max_devices', None, 'Devices to use; default all.', lower_bound=1
  )

  def main(argv):
    stop = launch.prepare()
    options = Options(
      family.value,
      profile.value,
      tuple(algorithms.value),
      tuple(ablations.value),
      data.value,
      seeds.value,
      workdir.value,
      only_table.value,
      {
        'checkpoint_every_s': checkpoint.value,
        'max_devices': max_devices.value,
      },
    )
    command = f'python -m experiments.compare {shlex.join(sys.argv[1:])}'
    outcome = []

    def work():
      if len(argv) > 1:
        raise ConfigError(f'unexpected arguments: {" ".join(argv[1:])}')
      outcome.append(run(options, command.strip(), stop))

    status, message = launch.attempt(work)
    if status:
      print('\n' + 'error: ' * (status == 1) + message, file=sys.stderr)
    return status or outcome[0]

  jax_settings.prepare_environment()
  app.run(main, flags_parser=configuration.parse_flags)


if __name__ == '__main__':
  _main()
