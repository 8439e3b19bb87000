"""The phase `collect`: where the logged data come from.

Of the training tasks (`dataset`) and of the held-out ones (`dataset_test`): one
of the sources below makes both, or the user brings them. Random and behaviour
policies are scored on the way.
"""

import dataclasses
import pathlib

import jax.numpy as jnp
import numpy as np

from offmeta import disk, evaluation, processes, rollout
from offmeta.collection import history
from offmeta.collection.sources import SOURCES
from offmeta.data import dataset as datasets, frames
from offmeta.data.meta_dataset import MetaDataset
from offmeta.training import config as configs
from offmeta.training.setup import PhaseError, Setup
from offmeta.types import Task


def dataset_path(setup: Setup) -> str:
  """Where the offline data of this run are."""
  return setup.config.collect.dataset or str(setup.workdir / 'dataset')


def test_dataset_path(setup: Setup) -> str:
  """Where the logged data of the held-out tasks are; '' without any."""
  config = setup.config.collect
  if config.dataset:
    return config.test_dataset
  return str(setup.workdir / 'dataset_test')


def load_dataset(setup: Setup) -> MetaDataset:
  """The run's dataset, validated against the family and the task list.

  Raises:
    PhaseError: there is none yet, or it is of other tasks.
    DatasetError: it is damaged or of another family.
  """
  return _load(
    setup, dataset_path(setup), 'training', 'num_train', setup.train_tasks
  )


def load_test_dataset(setup: Setup) -> MetaDataset | None:
  """Logged data of the held-out tasks, validated like `load_dataset`.

  None if the user brought a dataset without one of these.
  """
  path = test_dataset_path(setup)
  if not path:
    return None
  return _load(setup, path, 'held-out', 'num_test', setup.test_tasks)


def _load(setup: Setup, path: str, what: str, number: str, tasks: Task):
  config = setup.config
  if not config.collect.dataset and not pathlib.Path(path).exists():
    raise PhaseError(
      f'{path}: no dataset; run --phases=collect first or point'
      ' --config.collect.dataset at one'
    )
  data = setup.once(
    path, lambda: datasets.load(path, setup.family.spec, memory_map=True)
  )
  for name, leaf in tasks.items():
    stored = data.tasks.get(name)
    if (
      stored is None
      or stored.shape != leaf.shape
      or not np.allclose(stored, leaf, atol=1e-6)
    ):
      raise PhaseError(
        f'{path}: task parameter {name!r} differs from the {what} tasks of'
        f' config.family (task_list {config.family.task_list!r}, {number}'
        f' {getattr(config.family, number)}); use the list that the dataset'
        ' was made with'
      )
  return data


def collect(setup: Setup):
  """Makes (or checks) the datasets and scores the references.

  An algorithm that has no use for logs gets none.
  """
  if setup.is_done('collect'):
    return
  config = setup.config.collect
  scores = {}
  if not setup.logged:
    if config.dataset and processes.is_main():  # as in a comparison
      print(
        f'config.collect.dataset: {setup.config.algorithm} has no use for'
        f' logged data; {config.dataset} is not read'
      )
  elif config.dataset:  # fail here, not after minutes of training
    load_dataset(setup)
    load_test_dataset(setup)
  else:
    made = SOURCES[config.source].make(setup)
    _save(setup, dataset_path(setup), made.train, made.train_origin)
    _save(setup, test_dataset_path(setup), made.test, made.test_origin)
    scores = made.scores
  _score_references(setup, scores)
  setup.mark_done('collect')


def with_logs(setup: Setup) -> Setup:
  """The run as algorithms are made for once there are logs (`Problem`)."""
  known = setup.config.collect.dataset or setup.is_done('collect')
  if not setup.logged or not known:
    return setup
  rows = int(np.min(load_dataset(setup).size))
  return dataclasses.replace(setup, num_rows=rows)


def dataset_sizes(setup: Setup) -> tuple[int, int]:
  """Rows per task that the dataset has, or will have: query data, and context
  data of its own (0 without). Where episodes can end early, at most."""
  config = setup.config.collect
  if config.dataset or setup.is_done('collect'):
    return _sizes(load_dataset(setup))
  return _most_rows(setup, SOURCES[config.source].steps(setup))


def test_dataset_sizes(setup: Setup) -> tuple[int, int] | None:
  """`dataset_sizes` of the held-out tasks; None without logs of these."""
  config = setup.config.collect
  if config.dataset or setup.is_done('collect'):
    data = load_test_dataset(setup)
    return None if data is None else _sizes(data)
  return _most_rows(setup, SOURCES[config.source].held_out_steps(setup))


def _sizes(data: MetaDataset) -> tuple[int, int]:
  context = 0 if data.context is None else data.context.reward.shape[1]
  return data.transitions.reward.shape[1], context


def _most_rows(setup: Setup, steps: tuple[int, int]) -> tuple[int, int]:
  """Of logs of so many steps; 0 stays 0."""
  return tuple(n and frames.most_rows(setup.family.spec, n) for n in steps)


def _save(setup: Setup, path: str, data: MetaDataset, origin: str):
  if frames.are_once(setup.family.spec):
    data = frames.once(data)
  made_by = {
    'algorithm': setup.config.collect.source,
    'log': origin,
    'config': configs.to_dict(setup.config.collect),
    'task_list': setup.config.family.task_list,
  }
  processes.on_main(
    lambda: datasets.save(
      path, data, setup.family.spec, made_by, overwrite=True
    )
  )
  processes.in_all(lambda: processes.await_directory(pathlib.Path(path)))
  setup.loaded.pop(path, None)  # what was there before


def _score_references(setup, scores):
  """The random policy under the meta-test protocol; with the source's scores
  and what the log itself shows, these are evaluations/collect.npz."""
  config = setup.config.evaluation
  family = setup.family
  policy = rollout.uniform_policy(family.spec.action_size)
  layout = setup.seeds.layout

  def score(key):
    done = evaluation.meta_test(
      family,
      policy,
      (),
      setup.test_tasks,
      key,
      config.num_repeats,
      config.num_steps,
      config.num_prior_episodes,
      layout.axis_name,
    )
    return done.returns, jnp.sum(done.transitions.extras['diverged'])

  returns, diverged = layout.all_seeds(
    layout.compile(score, (0,))(setup.seeds.streams('evaluation'))
  )
  arrays = {
    'random_test_returns': returns,
    'random_diverged': diverged,
    **scores,
  }
  if setup.logged:
    data = load_dataset(setup)
    arrays['behaviour_data_returns'] = data.episode_return
    if 'diverged' in data.transitions.extras:
      arrays['dataset_diverged'] = np.array([history.num_diverged(data)])
  processes.on_main(
    lambda: disk.write_arrays(
      setup.workdir / 'evaluations' / 'collect.npz', arrays
    )
  )
