"""Physics compiles for seconds: compile the same function once per session."""

from collections.abc import Iterator

import jax
from jax.experimental.compilation_cache import compilation_cache
import pytest

_SETTINGS = {
    'jax_compilation_cache_dir': None,  # filled in below
    'jax_persistent_cache_min_compile_time_secs': 0.5,
    'jax_persistent_cache_min_entry_size_bytes': -1,
}


@pytest.fixture(scope='package', autouse=True)
def _compile_once(tmp_path_factory) -> Iterator[None]:
  """A compilation cache in a temporary folder, for this folder's tests."""
  settings = dict(_SETTINGS)
  settings['jax_compilation_cache_dir'] = str(tmp_path_factory.mktemp('xla'))
  before = {name: getattr(jax.config, name) for name in settings}
  if before['jax_compilation_cache_dir']:  # the session has one already
    yield
    return
  for name, value in settings.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()
  yield
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()
