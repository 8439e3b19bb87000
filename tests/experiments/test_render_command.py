"""The command `experiments.render`: what it shows and what it refuses."""

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
from PIL import Image
import pytest
import tiny_run

from experiments.runs import (
  jax_settings,
  record,
  rendering as playback,
)
from offmeta import envs, playback as restore, types
from offmeta.results import animation, records
from offmeta.testing import probes
from offmeta.training.config import ConfigError

_ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _leave_jax_alone(monkeypatch):
  monkeypatch.setattr(jax_settings, 'configure', lambda: None)


def _show(path, **changes):
  show = playback.Show(
    task=0,
    seed=0,
    episodes=(),
    out=str(path),
    every=None,
    fps=None,
    width=240,
    height=180,
  )
  return show._replace(**changes)


def _fresh(show, family='point_robot', options=(), policy='random'):
  return playback.run(
    show, lambda: playback.fresh(show, family, list(options), policy)
  )


def _frames(path):
  with Image.open(path) as image:
    frames = []
    for i in range(image.n_frames):
      image.seek(i)
      frames.append(np.asarray(image.convert('RGB'), int))
    return np.array(frames), image.info['duration']


# A family of its own.


@pytest.mark.parametrize(
  'every, episodes, count',
  [(None, (), 20), (1, ('1', '3'), 40), (6, (), 4), (50, ('2',), 1)],
)
def test_one_picture_per_step_shown(tmp_path, every, episodes, count):
  show = _show(tmp_path / 'new' / 'x.gif', every=every, episodes=episodes)
  assert _fresh(show) == 0
  frames, duration = _frames(show.out)
  assert frames.shape == (count, 180, 240, 3)
  assert duration == 100 * (every or 1) or count == 1
  if count > 1:  # things move, below the text as well
    moved = np.abs(np.diff(frames[:, 60:], axis=0)).max(axis=(1, 2, 3))
    assert np.all(moved > 30)


def test_fps(tmp_path):
  show = _show(tmp_path / 'x.gif', fps=25.0)
  assert _fresh(show) == 0
  assert _frames(show.out)[1] == 40


def test_options_and_policies(tmp_path):
  show = _show(tmp_path / 'x.gif', task=2)
  options = ('goals=circle', 'episode_length=5')
  done = playback.fresh(show, 'point_robot', options, 'zero')
  assert done.family.spec.options['goals'] == 'circle'
  np.testing.assert_array_equal(
    done.task['goal'], done.family.task_list('default')[1]['goal'][2]
  )
  assert done.adaptation.valid.sum() == 5
  assert not np.any(done.adaptation.transitions.extras['physics'])
  assert not np.any(done.adaptation.transitions.action)
  moved = playback.fresh(show, 'point_robot', options, 'random')
  assert np.any(moved.adaptation.transitions.extras['physics'])


class _Scripted(envs.FAMILIES['point_robot']):
  """Its script goes straight to the goal."""

  def scripted_policy(self):
    nothing = lambda params, *rest: ()
    return types.Policy(
      init=nothing,
      observe=nothing,
      adapt=nothing,
      act=lambda task, state, observation, key: (
        10.0 * (task['goal'] - observation),
        state,
        {},
      ),
    )


def test_script(tmp_path, monkeypatch):
  monkeypatch.setitem(envs.FAMILIES, 'scripted', _Scripted)
  done = playback.fresh(_show(tmp_path / 'x.gif'), 'scripted', [], 'script')
  last = done.adaptation.transitions.extras['physics'][-1]
  np.testing.assert_allclose(last, done.task['goal'], atol=1e-5)


def test_captions_tell_what_happens(tmp_path, monkeypatch):
  lines = []
  monkeypatch.setattr(
    animation, 'caption', lambda image, text: lines.append(text) or image
  )
  show = _show(tmp_path / 'x.gif', episodes=('2',), every=10)
  done = playback.fresh(show, 'point_robot', [], 'random')
  assert playback.run(show, lambda: done) == 0
  total = done.adaptation.returns[1]
  goal = ', '.join(f'{x:.2f}' for x in done.task['goal'])
  assert lines[-1] == (
    'point_robot  random policy',
    f'task 0: goal ({goal})',
    f'episode 2   step 20   return {total:.1f}',
  )
  assert [text[2][:18] for text in lines] == [
    'episode 2   step 1',
    'episode 2   step 2',
  ]


