"""What settings may be: all of them say it, and what is outside is refused."""

import dataclasses
import math
from typing import Annotated, Literal

import pytest

from offmeta import limits
from offmeta.algorithms import ALGORITHMS
from offmeta.training import config as configs
from offmeta.training.config import ConfigError
from offmeta.types import Visits

# Texts that only the disk, a family or a config file can tell good or bad.
_FREE = {
  'family.name',
  'family.task_list',
  'collect.dataset',
  'collect.test_dataset',
  'algorithm',
  'online.headline',
  'online.oracle',
}


def _fields(config, prefix=''):
  """(dotted key, value, limit or None) of all fields that are no groups."""
  declared = limits.declared(type(config))
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    outer = isinstance(config, configs.ExperimentConfig)
    own = outer and field.name == 'settings'
    key = prefix + (config.algorithm if own else field.name)
    if dataclasses.is_dataclass(value):
      yield from _fields(value, f'{key}.')
    else:
      yield key, value, declared.get(field.name)


def _default(algorithm):
  return configs.from_dict({'algorithm': algorithm})


def _changed(config, key, value):
  for part in reversed(key.split('.')):
    value = {part: value}
  return configs.from_dict(value, config)


def _outside(value, limit):
  """Values of the right type that a limit does not take."""
  if isinstance(value, str):
    return ['typo', '']
  if isinstance(limit, limits.Each):
    return [(0,), (-1,), ('a',), (1.5,), (True,), (10**12,)]
  if isinstance(value, int):
    return [limit.low - 1, limit.high + 1, 10**30]
  bad = [math.nan, -math.inf, limit.low if limit.above else limit.low - 1.0]
  if limit.high < math.inf:
    bad.append(limit.high + 1.0)
  return bad + ([] if limit.infinite else [math.inf])


@pytest.mark.parametrize('algorithm', sorted(ALGORITHMS))
def test_every_setting_says_what_it_may_be(algorithm):
  """A new number or choice without a limit fails here."""
  undeclared = {
    key
    for key, value, limit in _fields(_default(algorithm))
    if limit is None and isinstance(value, (int, float, str, tuple))
    if not isinstance(value, bool)
  }
  assert undeclared == _FREE


@pytest.mark.parametrize('algorithm', sorted(ALGORITHMS))
def test_what_is_outside_is_refused_by_name(algorithm):
  default = _default(algorithm)
  configs.validate(default)
  tried = 0
  for key, value, limit in _fields(default):
    for bad in _outside(value, limit) if limit is not None else ():
      with pytest.raises(ConfigError) as error:
        configs.validate(_changed(default, key, bad))
      assert str(error.value).startswith(f'config.{key}: '), (key, bad)
      tried += 1
  assert tried > 100


@pytest.mark.parametrize(
  'key',
  [
    'smac.awac_temperature',
    'macaw.max_weight',
    'multitask.max_weight',
    'focal.max_divergence_weight',
    'ppo.clip',
  ],
)
def test_infinity_where_it_means_something(key):
  default = _default(key.split('.')[0])
  configs.validate(_changed(default, key, math.inf))
  with pytest.raises(ConfigError, match=f'{key}: must be above 0'):
    configs.validate(_changed(default, key, 0.0))


_TWO = {'smac': {}, 'oracle': {'online': {'gather': {'rewards': 'true'}}}}


