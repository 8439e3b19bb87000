"""Reading workdirs: killed and resumed runs, and damaged files."""

import json
import logging
import os
import shutil

import numpy as np
import pytest

from offmeta.results import records


def _write_rows(path, *rows, end=''):
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows) + end)


def _row(step, **values):
  return {
    'step': step,
    'iteration': 0,
    'env_steps': 0,
    'wall_time_s': 1.0,
    'values': values,
  }


def test_loads_everything(workdir):
  record = records.load(workdir)
  assert record.run.num_seeds == 5
  assert set(record.evaluations) == {
    'collect',
    'offline',
    'online-ours',
    'online-released',
    'online-offline_contexts',
    'online-oracle',
  }
  assert record.array('offline', 'test_self_returns').shape == (5, 8, 2, 3)
  assert record.array('offline', 'random_test_returns') is None
  assert record.online('nobody', 'test_self_returns') is None
  assert record.other_variants == ['released', 'offline_contexts']
  series = record.metrics['online/ours']['eval/test/self_context/final_return']
  assert series.values.shape == (8, 5)
  assert series.step.tolist() == [5500 + 1500 * i for i in range(8)]
  assert record.timing['collect'] == 21.4


def test_truncated_last_line_is_dropped(tmp_path, caplog):
  path = tmp_path / 'metrics.jsonl'
  _write_rows(
    path, _row(1, loss=1.0), _row(2, loss=2.0), end='{"step": 3, "values": {"lo'
  )
  with caplog.at_level(logging.WARNING):
    series = records.load_metrics(path)['loss']
  assert series.step.tolist() == [1, 2]
  assert not caplog.records


def test_broken_line_in_the_middle_is_reported(tmp_path, caplog):
  path = tmp_path / 'metrics.jsonl'
  text = '\n'.join(
    [
      json.dumps(_row(1, loss=1.0)),
      '{"step": 2, "va',
      json.dumps(_row(3, loss=3.0)),
    ]
  )
  path.write_text(text + '\n')
  with caplog.at_level(logging.WARNING):
    series = records.load_metrics(path)['loss']
  assert series.step.tolist() == [1, 3]
  assert f'{path}:2' in caplog.text