def test_episodes_of_families_with_terminations():
  family = probes.CountingFamily(terminates=True)
  time = np.array([0, 1, 2, 0, 0, 1, 0, 0], np.float32)
  log = types.Transition(*[np.zeros(8)] * 5, extras={'time': time})
  assert playback._split(family, log, 6) == [
    range(0, 3),
    range(3, 4),
    range(4, 6),
  ]
  family = probes.CountingFamily()  # a restart is no new episode
  assert playback._split(family, log, 8) == [range(0, 5), range(5, 8)]


@pytest.mark.parametrize(
  'arguments, changes, message',
  [
    ({'family': 'ant_direction'}, {}, 'ant_direction'),
    ({'options': ('goals=moon',)}, {}, 'moon'),
    ({'options': ('colour=red',)}, {}, 'colour'),
    ({'policy': 'script'}, {}, 'script'),
    ({}, {'task': 20}, '0 to 19'),
    ({}, {'task': -1}, '0 to 19'),
    ({}, {'episodes': ('0',)}, 'from 1'),
    ({}, {'episodes': ('99999999999',)}, 'at most 1000'),
    ({}, {'fps': float('nan')}, '--fps: must be a finite number, not nan'),
    ({}, {'fps': float('inf')}, '--fps: must be a finite number, not inf'),
    ({}, {'width': 10**8}, '--width: must be at most 4096'),
    ({}, {'height': 10**30}, '--height: must be at most 4096'),
    ({}, {'every': 10**30}, '--every: must be at most'),
    ({}, {'seed': 2**32}, '--seed: must be at most 4294967295'),
    ({}, {'seed': -1}, '--seed: must be at least 0'),
    ({}, {'out': 'x.avi'}, '.avi'),
    ({}, {'out': '/proc/none/x.gif'}, '/proc/none'),
  ],
  ids=str,
)
def test_refusals(tmp_path, capsys, arguments, changes, message):
  assert _fresh(_show(tmp_path / 'x.gif', **changes), **arguments) == 1
  (error,) = capsys.readouterr().err.strip().splitlines()
  assert error.startswith('error: ') and message in error
  assert not list(tmp_path.iterdir())


def test_a_family_that_cannot_be_drawn(tmp_path, capsys, monkeypatch):
  monkeypatch.setitem(envs.FAMILIES, 'probe', probes.CountingFamily)
  monkeypatch.setattr(
    probes.CountingFamily,
    'task_list',
    lambda self, name: (self.sample_tasks(jax.random.key(0), 3),) * 2,
  )
  assert _fresh(_show(tmp_path / 'x.gif'), 'probe') == 1
  assert 'geometry(physics, task)' in capsys.readouterr().err


def test_the_command(tmp_path):
  def command(*flags):
    return subprocess.run(
      [sys.executable, '-m', 'experiments.render', *flags],
      cwd=_ROOT,
      capture_output=True,
      text=True,
      timeout=120,
      env={**os.environ, 'XDG_CACHE_HOME': str(tmp_path / 'cache')},
    )

  out = tmp_path / 'x.html'
  done = command(
    '--family=point_robot',
    f'--out={out}',
    '--task=1',
    '--option=episode_length=3',
    '--option=reward=sparse',
  )
  assert (done.returncode, done.stderr) == (0, '')
  assert str(out) in done.stdout and 'max="2"' in out.read_text()
  out = tmp_path / 'x.gif'
  done = command(
    '--config=examples/reacher.py',
    f'--out={out}',
    '--option=episode_length=3',
    '--width=64',
    '--height=48',
  )
  assert (done.returncode, done.stderr) == (0, '')
  assert len(_frames(out)[0]) == 3
  for flags in (
    (f'--out={out}',),
    ('--config=moved.py', '--out=x.gif'),
    ('--family=a', '--workdir=b', '--out=x.gif'),
    ('--family=point_robot',),
  ):
    done = command(*flags)
    assert done.returncode == 1, flags
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


# A run.


_OWN_FAMILY = """
from experiments.configs import base
from offmeta import envs
def get_config(name):
  envs.register(name, envs.FAMILIES['point_robot'])
  return base.make_config({'family': {'name': name}}, {})
"""


