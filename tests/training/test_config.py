"""The configuration: what it accepts, refuses and hashes."""

import copy
import dataclasses
import functools
import json
import re
import sys

from absl import flags
from ml_collections import config_flags
import pytest

from experiments.configs import (
  base,
  recipes,
  smac as smac_configs,
  smac_families,
)
from experiments.runs import configuration
from offmeta import algorithms, envs, limits
from offmeta.algorithms import ALGORITHMS
from offmeta.training import config as configs
from offmeta.training.config import ConfigError

_DEFAULT = configs.ExperimentConfig()
_TWO = {
  'online': {
    'variants': {
      'smac': {},
      'oracle': {'online': {'gather': {'rewards': 'true'}}},
    }
  }
}


def _nested(key, value):
  for part in reversed(key.split('.')):
    value = {part: value}
  return value


def _leaves(config, prefix=''):
  """(dotted key, value) of every field that is not a group."""
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    name = 'smac' if field.name == 'settings' else field.name
    if dataclasses.is_dataclass(value):
      yield from _leaves(value, f'{prefix}{name}.')
    else:
      yield f'{prefix}{name}', value


def _get(config, key):
  for part in key.split('.'):
    group = part == getattr(config, 'algorithm', None)
    config = config.settings if group else getattr(config, part)
  return config


def _other(value):
  """A valid value of the same type that differs."""
  if isinstance(value, bool):
    return not value
  if isinstance(value, (int, float)):
    return value + 1
  if isinstance(value, str):
    return value + 'x'
  if isinstance(value, tuple):
    return value + (7,)
  return {**value, 'extra': {'description': 'x'}}


# Types and keys.


@pytest.mark.parametrize(
  'key',
  [
    'typo',
    'smac.typo',
    'smac.online.typo',
    'collect.behaviour.online.typo',
    'online.gather.typo',
  ],
)
def test_unknown_key_is_named_in_full(key):
  with pytest.raises(ConfigError, match=rf'config\.{key}: unknown key; known'):
    configs.from_dict(_nested(key, 1))


@pytest.mark.parametrize(
  'key, value',
  [
    ('chunk', 'many'),
    ('chunk', 2.0),
    ('chunk', True),
    ('chunk', None),
    ('smac.discount', '0.9'),
    ('smac.discount', True),
    ('online.share_buffer', 1),
    ('family.name', 3),
    ('smac.actor_hidden', 64),
    ('online.variants', 'smac'),
    ('algorithm', ['smac']),
    ('algorithm', None),
  ],
)
def test_wrong_type_is_named_in_full(key, value):
  with pytest.raises(
    ConfigError, match=rf'config\.{key}: .* is {type(value).__name__}, but'
  ):
    configs.from_dict(_nested(key, value))


def test_a_group_needs_a_group():
  with pytest.raises(ConfigError, match=r'config\.smac\.online: expected a gr'):
    configs.from_dict({'smac': {'online': 3}})


def test_whole_numbers_serve_as_floats():
  config = configs.from_dict({'smac': {'reward_scale': 5}})
  assert isinstance(config.settings.reward_scale, float)
  same = configs.from_dict({'smac': {'reward_scale': 5.0}})
  assert configs.config_hash(config) == configs.config_hash(same)


@pytest.mark.parametrize('value', [10**400, -(10**400)])
def test_whole_numbers_that_no_float_holds(value):
  with pytest.raises(
    ConfigError, match=r'config\.smac\.discount: a whole numb'
  ):
    configs.from_dict({'smac': {'discount': value}})


def test_lists_serve_as_tuples():
  config = configs.from_dict({'smac': {'actor_hidden': [8, 9]}})
  assert config.settings.actor_hidden == (8, 9)


def test_override_keeps_the_rest():
  config = configs.from_dict({'smac': {'online': {'num_updates': 3}}})
  changed = [k for k, v in _leaves(config) if v != _get(_DEFAULT, k)]
  assert changed == ['smac.online.num_updates']


