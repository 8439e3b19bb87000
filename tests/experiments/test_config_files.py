"""Config files of algorithms: sizes by family, and that all of them hold."""

import dataclasses

import helpers
import pytest

from experiments.configs import base, robots, smac
from experiments.runs import configuration
from offmeta.algorithms import ALGORITHMS
from offmeta.types import Problem, Rollout

_ALGORITHMS = sorted(
  path.stem
  for path in (configuration.ROOT / 'experiments/configs').glob('*.py')
  if path.stem in ALGORITHMS
)
_PROFILES = ('smoke', 'cpu', 'paper')
_DEFAULT = ALGORITHMS['sac'].config()


def _resolve(get_config, family, profile, overrides={}):
  return configuration.resolve(get_config(family), profile, overrides)


def test_there_are_some():
  assert {'smac', 'macaw', 'focal'} <= set(_ALGORITHMS)


@pytest.mark.parametrize('algorithm', _ALGORITHMS)
def test_every_family_and_profile_is_valid(algorithm):
  file = configuration.ROOT / f'experiments/configs/{algorithm}.py'
  for family in base.FAMILIES:
    values = configuration.load_config(f'{file}:{family}')
    for profile in _PROFILES:
      config = configuration.resolve(values, profile, {})
      assert config.algorithm == algorithm
      assert config.family.name == family
      same = configuration.resolve(smac.get_config(family), profile, {})
      family_of_all = config.family
      if algorithm == 'ppo':  # one task of it
        assert (family_of_all.num_train, family_of_all.num_test) == (1, 1)
        family_of_all = dataclasses.replace(
          family_of_all,
          num_train=same.family.num_train,
          num_test=same.family.num_test,
        )
      assert family_of_all == same.family, (family, profile)
      assert config.num_seeds == same.num_seeds
      assert bool(config.online.variants) == (algorithm in ('smac', 'ppo'))
      _check_meta_batches(config)


def _check_meta_batches(config):
  """What `setup.make_setup` refuses, without building the family."""
  problem = Problem(helpers.SPEC, config.family.num_train)
  made = ALGORITHMS[config.algorithm].make(problem, config.settings)
  for stage in (stage for loop in made.loops for stage in loop.stages):
    if isinstance(stage.batch.query, Rollout):
      assert stage.batch.num_tasks % config.family.num_train == 0
    assert stage.batch.replacement or (
      stage.batch.num_tasks <= config.family.num_train
    )


@pytest.mark.parametrize('algorithm', _ALGORITHMS)
def test_every_ablation_is_valid(algorithm):
  file = str(configuration.ROOT / f'experiments/configs/{algorithm}.py')
  values = configuration.load_config(f'{file}:point_robot')
  plain = configuration.resolve(values, 'cpu', {})
  ablations = getattr(configuration.load_file(file), 'ABLATIONS', {})
  for name, changes in ablations.items():
    own = {k: v for k, v in changes.items() if k != 'description'}
    assert configuration.resolve(values, 'cpu', own) != plain, name


def test_layers():
  """Profiles from what is common to what is particular."""
  get_config = base.config_of(
    'sac',
    {
      'all': {'sac': {'discount': 0.1, 'batch_size': 1}},
      'cpu': {'sac': {'batch_size': 2, 'num_updates': 2}, 'chunk': 2},
      'smoke': {'sac': {'num_updates': 3}},
      'paper': {'finetune': {'iterations': 7}},
    },
    # The slice is in the family's own profile `cpu`, too.
    {
      'ant_dir': {
        'all': {'sac': {'discount': 0.2}, 'collect': {'log_slice': 'first'}},
        'cpu': {'sac': {'num_updates': 4}},
      }
    },
  )
  expected = {
    ('cheetah_vel', 'paper'): (0.1, 1, _DEFAULT.num_updates, 250, 7),
    ('cheetah_vel', 'cpu'): (0.1, 2, 2, 2, 0),
    ('cheetah_vel', 'smoke'): (0.1, 2, 3, 2, 0),
    ('ant_dir', 'paper'): (0.2, 1, _DEFAULT.num_updates, 250, 7),
    ('ant_dir', 'cpu'): (0.2, 2, 4, 2, 0),
    ('ant_dir', 'smoke'): (0.2, 2, 3, 2, 0),
  }
  for (family, profile), values in expected.items():
    config = _resolve(get_config, family, profile)
    sac = config.settings
    assert (
      sac.discount,
      sac.batch_size,
      sac.num_updates,
      config.chunk,
      config.finetune.iterations,
    ) == values, (family, profile)
    assert (config.collect.log_slice == 'first') == (
      family == 'ant_dir' or profile == 'paper'
    )  # cheetah_vel as published