def test_repeated_steps_keep_the_last(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  _write_rows(
    path,
    _row(1, loss=1.0),
    _row(2, loss=2.0),
    _row(3, loss=3.0),
    _row(2, loss=20.0),
    _row(4, loss=4.0),
  )
  series = records.load_metrics(path)['loss']
  assert series.step.tolist() == [1, 2, 3, 4]
  assert series.values[:, 0].tolist() == [1.0, 20.0, 3.0, 4.0]


def test_metrics_that_are_not_in_every_row(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  _write_rows(
    path,
    _row(1, loss=[1.0, 2.0]),
    _row(2, loss=[3.0, None], score=7.0),
    _row(2, other=1.0),
  )
  metrics = records.load_metrics(path)
  np.testing.assert_array_equal(
    metrics['loss'].values, [[1.0, 2.0], [3.0, np.nan]]
  )
  assert metrics['score'].step.tolist() == [2]
  assert metrics['score'].values.tolist() == [[7.0]]


def test_nan_in_metrics_is_read(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"step": 1, "values": {"loss": [NaN, 1.0]}}\n')
  assert np.isnan(records.load_metrics(path)['loss'].values[0, 0])


def test_empty_metrics(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('')
  assert records.load_metrics(path) == {}


def test_changing_number_of_seeds(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  _write_rows(path, _row(1, loss=[1.0, 2.0]), _row(2, loss=[1.0]))
  with pytest.raises(ValueError, match='fresh'):
    records.load_metrics(path)


@pytest.mark.parametrize(
  'text, message',
  [
    (None, 'run.json is missing'),
    ('{"num_seeds": 1', 'not valid JSON'),
    ('[1]', 'JSON object'),
    ('{"num_seeds": 1}', 'headline_variant'),
    (
      '{"num_seeds": 0, "headline_variant": "a", "variants": {"a": ""}}',
      'positive',
    ),
    (
      '{"num_seeds": 1, "headline_variant": "b", "variants": {"a": ""}}',
      'not among',
    ),
    ('[' * 5000, 'not valid JSON .*nested'),
    ('{"num_seeds": true, "headline_variant": ""}', 'positive'),
    (
      '{"num_seeds": 1, "headline_variant": "", "variants": null}',
      'variants must be a group, got None',
    ),
    (
      '{"num_seeds": 1, "headline_variant": "", "variants": {"a": 3}}',
      'variants must map names to descriptions',
    ),
    (
      '{"num_seeds": 1, "headline_variant": ["a"]}',
      r"headline_variant must be a text, got \['a'\]",
    ),
    (
      '{"num_seeds": 1, "headline_variant": "", "oracle_variant": 3}',
      'oracle_variant must be a text or null',
    ),
  ],
)
def test_bad_run_json(workdir, text, message):
  (workdir / 'run.json').unlink()
  if text is not None:
    (workdir / 'run.json').write_text(text)
  with pytest.raises(ValueError, match=message) as error:
    records.load(workdir)
  assert str(workdir / 'run.json') in str(error.value)


def test_missing_offline_evaluation(workdir):
  (workdir / 'evaluations' / 'offline.npz').unlink()
  with pytest.raises(ValueError, match=r'offline.npz is missing.*--phases'):
    records.load(workdir)


@pytest.mark.parametrize('damage', ['cut', 'flip', 'text', 'empty'])
def test_corrupted_evaluation(workdir, damage):
  path = workdir / 'evaluations' / 'online-ours.npz'
  data = bytearray(path.read_bytes())
  if damage == 'cut':
    data = data[: len(data) // 2]
  elif damage == 'flip':
    data[len(data) // 3] ^= 0xFF
  else:
    data = b'no archive' if damage == 'text' else b''
  path.write_bytes(bytes(data))
  with pytest.raises(ValueError, match=r'online-ours.npz cannot be read'):
    records.load(workdir)


def test_pickled_arrays_are_refused(workdir):
  np.savez(
    workdir / 'evaluations' / 'offline.npz',
    test_self_returns=np.array([{'a': 1}], dtype=object),
  )
  with pytest.raises(ValueError, match='plain arrays'):
    records.load(workdir)


@pytest.mark.parametrize(
  'name, array, message',
  [
    ('test_self_returns', np.zeros((5, 8, 3)), r'\[S, M, r, e\].*\[5, 8, 3\]'),
    ('test_self_returns', np.zeros((5, 8, 0, 3)), r'\[5, 8, 0, 3\]'),
    ('test_self_returns', np.full((5, 8, 2, 3), 'x'), 'numbers'),
    ('test_self_returns', np.zeros((4, 8, 2, 3)), '4 seeds, but run.json'),
    ('test_self_returns', np.zeros((5, 7, 2, 3)), '7 held-out tasks'),
    ('train_self_returns', np.zeros((5, 3, 2, 3)), '3 training tasks'),
    ('trajectories', np.zeros((2, 3, 21, 3)), r'\[m, e, t, 2\]'),
  ],
)
def test_wrong_shapes(workdir, name, array, message):
  path = workdir / 'evaluations' / 'online-ours.npz'
  arrays = dict(np.load(path)) | {name: array}
  np.savez(path, **arrays)
  with pytest.raises(ValueError, match=message) as error:
    records.load(workdir)
  assert 'online-ours.npz' in str(error.value) and name in str(error.value)


def test_behaviour_may_have_one_seed_or_all(workdir):
  path = workdir / 'evaluations' / 'collect.npz'
  arrays = dict(np.load(path))
  np.savez(path, **arrays | {'behaviour_test_returns': np.zeros((5, 8, 1, 2))})
  records.load(workdir)
  np.savez(path, **arrays | {'behaviour_test_returns': np.zeros((3, 8, 1, 2))})
  with pytest.raises(ValueError, match='1 or 5'):
    records.load(workdir)


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_diverged_seed_is_named(workdir, value):
  path = workdir / 'evaluations' / 'offline.npz'
  arrays = dict(np.load(path))
  arrays['test_self_returns'][3, 2, 1] = value
  np.savez(path, **arrays)
  with pytest.raises(ValueError, match='seed 3, task 2, repetition 1'):
    records.load(workdir)


def test_missing_required_array(workdir):
  np.savez(workdir / 'evaluations' / 'offline.npz', other=np.zeros(3))
  with pytest.raises(ValueError, match='no array test_self_returns'):
    records.load(workdir)


def _finetuning(workdir, data, **changes):
  """The run with fine-tuning, some arrays replaced or (None) left out."""
  data.write_finetuning(workdir, 5)
  path = workdir / 'evaluations' / 'finetune.npz'
  arrays = {**np.load(path), **changes}
  np.savez(path, **{k: v for k, v in arrays.items() if v is not None})


def test_fine_tuning_is_read(workdir, data):
  _finetuning(workdir, data)
  (workdir / 'finetune').mkdir()
  _write_rows(workdir / 'finetune/metrics.jsonl', _row(1, loss=[1.0] * 40))
  record = records.load(workdir)
  assert record.array('finetune', 'finetune_returns').shape == (5, 8, 8)
  assert record.metrics['finetune']['loss'].values.shape == (1, 40)


@pytest.mark.parametrize(
  'changes, message',
  [
    (
      {'finetune_env_steps': None},
      'no array finetune_env_steps; delete it and the folder finetune',
    ),
    ({'finetune_returns': np.zeros((5, 8, 7))}, '7 evaluations|8 evaluations'),
    ({'finetune_returns': np.zeros((5, 7, 8))}, '7 held-out tasks'),
    (
      {
        'finetune_returns': np.where(
          np.arange(320).reshape(5, 8, 8) == 100, np.nan, 0.0
        )
      },
      r'seed, task, evaluation \[1, 4, 4\]: training diverged',
    ),
  ],
)
def test_fine_tuning_that_is_damaged(workdir, data, changes, message):
  _finetuning(workdir, data, **changes)
  with pytest.raises(ValueError, match=message) as error:
    records.load(workdir)
  assert 'finetune.npz' in str(error.value)


@pytest.mark.parametrize(
  'text, message',
  [
    ('{"collect": "soon"}', 'timing.json must map'),
    ('{"collect": NaN}', 'timing.json must map .*collect is nan'),
    ('{"collect": 1e999}', 'timing.json must map .*collect is inf'),
    (f'{{"collect": 1{400 * "0"}}}', 'timing.json must map'),
    ('{"collect": null}', 'timing.json must map'),
    ('[' * 5000, 'timing.json is not valid JSON .*nested'),
  ],
)
def test_bad_timing(tmp_path, text, message):
  (tmp_path / 'timing.json').write_text(text)
  with pytest.raises(ValueError, match=message):
    records.load_timing(tmp_path / 'timing.json')


@pytest.mark.parametrize(
  'read',
  [
    records.load_run,
    records.load_timing,
    records.load_evaluation,
    records.load_metrics,
  ],
)
def test_a_pipe_is_not_read(tmp_path, read):
  """It would be waited for."""
  path = tmp_path / 'offline.npz'
  os.mkfifo(path)
  with pytest.raises(ValueError, match='offline.npz.* a pipe or a device'):
    read(path)


def test_an_evaluation_of_one_array(tmp_path):
  np.save(tmp_path / 'a.npy', np.zeros(3))
  (tmp_path / 'a.npy').rename(tmp_path / 'offline.npz')
  with pytest.raises(ValueError, match='cannot be read as plain arrays'):
    records.load_evaluation(tmp_path / 'offline.npz')


@pytest.mark.parametrize(
  'line',
  [
    '[' * 5000,
    '{"step": "3", "values": {"loss": 1}}',
    '{"step": 1e999, "values": {"loss": 1}}',
    f'{{"step": 1{400 * "0"}, "values": {{"loss": 1}}}}',
    f'{{"step": 3, "values": {{"loss": 1{400 * "0"}}}}}',
    '{"step": 3, "values": 4}',
  ],
)
def test_a_line_of_something_else_is_skipped(tmp_path, caplog, line):
  path = tmp_path / 'metrics.jsonl'
  path.write_text(line + '\n')
  with path.open('a') as file:
    file.write(json.dumps(_row(4, loss=2.0)) + '\n')
  with caplog.at_level(logging.WARNING):
    assert records.load_metrics(path)['loss'].step.tolist() == [4]
  assert 'metrics.jsonl:1 is not a metrics row' in caplog.text


def test_online_only(workdir):
  """Without a stage that trains offline its evaluation is not missed."""
  (workdir / 'evaluations/offline.npz').unlink()
  shutil.rmtree(workdir / 'offline')
  assert 'online-ours' in records.load(workdir).evaluations
  for path in (workdir / 'evaluations').glob('online-*.npz'):
    path.unlink()
  with pytest.raises(ValueError, match='nothing that was trained has been'):
    records.load(workdir)