@pytest.mark.parametrize(
  'variants, message',
  [
    ({'': {}}, "'' is to be the name of a folder"),
    ({'x/y': {}}, "'x/y' is to be the name of a folder"),
    ({'..': {}}, "'..' is to be the name"),
    ({'a\\b': {}}, 'is to be the name of a folder'),
    ({'x': 1}, r'variants\.x: 1, but a group is needed'),
    ({'x' * 101: {}}, 'is to be the name of a folder and has 101 bytes'),
    ({'é' * 51: {}}, 'is to be the name of a folder and has 102 bytes'),
    (
      {'x': {'algorithm': 'pearl'}},
      r"variants\.x\.algorithm: 'pearl'; a variant changes the online phase",
    ),
    ({'x': {'algorithm': ['smac']}}, r"variants\.x\.algorithm: \['smac'\]; a"),
    ({'x': {'description': 3}}, r'variants\.x\.description: 3 is no text'),
    (
      {'x': {'online': {'variants': {'y': {}}}}},
      r'variants\.x: a variant cannot have variants',
    ),
    ({'x': {'chunk': 7}}, r'variants\.x: .*not config\.chunk'),
    (
      {'x': {'online': {'gather': {'rewards': 'typo'}}}},
      "variant 'x'.online.gather.rewards: 'typo'; choose one of",
    ),
    (
      {'x': {'smac': {'kl_weight': math.nan}}},
      "variant 'x'.smac.kl_weight: must be a finite number",
    ),
  ],
  ids=str,
)
def test_what_is_no_variant(variants, message):
  config = configs.from_dict({'online': {'variants': {**_TWO, **variants}}})
  with pytest.raises(ConfigError, match=message):
    configs.validate(config)


def test_long_names_and_the_same_algorithm_are_taken():
  variants = {**_TWO, 'x' * 100: {'algorithm': 'smac'}}
  configs.validate(configs.from_dict({'online': {'variants': variants}}))


@pytest.mark.parametrize(
  'changes, message',
  [
    (
      {'family': {'options': {1: 2}}},
      'config.family.options: 1 is int, but names of options are text',
    ),
    (
      {'first_seed': 2**32 - 2, 'num_seeds': 3},
      '3 seeds from 4294967294 on go beyond',
    ),
    (
      {'collect': {'gather': {'prior_steps': 0, 'posterior_steps': 0}}},
      'config.collect.gather: .* nothing would be gathered',
    ),
    (
      {'online': {'gather': {'prior_steps': 0, 'posterior_steps': 0}}},
      'config.online.gather: .* nothing would be gathered',
    ),
    (
      {'collect': {'gather': {'prior_steps': 0}}},
      'config.collect.gather: .* leave nothing for contexts',
    ),
    (
      {'collect': {'gather': {'rewards': 'decoder'}}},
      'config.collect.gather.rewards: .* no decoder; only "true"',
    ),
  ],
  ids=str,
)
def test_what_does_not_go_together(changes, message):
  with pytest.raises(ConfigError, match=message):
    configs.validate(configs.from_dict(changes))


def test_one_of_two_kinds_of_steps_may_be_left_out():
  for changes in (
    {'collect': {'gather': {'posterior_steps': 0}}},
    {'online': {'gather': {'prior_steps': 0}}},
  ):
    configs.validate(configs.from_dict(changes))


def test_a_branch_never_takes_a_misspelt_value_for_another():
  assert limits.chosen(Visits(), 'rewards', 'decoder')
  assert not limits.chosen(Visits(rewards='true'), 'rewards', 'decoder')
  for config, choice in ((Visits(rewards='typo'), 'true'), (Visits(), 'typo')):
    with pytest.raises(ValueError, match="rewards: 'typo'; choose one of dec"):
      limits.chosen(config, 'rewards', choice)


def test_groups_and_fields_without_a_limit():

  @dataclasses.dataclass(frozen=True)
  class Inner:
    rate: Annotated[float, limits.Range(0, 1, above=True)] = 0.5
    mode: Literal['a', 'b'] = 'a'

  @dataclasses.dataclass(frozen=True)
  class Outer:
    inner: Inner = Inner()
    anything: float = math.nan
    later: 'NotHere' = None  # noqa: F821

  limits.check(Outer(), 'mine')
  limits.check(Inner(rate=1.0), 'mine')
  with pytest.raises(ValueError, match=r'^mine\.rate: must be above 0, not 0'):
    limits.check(Inner(rate=0.0), 'mine')
  with pytest.raises(ValueError, match=r"^mine\.inner\.mode: 'c'; choose one"):
    limits.check(Outer(Inner(mode='c')), 'mine')


def test_values_are_shown_in_a_length_that_can_be_read():
  with pytest.raises(ValueError) as error:
    limits.require(10**4000, limits.COUNT, 'size')
  assert len(str(error.value)) < 150
