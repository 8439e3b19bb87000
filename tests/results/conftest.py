"""Synthetic workdirs, in the layout that the training code writes."""

import json
import sys

import numpy as np
import pytest

# Held-out final return per variant, seed by seed: literals, so that tests can
# say what the rows must be.
OFFLINE = np.array([-15.3, -14.6, -16.4, -15.0, -15.7])
ONLINE = {
  'ours': np.array([-9.2, -9.0, -9.2, -9.5, -8.9]),
  'released': np.array([-15.3, -14.3, -16.2, -14.8, -15.9]),
  'offline_contexts': np.array([-15.6, -14.9, -16.1, -15.5, -15.2]),
  'oracle': np.array([-9.2, -8.7, -9.1, -9.0, -8.8]),
}
VARIANTS = {
  'ours': 'episode-shaped contexts, encoder and decoder trained online',
  'released': 'contexts drawn from the union, encoder frozen',
  'offline_contexts': 'contexts from offline data only',
  'oracle': 'as ours with true rewards',
}
RANDOM, BEHAVIOUR, OFFLINE_CONTEXT = -21.0, -11.0, -7.5
# What another context than the learner's own adds on held-out tasks.
GIVEN, UNIFORM = 2.0, -1.5
# Mean return of the meta-policy, after the step on random data, then every
# 2000 environment steps.
FINETUNE = np.array([-18.0, -16.0, -15.0, -14.0, -12.0, -11.0, -10.5, -10.0])


def returns(final, rng, tasks=8, repetitions=2, episodes=3):
  """[S, M, R, E] whose last episodes average to `final` [S] exactly."""
  final = np.asarray(final, float)
  shape = (len(final), tasks, repetitions, episodes)
  noise = rng.normal(scale=1.5, size=shape)
  noise -= noise.mean((1, 2), keepdims=True)
  weight = np.linspace(0.2, 1, episodes)
  return (1 - weight) * -21.0 + weight * final[:, None, None, None] + noise


def _point(final, rng, shift, tasks):
  """Arrays of one evaluation point."""
  seeds, angle = len(final), np.linspace(0, np.pi, tasks)
  arc = np.stack([np.cos(angle), np.sin(angle), 0.2 * angle], -1)
  wobble = lambda: 0.12 * rng.normal(size=(seeds, tasks, 4, 3))
  goals = np.stack([np.cos(angle[::2]), np.sin(angle[::2])], -1)[:8]
  time = np.linspace(0, 1, 21)[:, None]
  paths = np.stack(
    [
      np.stack(
        [
          time * goal[::-1] * [-0.8, 0.5],
          time * [0.3, 0.8],
          time * (goal - shift * 0.4),
        ]
      )
      for goal in goals
    ]
  )
  return {
    'test_self_returns': returns(final, rng),
    'test_offline_returns': returns(final + GIVEN, rng, episodes=2),
    'test_uniform_returns': returns(final + UNIFORM, rng),
    'train_self_returns': returns(final + 1.0, rng, tasks=tasks),
    'train_offline_returns': returns(
      np.full(seeds, OFFLINE_CONTEXT), rng, tasks=tasks
    ),
    'kl_offline': np.full((seeds, tasks), 3.5),
    'kl_self': 2.0 + rng.random((seeds, tasks)),
    'normalized_shift': shift + 0.05 * rng.normal(size=seeds),
    'posterior_offline_mean': arc[None, :, None] + wobble(),
    'posterior_self_mean': (1 - 0.9 * shift) * arc[None, :, None]
    + wobble()
    + shift * np.array([0.1, -0.7, 0]),
    'train_task_color': angle,
    'trajectories': paths + 0.02 * rng.normal(size=paths.shape),
    'trajectory_goals': goals,
  }


def write_metrics(path, steps, curves, context, rng):
  """metrics.jsonl: a loss in every row, evaluations in some."""
  path.mkdir(parents=True, exist_ok=True)
  with open(path / 'metrics.jsonl', 'w', encoding='utf-8') as stream:
    for index, step in enumerate(steps):
      loss = 2.0 + rng.random(curves.shape[1])
      values = {'smac/critic/loss': loss.tolist()}
      values['eval/test/self_context/final_return'] = curves[index].tolist()
      values['eval/train/offline_context/final_return'] = context[
        index
      ].tolist()
      row = {
        'step': int(step),
        'iteration': index,
        'env_steps': 0,
        'wall_time_s': float(index),
        'values': values,
      }
      stream.write(json.dumps(row) + '\n')