def test_command_line_wins():
  get_config = base.config_of('sac', {'cpu': {'sac': {'discount': 0.5}}})
  assert 'terminate' in get_config('ant_dir').family.options  # has a flag
  config = _resolve(
    get_config,
    'ant_dir',
    'cpu',
    {
      'sac.discount': 0.7,
      'family.options.terminate': False,
      'collect': {'seed': 3},
      'collect.iterations': 2,
    },
  )
  assert config.settings.discount == 0.7
  assert config.family.options == {'backend': 'spring', 'terminate': False}
  assert (config.collect.seed, config.collect.iterations) == (3, 2)


@pytest.mark.parametrize(
  'algorithm, robots_have',
  [
    ('smac', ('sac', 'last')),
    ('macaw', ('sac', 'last')),
    ('focal', ('sac', 'last')),
    ('csro', ('sac', 'last')),
    ('unicorn', ('sac', 'last')),
    ('borel', ('sac', 'all')),
  ],
)
def test_what_robots_learn_from_at_the_small_size(algorithm, robots_have):
  file = configuration.ROOT / f'experiments/configs/{algorithm}.py'
  for family in robots.FAMILIES:
    values = configuration.load_config(f'{file}:{family}')
    collect = configuration.resolve(values, 'cpu', {}).collect
    source, part = robots_have
    assert collect.source == source, family
    assert part == collect.log_slice, family


def test_robots_can_learn_from_pearl_too():
  """SMAC's published source, at sizes that its replay has."""
  data = lambda family: base.data_config(family, 'pearl')
  for family in robots.FAMILIES:
    cpu, smoke = (
      _resolve(data, family, name).collect for name in ('cpu', 'smoke')
    )
    assert (cpu.source, cpu.log_slice, cpu.log_size) == ('pearl', 'last', 1200)
    own = _resolve(base.data_config, family, 'smoke').collect
    assert smoke == own and own.source == 'pearl' and own.log_size == 200


@pytest.mark.parametrize('profile', _PROFILES)
def test_data_of_a_source(profile):
  for family in base.FAMILIES:
    config = _resolve(base.config_of('macaw', data='sac'), family, profile)
    data = _resolve(lambda f: base.data_config(f, 'sac'), family, profile)
    assert data.collect.source == 'sac' and not data.collect.context_size
    own = _resolve(base.data_config, family, profile)
    same = configuration.resolve(smac.get_config(family), profile, {})
    assert own.collect == same.collect
    assert config.collect == data.collect
    config = _resolve(
      base.config_of('focal', robot_data='sac'), family, profile
    )
    assert (
      config.collect == (data if family in robots.FAMILIES else own).collect
    )
    assert data.collect.specialists == same.collect.specialists
    assert not data.online.variants


def test_mistakes():
  with pytest.raises(ValueError, match='sac: no size huge; known: all, smoke'):
    base.config_of('sac', {'huge': {}})
  with pytest.raises(ValueError, match='no size tiny'):
    base.config_of('sac', {}, {'ant_dir': {'tiny': {}}})
  with pytest.raises(ValueError, match="family 'moon'; known: point_robot"):
    base.config_of('sac')('moon')