def test_round_trip():
  config = configs.from_dict(
    {
      'seed': 3,
      'smac': {'actor_hidden': (8,)},
      'family': {'options': {'goals': 'square'}},
    }
  )
  values = configs.to_dict(config)
  assert configs.from_dict(values) == config
  text = json.loads(json.dumps(values))  # lists for tuples
  assert configs.from_dict(text) == config


def test_nothing_given_is_altered_or_shared():
  before = configs.to_dict(configs.ExperimentConfig())
  base = configs.ExperimentConfig()
  given = {
    'online': {'variants': {'smac': {'smac': {'discount': 0.5}}, 'oracle': {}}},
    'family': {'options': {'goals': 'square'}},
  }
  copied = copy.deepcopy(given)
  config = configs.from_dict(given, base)
  configs.variant(config, 'smac')
  config.online.variants['smac']['smac']['discount'] = 0.1
  config.family.options['goals'] = 'circle'
  assert given == copied
  assert configs.to_dict(base) == before
  assert configs.to_dict(configs.ExperimentConfig()) == before


# Variants and the hash.


def test_variant_changes_what_it_says_only():
  config = configs.from_dict(
    {
      'online': {
        'variants': {
          'smac': {'description': 'd'},
          'oracle': {
            'description': 'e',
            'online': {'gather': {'rewards': 'true'}},
          },
        }
      }
    }
  )
  assert configs.variant(config, 'smac') == config
  oracle = configs.variant(config, 'oracle')
  changed = [k for k, v in _leaves(oracle) if v != _get(config, k)]
  assert changed == ['online.gather.rewards']


@pytest.mark.parametrize(
  'changes, part',
  [
    ({'family': {'num_train': 3}}, 'family'),
    ({'collect': {'iterations': 3}}, 'collect'),
    ({'evaluation': {'num_repeats': 9}}, 'evaluation'),
    ({'seed': 9}, 'seed'),
    ({'num_seeds': 9}, 'num_seeds'),
  ],
)
def test_variant_leaves_other_phases_alone(changes, part):
  config = configs.from_dict(
    {'online': {'variants': {'smac': changes, 'oracle': {}}}}
  )
  with pytest.raises(ConfigError, match=f'variants.smac: .*config.{part}'):
    configs.validate(config)


@pytest.mark.parametrize(
  'key', [key for key, _ in _leaves(_DEFAULT) if key != 'algorithm']
)
def test_hash_covers_every_field(key):
  changed = configs.from_dict(_nested(key, _other(_get(_DEFAULT, key))))
  assert configs.config_hash(changed) != configs.config_hash(_DEFAULT)


# The algorithm and its settings.


def test_another_algorithm_brings_its_settings():
  config = configs.from_dict(
    {'algorithm': 'sac', 'sac': {'discount': 0.5}, 'chunk': 3}
  )
  assert config.settings == ALGORITHMS['sac'].config(discount=0.5)
  values = configs.to_dict(config)
  assert values['sac']['discount'] == 0.5
  assert not {'settings', 'smac'} & values.keys()
  assert configs.from_dict(values) == config
  assert configs.config_hash(config) != configs.config_hash(
    configs.from_dict({'chunk': 3})
  )
  # What is changed later is of the same algorithm.
  assert configs.from_dict({'sac': {'discount': 0.7}}, config).settings == (
    ALGORITHMS['sac'].config(discount=0.7)
  )


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'algorithm': 'sax'}, "algorithm: no algorithm 'sax'; known: .*smac"),
    ({'algorithm': 'sac', 'smac': {'discount': 0.5}}, r'config\.smac: unknown'),
    ({'sac': {'discount': 0.5}}, r'config\.sac: unknown key'),
    ({'settings': {}}, r'config\.settings: unknown key'),
  ],
)
def test_settings_of_another_algorithm_are_refused(changes, message):
  with pytest.raises(ConfigError, match=message):
    configs.from_dict(changes)