def write_finetuning(path, seeds, tasks=8):
  """finetune.npz: seed s is s above FINETUNE, half of the tasks 3 above it."""
  rng = np.random.default_rng(1)
  values = FINETUNE + np.arange(seeds)[:, None, None]
  values = values + np.tile([-3.0, 3.0], tasks // 2)[:, None]
  steps = np.concatenate([[0, 256], 2000 * np.arange(1, 7)])
  steps = steps + rng.integers(-99, 100, size=values.shape)
  np.savez(
    path / 'evaluations' / 'finetune.npz',
    finetune_returns=values,
    finetune_env_steps=np.maximum(steps, 0),
  )


def make_offline_workdir(path, seeds=5, tasks=16):
  """A run of an algorithm without an online phase."""
  make_workdir(path, seeds, (), tasks)
  run = json.loads((path / 'run.json').read_text())
  run |= {
    'algorithm': 'focal',
    'headline_variant': '',
    'oracle_variant': '',
    'variants': {},
  }
  (path / 'run.json').write_text(json.dumps(run))
  return path


def make_workdir(path, seeds=5, variants=tuple(VARIANTS), tasks=16):
  """Writes a whole synthetic run and returns its path."""
  rng = np.random.default_rng(0)
  run = {
    'config': {
      'algorithm': {'latent_size': 5, 'kl_weight': 0.1},
      'family': {'name': 'point_robot'},
      'seeds': seeds,
    },
    'config_hash': '3f1c5a9b77d2',
    'command': 'python -m experiments.run',
    'profile': 'cpu',
    'family': 'point_robot',
    'algorithm': 'smac',
    'num_seeds': seeds,
    'headline_variant': 'ours',
    'oracle_variant': 'oracle',
    'variants': VARIANTS,
    'versions': {'jax': '0.10.2', 'python': '3.11'},
    'machine': {'cpu': '2 cores'},
  }
  path.mkdir(parents=True, exist_ok=True)
  (path / 'run.json').write_text(json.dumps(run))
  timing = {'collect': 21.4, 'offline': 64.0}
  points = path / 'evaluations'
  points.mkdir(exist_ok=True)
  np.savez(
    points / 'collect.npz',
    random_test_returns=returns(
      np.linspace(RANDOM - 0.2, RANDOM + 0.2, seeds), rng
    ),
    behaviour_test_returns=returns([BEHAVIOUR], rng),
    behaviour_data_returns=np.linspace(-16, -10, tasks),
  )
  np.savez(points / 'offline.npz', **_point(OFFLINE[:seeds], rng, 0.8, tasks))
  ramp = np.linspace(0, 1, 9)[:, None]
  start = -21 + ramp * (OFFLINE[:seeds] + 21)
  write_metrics(
    path / 'offline',
    np.arange(9) * 500,
    start,
    -21 + (1 - (1 - ramp) ** 3) * 13.5 + 0 * start,
    rng,
  )
  for name in variants:
    final, shift = ONLINE[name][:seeds], 0.1 if ONLINE[name][0] > -10 else 0.7
    np.savez(points / f'online-{name}.npz', **_point(final, rng, shift, tasks))
    ease = 1 - (1 - ramp[1:]) ** 2
    curve = OFFLINE[:seeds] + ease * (final - OFFLINE[:seeds])
    write_metrics(
      path / 'online' / name,
      4000 + np.arange(1, 9) * 1500,
      curve + 0.15 * rng.normal(size=curve.shape),
      OFFLINE_CONTEXT + 0.15 * rng.normal(size=curve.shape),
      rng,
    )
    timing[f'online/{name}'] = 31.0
  timing['test'] = 12.6
  (path / 'timing.json').write_text(json.dumps(timing))
  return path


@pytest.fixture(scope='session')
def data():
  """This module, for its literals: a conftest cannot be imported by name."""
  return sys.modules[__name__]


@pytest.fixture(name='make_workdir')
def _make_workdir(tmp_path):
  """A function that writes a synthetic run under tmp_path."""
  return lambda **kwargs: make_workdir(tmp_path / 'run', **kwargs)


@pytest.fixture(name='workdir')
def _workdir(tmp_path):
  """A complete synthetic run."""
  return make_workdir(tmp_path / 'run')
