"""The style of the code: what ruff checks and how it formats."""

import pathlib
import subprocess
import sys

import pytest

_ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
  'command', [('check',), ('format', '--check')], ids=' '.join
)
def test_ruff_has_nothing_to_say(command):
  done = subprocess.run(
    [sys.executable, '-m', 'ruff', *command, '--no-cache', '.'],
    cwd=_ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stdout + done.stderr