def test_variants_need_an_online_phase():
  with pytest.raises(ConfigError, match='variants: sac has no online phase'):
    configs.validate(configs.from_dict({'algorithm': 'sac', **_TWO}))


@pytest.fixture
def registry():
  before = dict(ALGORITHMS)
  yield
  ALGORITHMS.clear()
  ALGORITHMS.update(before)


def test_an_algorithm_of_ones_own(registry):

  @dataclasses.dataclass(frozen=True)
  class Config:
    """One setting."""

    rate: float = 0.1

  def validate(settings):
    if settings.rate <= 0:
      raise ValueError(f'mine: rate={settings.rate}; must be positive')

  algorithms.register('mine', Config, lambda *args: None, validate=validate)
  config = configs.from_dict({'algorithm': 'mine', 'mine': {'rate': 2}})
  assert config.settings == Config(2.0)
  configs.validate(config)
  with pytest.raises(ConfigError, match='rate=-1.0; must be positive'):
    configs.validate(configs.from_dict({'mine': {'rate': -1}}, config))
  algorithms.register('mine', Config, lambda *args: 1)  # its file, again
  with pytest.raises(ValueError, match="an algorithm 'sac' already"):
    algorithms.register('sac', Config, lambda *args: 1)
  with pytest.raises(ValueError, match='not a Python identifier'):
    algorithms.register('my-own', Config, lambda *args: None)


@pytest.mark.parametrize(
  'kind, value, good',
  [
    (int, 0, False),
    (limits.CountOrZero, 0, True),
    (int, 3, True),
    (tuple, (64, 128), True),
    (int | None, None, True),
    (bool, False, True),
  ],
  ids=str,
)
def test_counts_that_declare_nothing(registry, kind, value, good):
  """What has such a name and is no whole number may be anything."""
  config = dataclasses.make_dataclass(
    'Config', [('context_size', kind, value)], frozen=True
  )
  algorithms.register('mine', config, lambda *args: None)
  made = configs.from_dict({'algorithm': 'mine'})
  if good:
    configs.validate(made)
    return
  with pytest.raises(
    ConfigError, match='mine.context_size: must be at least 1'
  ):
    configs.validate(made)


# Values.


def test_default_is_valid():
  configs.validate(_DEFAULT)


@pytest.mark.parametrize(
  'key, value, message',
  [
    ('num_seeds', 0, 'num_seeds: must be at least 1, not 0'),
    ('chunk', 0, 'chunk: must be at least 1'),
    ('first_seed', -1, 'first_seed: must be at least 0'),
    ('matmul_precision', 'fp8', "matmul_precision: 'fp8'; choose one of"),
    ('family.num_train', 0, 'family.num_train: must'),
    ('family.num_test', 0, 'family.num_test: must'),
    ('evaluation.every_updates', 0, 'evaluation.every_updates: must'),
    ('collect.log_size', 0, 'collect.log_size: must'),
    ('collect.log_slice', 'best', 'collect.log_slice: .*choose one of first'),
    ('online.headline', 'best', "online.headline: no variant 'best'; known"),
    ('online.oracle', 'best', "online.oracle: no variant 'best'; known"),
    (
      'online.gather.rewards',
      'some',
      "gather.rewards: 'some'; choose one of decoder, true",
    ),
    ('smac.online.context', 'any', "smac.online.context: 'any'; choose"),
    ('smac.online.num_updates', 0, 'smac.online.num_updates: must'),
    ('smac.offline.query_size', 0, 'smac.offline.query_size: must'),
    ('smac.kl_over_tasks', 'max', "kl_over_tasks: 'max'; choose"),
    ('smac.label_with', 'none', "label_with: 'none'; choose"),
    ('online.variants.smac.smac.typo', 1, r'config\.smac\.typo: unknown key'),
  ],
)
def test_bad_value_is_refused(key, value, message):
  changes = recipes.merge(_TWO, _nested(key, value))
  with pytest.raises(ConfigError, match=message):
    configs.validate(configs.from_dict(changes))


# The config files.

