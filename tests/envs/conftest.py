"""Physics compiles for seconds: compile the same function once per session."""

import pytest


@pytest.fixture(scope='module', autouse=True)
def _compile_once(compile_once):
  """The session's compilation cache, for all tests of this folder."""
