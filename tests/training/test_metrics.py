"""Metric writers: nothing lost, nothing doubled, clear messages."""

import io
import json
import os
import re

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from offmeta.training import metrics
from offmeta.training.metrics import (
  ConsoleWriter,
  DivergenceError,
  JsonlWriter,
  MultiWriter,
  TensorBoardWriter,
)


def _rows(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(name='clock')
def _clock(monkeypatch):
  """A clock that moves only when told: clock[0] is the time in seconds."""
  now = [1000.0]
  monkeypatch.setattr(metrics.time, 'monotonic', lambda: now[0])
  return now


def test_jsonl_row(tmp_path, clock):
  path = tmp_path / 'sub' / 'metrics.jsonl'
  writer = JsonlWriter(path)
  clock[0] += 2.5
  values = {
    'a': jnp.float32(0.5),
    'b': jnp.array([1.0, jnp.nan, -jnp.inf]),
    'c': 3,
  }
  writer.write(4, values, iteration=2, env_steps=60)
  # Readable at once, without close().
  assert _rows(path) == [
    {
      'step': 4,
      'iteration': 2,
      'env_steps': 60,
      'wall_time_s': 2.5,
      'values': {'a': 0.5, 'b': [1.0, None, None], 'c': 3.0},
    }
  ]
  assert 'NaN' not in path.read_text()
  writer.write(5, {'a': np.nan})
  assert _rows(path)[1]['values'] == {'a': None}
  writer.close()
  with pytest.raises(ValueError, match='after close'):
    writer.write(6, {})


def test_jsonl_keeps_metrics_that_come_later(tmp_path):
  path = tmp_path / 'm.jsonl'
  writer = JsonlWriter(path)
  writer.write(1, {'a': 1})
  writer.write(2, {'b': [1, 2], 'a': 3})
  writer.write(3, {'c': 0})
  assert [sorted(r['values']) for r in _rows(path)] == [
    ['a'],
    ['a', 'b'],
    ['c'],
  ]


@pytest.mark.parametrize(
  'tail', ['{"step": 3, "itera', '{"step": 3}\n', '\x00\x00\x00', '{}']
)
def test_jsonl_drops_a_cut_last_line(tmp_path, tail):
  path = tmp_path / 'm.jsonl'
  writer = JsonlWriter(path)
  writer.write(1, {'a': 1})
  writer.write(2, {'a': 2})
  writer.close()
  with path.open('a') as file:
    file.write(tail)
  writer = JsonlWriter(path)
  writer.write(3, {'a': 3})
  writer.close()
  assert [r['step'] for r in _rows(path)] == [1, 2, 3]
  assert [p.name for p in tmp_path.iterdir()] == ['m.jsonl']


@pytest.mark.parametrize(
  'line',
  [
    'garbage',
    '[' * 5000,
    '{"step": "3", "wall_time_s": 0.0, "values": {}}',
    '{"step": 1e999, "wall_time_s": 0.0, "values": {}}',
    '{"step": 3, "wall_time_s": NaN, "values": {}}',
    f'{{"step": 3, "wall_time_s": 1{400 * "0"}, "values": {{}}}}',
    '{"step": 3, "wall_time_s": 0.0, "values": 4}',
  ],
)
def test_jsonl_refuses_a_file_broken_in_the_middle(tmp_path, line):
  path = tmp_path / 'm.jsonl'
  good = '{"step": 1, "wall_time_s": 0.0, "values": {}}\n'
  path.write_text(good + line + '\n' + good)
  with pytest.raises(ValueError, match='m.jsonl: line 2 is not a row'):
    JsonlWriter(path)
  assert path.read_text() == good + line + '\n' + good


def test_jsonl_does_not_wait_for_a_pipe(tmp_path):
  os.mkfifo(tmp_path / 'm.jsonl')
  with pytest.raises(OSError, match='a pipe or a device') as error:
    JsonlWriter(tmp_path / 'm.jsonl')
  assert error.value.filename == str(tmp_path / 'm.jsonl')


def test_jsonl_resumed_run_has_no_doubled_rows(tmp_path, clock):
  path = tmp_path / 'm.jsonl'
  writer = JsonlWriter(path)
  for step in range(1, 6):
    clock[0] += 10
    writer.write(step, {'a': step})
  writer.close()
  clock[0] += 1000  # The run was dead meanwhile: that time does not count.
  writer = JsonlWriter(path)
  writer.truncate_after(3)
  for step in (4, 5, 6):
    clock[0] += 10
    writer.write(step, {'a': -step})
  writer.close()
  rows = _rows(path)
  assert [r['step'] for r in rows] == [1, 2, 3, 4, 5, 6]
  assert [r['values']['a'] for r in rows] == [1, 2, 3, -4, -5, -6]
  assert [r['wall_time_s'] for r in rows] == [10, 20, 30, 40, 50, 60]


@pytest.mark.parametrize(
  ('value', 'message'),
  [(np.zeros((2, 2)), r"'a' has shape \(2, 2\)"), ('x', "'a' is not numeric")],
)
def test_what_is_not_a_metric_is_refused(tmp_path, value, message):
  writer = JsonlWriter(tmp_path / 'm.jsonl')
  with pytest.raises(ValueError, match=message):
    writer.write(1, {'a': value})
  assert not (tmp_path / 'm.jsonl').read_text()


def _events(directory):
  """The events in TensorBoard's files (length, crc, data, crc)."""
  events = []
  for path in sorted(directory.iterdir()):
    content, at = path.read_bytes(), 0
    while at < len(content):
      size = int.from_bytes(content[at : at + 8], 'little')
      events.append(
        event_pb2.Event.FromString(content[at + 12 : at + 12 + size])
      )
      at += size + 16
  return events


def _scalars(directory):
  return {
    (value.tag, event.step): value.simple_value
    for event in _events(directory)
    for value in event.summary.value
  }


def test_tensorboard_mean_and_spread(tmp_path):
  writer = TensorBoardWriter(tmp_path)
  writer.write(
    3, {'a': [1.0, 3.0, np.nan], 'b': 5.0}, iteration=2, env_steps=40
  )
  writer.write(4, {'new': 7.0, 'all_nan': [np.nan, np.nan]})
  writer.close()
  scalars = _scalars(tmp_path)
  assert scalars[('a', 3)] == 2.0
  assert scalars[('a/seed_std', 3)] == 1.0
  assert scalars[('b', 3)] == 5.0
  assert ('b/seed_std', 3) not in scalars
  assert scalars[('progress/env_steps', 3)] == 40
  assert scalars[('new', 4)] == 7.0
  assert not [tag for tag, _ in scalars if tag.startswith('all_nan')]


def test_tensorboard_hides_what_a_killed_run_wrote(tmp_path):
  writer = TensorBoardWriter(tmp_path)
  writer.truncate_after(6)
  writer.write(7, {'a': 1.0})
  with pytest.raises(ValueError, match='before the first write'):
    writer.truncate_after(6)
  writer.close()
  start = event_pb2.SessionLog.START
  starts = [e.step for e in _events(tmp_path) if e.session_log.status == start]
  assert starts == [7]


class _Terminal(io.StringIO):
  def isatty(self):
    return True


def test_console_in_a_log_file(clock):
  stream = io.StringIO()
  writer = ConsoleWriter(1000, 'offline', show=['loss'], stream=stream)
  for step in range(10, 310, 10):  # One row a second, 10 updates each.
    writer.write(step, {'loss': [step, step + 1.0]})
    clock[0] += 1
  writer.close()
  lines = stream.getvalue().splitlines()
  # Rows at 0, 10 and 20 s, and the last one when it ends.
  assert [line.split()[1] for line in lines] == [
    '10/1000',
    '110/1000',
    '210/1000',
    '300/1000',
  ]
  assert lines[0].split()[2:5] == ['1%', '--', 'updates/s']
  assert lines[1] == (
    'offline 110/1000  11%  10 updates/s  0:10 elapsed  1:29 left  loss 110.5'
  )
  assert '\r' not in stream.getvalue()


def test_console_on_a_terminal_redraws_one_line(clock):
  stream = _Terminal()
  writer = ConsoleWriter(100, 'online', stream=stream)
  for step in (10, 20, 30):
    clock[0] += 3600
    writer.write(step, {})
  writer.close()
  text = stream.getvalue()
  assert text.count('\n') == 1 and text.endswith('\n')
  drawn = text.rstrip('\n').split('\r')[1:]
  assert len(drawn) == 3
  assert re.search(r'30/100 .*3:00:00 elapsed  7:00:00 left', drawn[-1])
  # A shorter line covers the longer one before it.
  widths = [len(line) for line in drawn]
  assert widths == sorted(widths)


def test_console_rate_after_a_resume_counts_new_updates_only(clock):
  stream = io.StringIO()
  writer = ConsoleWriter(1000, 'x', stream=stream, interval=0)
  writer.truncate_after(500)
  writer.write(510, {})
  clock[0] += 2
  writer.write(520, {})
  assert '5 updates/s' in stream.getvalue().splitlines()[-1]


def test_multi_writer_reaches_all_and_closes_all(tmp_path):
  class Broken:
    def write(self, step, values, *, iteration=0, env_steps=0):
      del step, values, iteration, env_steps

    def truncate_after(self, step):
      del step

    def close(self):
      raise OSError('stuck')

  first = JsonlWriter(tmp_path / 'a.jsonl')
  second = JsonlWriter(tmp_path / 'b.jsonl')
  writer = MultiWriter([first, Broken(), second])
  writer.write(1, {'a': 1.0}, iteration=1, env_steps=2)
  writer.write(2, {'a': 2.0})
  writer.truncate_after(1)
  with pytest.raises(OSError, match='stuck'):
    writer.close()
  for name, each in (('a', first), ('b', second)):
    rows = _rows(tmp_path / f'{name}.jsonl')
    assert [(r['step'], r['env_steps']) for r in rows] == [(1, 2)]
    with pytest.raises(ValueError, match='after close'):
      each.write(3, {})


def test_finite_metrics_pass():
  metrics.assert_finite({'a': jnp.float32(1), 'b': [1.0, -3.0]}, 'offline')


def test_divergence_names_metric_seeds_step_and_remedy():
  values = {
    'smac/critic/loss': jnp.array([1.0, jnp.nan, 2.0, jnp.nan]),
    'smac/actor/loss': jnp.array([1.0, 2.0, jnp.inf, 2.0]),
    'smac/kl': jnp.float32(jnp.nan),
    'fine': 1.0,
  }
  with pytest.raises(DivergenceError) as error:
    metrics.assert_finite(values, 'stage smac', step=120)
  message = str(error.value)
  assert 'stage smac, step 120' in message
  assert 'smac/critic/loss is NaN in seeds 1, 3 of 4' in message
  assert 'smac/actor/loss is infinite in seed 2 of 4' in message
  assert 'smac/kl is nan' in message
  assert 'fine' not in message
  assert 'checkpoint' in message and 'learning rate' in message
