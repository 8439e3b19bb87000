"""Import directions (BUILD_NOTES.md), and what must not be in the package."""

import ast
import functools
import os
import pathlib
import subprocess
import sys

import pytest

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_PACKAGE = _ROOT / 'offmeta'
_FILES = sorted(_PACKAGE.rglob('*.py'))

# Part of the package -> the parts that it may import, itself aside. A part is
# a top-level module or folder.
_ENGINE = {
  'limits',
  'types',
  'parallel',
  'processes',
  'losses',
  'algorithms',
  'data',
  'disk',
  'envs',
  'evaluation',
  'results',
  'rollout',
  'checkpoints',
}
_ALLOWED = {
  'limits': set(),
  'types': {'limits'},
  'disk': set(),
  'processes': {'types'},
  'parallel': {'types', 'processes'},
  'optim': {'types'},
  'networks': {'types'},
  'losses': {'types', 'parallel'},
  'algorithms': {'limits', 'types', 'parallel', 'optim', 'networks', 'losses'},
  'envs': {'types'},
  'data': {'types', 'disk', 'losses'},
  'checkpoints': {'types', 'disk', 'parallel', 'processes'},
  'rollout': {'types', 'parallel'},
  'evaluation': {'types', 'parallel', 'rollout', 'data', 'losses'},
  'results': {'disk'},
  'testing': {'types'},
  'training': _ENGINE,
  'collection': _ENGINE | {'training'},
  'phases': _ENGINE | {'training', 'collection'},
  'playback': {'types', 'disk', 'rollout', 'training', 'collection'},
  '__init__': {'types'},
}


def _part(path):
  return path.relative_to(_PACKAGE).with_suffix('').parts[0]


@functools.cache
def _nodes(path):
  """All of a file's code."""
  return tuple(ast.walk(ast.parse(path.read_text())))


@functools.cache
def _imports(path):
  """Dotted names that a file imports, at any depth of its code."""
  names = []
  for node in _nodes(path):
    if isinstance(node, ast.Import):
      names += [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{path}: relative import'
      names += [f'{node.module}.{alias.name}' for alias in node.names]
  return names


def _files(*parts):
  return [path for path in _FILES if _part(path) in parts]


def _assert_no_import(paths, *modules):
  for path in paths:
    for name in _imports(path):
      for module in modules:
        assert name != module and not name.startswith(f'{module}.'), (
          f'{path.relative_to(_ROOT)} imports {name}'
        )


def test_every_part_is_in_the_table():
  assert {_part(path) for path in _FILES} == set(_ALLOWED)


@pytest.mark.parametrize('part', sorted(_ALLOWED))
def test_directions(part):
  for path in _files(part):
    for name in _imports(path):
      if name.split('.')[0] != 'offmeta':
        continue
      target = name.split('.')[1]
      assert target == part or target in _ALLOWED[part], (
        f'{path.relative_to(_ROOT)} imports {name}; {part} may import'
        f' {sorted(_ALLOWED[part])}'
      )


def test_only_networks_import_flax_linen():
  others = [path for path in _FILES if _part(path) != 'networks']
  _assert_no_import(others, 'flax.linen', 'flax.nnx', 'haiku')
  # `struct` in types.py is the only other use of flax.
  _assert_no_import([p for p in others if _part(p) != 'types'], 'flax')


def test_losses_know_no_networks_and_no_optimiser():
  _assert_no_import(_files('losses'), 'flax', 'optax', 'offmeta.networks')


def test_results_import_no_jax():
  _assert_no_import(
    _files('results'), 'jax', 'jaxlib', 'flax', 'optax', 'chex', 'orbax'
  )


def test_nothing_imports_experiments_or_tests():
  _assert_no_import(_FILES, 'experiments', 'tests', 'pytest')


def test_collectives_live_in_one_file():
  names = {
    'pmap',
    'pmean',
    'psum',
    'pmax',
    'all_gather',
    'shard_map',
    'axis_index',
  }
  for path in _FILES:
    if _part(path) == 'parallel':
      continue
    for node in _nodes(path):
      if not isinstance(node, ast.Attribute) or node.attr not in names:
        continue
      base = ast.unparse(node.value)
      assert base not in ('jax', 'jax.lax', 'lax'), (
        f'{path.relative_to(_ROOT)}:{node.lineno} uses {base}.{node.attr}'
      )


def test_no_uninitialised_arrays_and_no_pickle():
  _assert_no_import(_FILES, 'pickle', 'cloudpickle', 'dill', 'joblib')
  for path in _FILES:
    for node in _nodes(path):
      where = f'{path.relative_to(_ROOT)}:{getattr(node, "lineno", 0)}'
      if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        assert (node.value.id, node.attr) not in {
          ('jnp', 'empty'),
          ('jnp', 'empty_like'),
        }, where
      if isinstance(node, ast.keyword) and node.arg == 'allow_pickle':
        assert ast.unparse(node.value) == 'False', where


_IMPORT_ALL = """
import importlib, pkgutil, sys, warnings
with warnings.catch_warnings(record=True) as caught:
  warnings.simplefilter('always')
  import offmeta
  names = [m.name for m in pkgutil.walk_packages(
      offmeta.__path__, 'offmeta.', onerror=lambda name: None)]
  for name in names:
    importlib.import_module(name)
bad = [w for w in caught if issubclass(w.category, DeprecationWarning)
       and '/offmeta/' in w.filename.replace(chr(92), '/')]
for w in bad:
  print(w.filename, w.lineno, w.message)
assert len(names) > 25, names
heavy = {'matplotlib', 'brax', 'mujoco', 'PIL'} & set(sys.modules)
assert not heavy, heavy
sys.exit(bool(bad))
"""


def test_importing_everything_is_light_and_raises_no_deprecation_warning():
  done = subprocess.run(
    [sys.executable, '-c', _IMPORT_ALL],
    capture_output=True,
    text=True,
    cwd=_ROOT,
    env={**os.environ, 'PYTHONPATH': str(_ROOT)},
    timeout=300,
  )
  assert done.returncode == 0, done.stdout + done.stderr