_SIZES = [
  (family, profile)
  for family in smac_families.FAMILIES
  for profile in smac_families.parts(family)[1]
]


@pytest.mark.parametrize('family, profile', _SIZES)
def test_every_profile_is_valid(family, profile):
  config = configuration.resolve(smac_configs.get_config(family), profile, {})
  assert config.family.name == family
  for name in config.online.variants:
    assert config.online.variants[name]['description']
    configs.variant(config, name)
  oracle = configs.variant(config, config.online.oracle)
  assert oracle.online.gather.rewards == 'true'
  headline = configs.variant(config, config.online.headline)
  assert headline.online.gather.rewards == 'decoder'


def test_all_profiles_exist():
  families = {
    'point_robot',
    'cheetah_vel',
    'cheetah_dir',
    'ant_dir',
    'ant_goal',
    'humanoid_dir',
    'walker_params',
    'hopper_params',
    'manipulation',
    'sparse_point_robot',
  }
  assert set(_SIZES) == {
    (family, profile)
    for family in families
    for profile in ('smoke', 'cpu', 'paper')
  }


@pytest.mark.parametrize('family, profile', _SIZES)
def test_command_line_wins_over_the_profile(family, profile):
  plain = configuration.resolve(smac_configs.get_config(family), profile, {})
  overrides = {
    'num_seeds': plain.num_seeds + 1,
    'smac.offline.num_updates': plain.settings.offline.num_updates + 1,
    'collect.gather.tasks_per_iteration': 1,
  }
  config = configuration.resolve(
    smac_configs.get_config(family), profile, overrides
  )
  for key, value in overrides.items():
    assert _get(config, key) == value, key
  changed = [k for k, v in _leaves(config) if v != _get(plain, k)]
  assert sorted(changed) == sorted(overrides)


_UNLISTED = [  # options that the config files do not list
  ('experiments/configs/smac.py:manipulation', 'aims', 'internal'),
  ('experiments/configs/smac.py:ant_dir', 'terminate', False),
  ('experiments/configs/smac.py:walker_params', 'log_scale_limit', 2.0),
  ('examples/reacher.py', 'backend', 'spring'),
]


def _load(name):
  return configuration.load_config(str(configuration.ROOT / name))


@pytest.mark.parametrize('name, option, value', _UNLISTED)
def test_options_of_the_family_add_up(name, option, value):
  values = _load(name)
  assert option in values.family.options
  for profile in values.profiles:
    plain = configuration.resolve(values, profile, {}).family.options
    config = configuration.resolve(
      values, profile, {f'family.options.{option}': value}
    )
    assert config.family.options == {**plain, option: value}
    assert plain.get(option) != value
    assert None not in plain.values()
    text = json.loads(json.dumps(configs.to_dict(config)))
    assert configs.config_hash(configs.from_dict(text)) == (
      configs.config_hash(config)
    )


def test_options_of_a_profile_add_to_those_of_the_config():
  values = base.make_config(
    {'family': {'name': 'ant_dir', 'options': {'reward': 'forward'}}},
    {'small': {'family': {'options': {'backend': 'mjx'}}}},
  )
  plain = configuration.resolve(values, 'small', {})
  assert plain.family.options == {'reward': 'forward', 'backend': 'mjx'}
  given = configuration.resolve(
    values, 'small', {'family.options.backend': 'spring'}
  )
  assert given.family.options == {'reward': 'forward', 'backend': 'spring'}


def test_families_that_take_any_option_and_unknown_ones(monkeypatch):
  make = lambda name: base.make_config(
    {'family': {'name': name, 'options': {'size': 2}}}, {'cpu': {}}
  )
  monkeypatch.setitem(envs.FAMILIES, 'any', lambda height=1, **options: None)
  for name in ('any', 'moon'):
    config = configuration.resolve(make(name), 'cpu', {})
    assert config.family.options == {'size': 2}