def test_a_family_that_its_config_file_brings_along(
  tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(envs, 'FAMILIES', dict(envs.FAMILIES))
  monkeypatch.setattr(restore, 'meta_test', lambda setup, *a, **k: 'adapted')
  config = tiny_run.make_config({'family': {'name': 'mine'}})
  file = tmp_path / 'own.py'
  record.write(config, tmp_path, 'smoke', 'command', f'{file}:mine')
  show = _show(tmp_path / 'x.gif')
  restored = lambda: playback.restored(show, str(tmp_path), 'offline')
  assert playback.run(show, restored) == 1
  (error,) = capsys.readouterr().err.splitlines()
  assert f'config file {file}: No such file' in error
  file.write_text(_OWN_FAMILY)
  for _ in range(2):  # the second time it is registered
    assert isinstance(restored().family, envs.FAMILIES['point_robot'])
  assert records.load_run(tmp_path / 'run.json').family == 'mine'


@pytest.fixture(name='run', scope='module')
def _run(finished_run):
  return finished_run


@pytest.mark.parametrize(
  'stage, scores',
  [
    ('offline', 'offline:test_self_returns'),
    ('online/matched', 'online-matched:test_self_returns'),
    ('collect', 'collect:behaviour_test_returns'),
  ],
)
def test_shows_the_episodes_that_were_scored(run, tmp_path, stage, scores):
  seed = 0 if stage == 'collect' else 1
  show = _show(tmp_path / 'x.gif', task=1, seed=seed)
  done = playback.restored(show, str(run), stage)
  file, name = scores.split(':')
  scored = np.load(run / 'evaluations' / f'{file}.npz')[name][seed, 1, 0]
  np.testing.assert_allclose(done.adaptation.returns, scored, rtol=1e-4)
  assert playback.run(show, lambda: done) == 0
  frames, _ = _frames(show.out)
  assert len(frames) == 40  # two episodes
  assert done.phases(1) == ' (prior)' and done.phases(2) == ' (adapted)'


def test_behaviour_by_script_or_from_elsewhere(tmp_path, monkeypatch):
  monkeypatch.setitem(envs.FAMILIES, 'scripted', _Scripted)
  setup = lambda **collect: tiny_run.make_setup(
    tmp_path, {'family': {'name': 'scripted'}, 'collect': collect}
  )
  record = lambda state: {'physics': state.physics}
  done = restore.meta_test(setup(source='script'), 'collect', 0, 1, record)
  goal = setup().test_tasks['goal'][1]
  np.testing.assert_allclose(
    done.transitions.extras['physics'][19::20], [goal, goal], atol=1e-5
  )
  with pytest.raises(ConfigError, match='given its dataset'):
    restore.meta_test(setup(dataset='data'), 'collect', 0, 1, record)


@pytest.mark.parametrize(
  'stage, changes, message',
  [
    ('online/mached', {}, 'matched'),
    ('test', {}, 'collect'),
    ('offline', {'seed': 2}, '0 to 1'),
    ('collect', {'seed': 1}, '0 to 0'),
    ('offline', {'task': -1}, '0 to 1'),
    ('offline', {'episodes': ('3',)}, 'only 2'),
  ],
  ids=str,
)
def test_refusals_of_a_run(run, tmp_path, capsys, stage, changes, message):
  show = _show(tmp_path / 'x.gif', **changes)
  assert (
    playback.run(show, lambda: playback.restored(show, str(run), stage)) == 1
  )
  (error,) = capsys.readouterr().err.strip().splitlines()
  assert error.startswith('error: ') and message in error


def test_unfinished_and_foreign_runs(run, tmp_path, capsys):
  (tmp_path / 'run.json').write_text((run / 'run.json').read_text())
  show = _show(tmp_path / 'x.gif')
  restored = lambda: playback.restored(show, str(tmp_path), 'offline')
  assert playback.run(show, restored) == 1
  assert 'not finished' in capsys.readouterr().err
  text = (run / 'run.json').read_text()
  (tmp_path / 'run.json').write_text(text.replace('"chunk": 2', '"chunk": 3'))
  assert playback.run(show, restored) == 1
  assert 'other settings' in capsys.readouterr().err
  (tmp_path / 'run.json').unlink()
  assert playback.run(show, restored) == 1
  assert 'run.json' in capsys.readouterr().err
