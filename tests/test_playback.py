"""Descriptions of runs that are damaged: one message, which names the file."""

import os
import pathlib

import pytest

from experiments.runs import record
from offmeta import playback
from offmeta.training.config import ConfigError, ExperimentConfig

_DAMAGED = {
  'nested': '[' * 5000,
  'list': '[1]',
  'number': '3',
  'text': '"config_hash"',
  'cut': '{"config": ',
  'no hash': '{"config": {}}',
}


def _damage(workdir: pathlib.Path, text: str | None):
  """Writes the text into run.json; None: puts a pipe in its place."""
  if text is None:
    os.mkfifo(workdir / 'run.json')
  else:
    (workdir / 'run.json').write_text(text)


@pytest.mark.parametrize(
  'text',
  [
    *_DAMAGED.values(),
    '{"config": 3, "config_hash": ""}',
    '{"config": {"family": 3}, "config_hash": ""}',
    '{"config": {"algorithm": ["smac"]}, "config_hash": ""}',
    None,
  ],
)
def test_nothing_is_restored_from_a_damaged_run(tmp_path, text):
  _damage(tmp_path, text)
  with pytest.raises(ConfigError, match='run.json: not readable as a run desc'):
    playback.read_config(tmp_path)


@pytest.mark.parametrize('text', [*_DAMAGED.values(), None])
def test_a_damaged_run_is_not_written_over(tmp_path, text):
  _damage(tmp_path, text)
  with pytest.raises(ConfigError, match='run.json: not readable as a run desc'):
    record.write(ExperimentConfig(), tmp_path, 'smoke', 'the command')