@pytest.fixture(name='parse')
def _parse(monkeypatch):
  """(*arguments) -> resolved configuration, as `experiments.run` reads it."""

  def parse(*arguments):
    monkeypatch.setattr(sys, 'argv', ['run', *arguments])
    # As in a new process: a second file would be loaded into the first one.
    monkeypatch.delitem(sys.modules, 'config_config', raising=False)
    known = flags.FlagValues()
    monkeypatch.setattr(flags, 'FLAGS', known)
    monkeypatch.setattr(
      config_flags,
      'DEFINE_config_file',
      functools.partial(config_flags.DEFINE_config_file, flag_values=known),
    )
    flag = configuration.define_config_flag()
    configuration.parse_flags(sys.argv)
    values, overrides = configuration.from_flag(flag)
    return configuration.resolve(values, 'smoke', overrides)

  return parse


def test_options_from_the_command_line(parse):
  config = parse(
    f'--config={configuration.ROOT}/experiments/configs/smac.py:ant_dir',
    '--config.family.options.terminate=False',
    '--config.family.options.n_frames=3',
  )
  assert config.family.options == {
    'backend': 'spring',
    'terminate': False,
    'n_frames': 3,
  }


@pytest.mark.parametrize(
  'key, messages',
  [
    (
      'family.options.terminat',
      ("'ant_dir': backend, episode_length, ", 'Did you mean "terminate"'),
    ),
    ('smac.kl_wieght', ('offmeta/training/config.py', '"kl_weight"')),
  ],
)
def test_a_misspelled_key_on_the_command_line(parse, capsys, key, messages):
  with pytest.raises(SystemExit):
    parse(
      f'--config={configuration.ROOT}/experiments/configs/smac.py:ant_dir',
      f'--config.{key}=1',
    )
  (error,) = capsys.readouterr().err.splitlines()
  assert error.startswith(f"error: unknown key '{key.split('.')[-1]}' in --con")
  assert all(message in error for message in messages), error


_NO_CONFIG = (
  ('x = 1', 'it has no function get_config'),
  ('def get_config():\n  return 3', 'get_config returned 3, but a ConfigDict'),
  ('def get_config():\n  return {}["a"]', "line 2: KeyError: 'a'"),
  ('import nowhere', "line 1: ModuleNotFoundError: No module named 'nowhere'"),
  ('\ndef get_config(:', 'line 2: SyntaxError: invalid syntax'),
  (None, 'No such file or directory'),
)


@pytest.mark.parametrize(
  'text, message', _NO_CONFIG, ids=[x[1] for x in _NO_CONFIG]
)
@pytest.mark.parametrize('overrides', [(), ('--config.seed=1',)], ids=str)
def test_a_config_file_of_ones_own_that_is_none(
  parse, tmp_path, capsys, text, message, overrides
):
  """The last line names the file and says what is wrong with it."""
  file = tmp_path / 'mine.py'
  if text is not None:
    file.write_text(text)
  with pytest.raises((SystemExit, ConfigError)) as error:
    parse(f'--config={file}', *overrides)
  last = f'error: {error.value}'
  if error.type is SystemExit:
    assert error.value.code == 1
    *_, last = capsys.readouterr().err.splitlines()
  assert last.startswith(f'error: config file {file}'), last
  assert message in last


@pytest.mark.parametrize(
  'key, value, message',
  [
    ('online.variants', "{'x': 1}", 'variants.x: 1, but a group is needed'),
    ('online.iterations', '-1', 'online.iterations: must be at least 1'),
    ('collect.gather.rewards', 'typo', "gather.rewards: 'typo'; choose one"),
    ('smac.actor_hidden', "('a',)", "must hold whole numbers, not 'a'"),
    ('smac.kl_weight', 'nan', 'kl_weight: must be a finite number'),
    ('collect.iterations', '1000000000000', 'must be at most 2147483647'),
    ('seed', '4294967296', 'seed: must be at most 4294967295'),
  ],
)
def test_bad_values_on_the_command_line(parse, key, value, message):
  with pytest.raises(ConfigError, match=re.escape(message)):
    parse(f'--config.{key}={value}')


@pytest.mark.parametrize(
  'text, message',
  [
    (None, ': No such file'),
    ('import nowhere', ", line 1: ModuleNotFoundError: No module named 'nowh"),
    ('x = 1', ': it has no function get_config'),
    ('get_config = 3', ': it has no function get_config'),
    ('def', ', line 1: SyntaxError: invalid syntax'),
    ('\nnothing', ", line 2: NameError: name 'nothing' is not defined"),
    ('{}["a"]', ", line 1: KeyError: 'a'"),
    ('open("/nowhere")', ', line 1: FileNotFoundError: '),
    ('raise ValueError("too many")', ': too many'),
    ('raise ValueError', ': ValueError: '),
    ('get_config = lambda: 1 / 0', ', line 1: ZeroDivisionError: division'),
    ('def get_config():\n  return {}["a"]', ", line 2: KeyError: 'a'"),
    # Raised elsewhere, on behalf of the file.
    (
      'import functools\nget_config = functools.partial({}.pop, "a")',
      ": KeyError: 'a'",
    ),
  ],
)
def test_config_files_that_cannot_be_loaded(tmp_path, text, message):
  file = tmp_path / 'mine.py'
  if text is not None:
    file.write_text(text)
  with pytest.raises(ConfigError) as error:
    configuration.load_config(str(file))
  assert str(error.value).startswith(f'config file {file}{message}')


def test_a_family_without_a_config():
  with pytest.raises(ConfigError, match="'moon'; known: point_robot"):
    _load('experiments/configs/smac.py:moon')


@pytest.mark.parametrize(
  'text, message',
  [
    ('', 'family.name must be a text, not None'),
    ('values.family = 3', 'family.name must be a text, not 3'),
    ('values.family = "ant"', "family.name must be a text, not 'ant'"),
    ('values.family = {"name": 3}', 'family.name must be a text, not 3'),
  ],
)
def test_config_files_that_name_no_family(tmp_path, text, message):
  file = tmp_path / 'mine.py'
  file.write_text(
    'import ml_collections\nvalues = ml_collections.ConfigDict()\n'
    f'{text}\nget_config = lambda: values\n'
  )
  with pytest.raises(ConfigError, match=f'config file {file}: {message}'):
    configuration.load_family(str(file))


def test_the_family_of_a_config_file():
  file = f'{configuration.ROOT}/experiments/configs/smac.py:ant_dir'
  assert configuration.load_family(file) == 'ant_dir'


@pytest.mark.parametrize(
  'text, message',
  [
    ('[1]', r'ABLATIONS must map names to changes, not be \[1\]'),
    ("{'a': 3}", "ABLATIONS must map names to changes .*, not 'a' to 3"),
    ('{1: {}}', 'ABLATIONS must map names to changes .*, not 1 to {}'),
    ("{'a': {1: 2}}", "ABLATIONS\\['a'\\]: keys and the description must be"),
    ("{'a': {'description': 3}}", 'the description must be texts'),
  ],
)
def test_ablations_of_another_form(tmp_path, text, message):
  file = tmp_path / 'mine.py'
  file.write_text(f'ABLATIONS = {text}')
  with pytest.raises(ConfigError, match=f'config file {file}: .*{message}'):
    configuration.load_ablations(str(file))


def test_resolving_leaves_the_profiles_alone():
  before = copy.deepcopy(smac_families.FAMILIES)
  configuration.resolve(
    smac_configs.get_config('point_robot'),
    'smoke',
    {'online.gather.rewards': 'true', 'chunk': 1},
  )
  assert smac_families.FAMILIES == before


def test_unknown_profile_and_family():
  with pytest.raises(ConfigError, match="no profile 'huge'; it has: .*smoke"):
    configuration.resolve(smac_configs.get_config('ant_dir'), 'huge', {})
  with pytest.raises(ValueError, match="'moon'; known: point_robot"):
    smac_configs.get_config('moon')
