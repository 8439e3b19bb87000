"""What a setting may be, said beside it as its type.

  latent_size: limits.Count = 5
  discount: limits.Share = 0.99
  layer: Literal['wlinear', 'dense'] = 'wlinear'

`check` walks a dataclass and the dataclasses in it. Fields with plain types
(`int`, `float`, `str`, ...) take every value of their type, so an algorithm of
one's own need not declare anything.
"""

from collections.abc import Iterator
import dataclasses
import functools
import math
import typing
from typing import Annotated, Any, Literal, NamedTuple

# Counters and sizes of arrays are int32, random seeds uint32.
MOST = 2**31 - 1
MOST_SEED = 2**32 - 1


class Range(NamedTuple):
  """Numbers between two bounds.

  Attributes:
    low, high: the bounds.
    above: whether `low` itself is too low.
    infinite: whether infinity is accepted too; NaN never is.
  """

  low: float
  high: float = math.inf
  above: bool = False
  infinite: bool = False

  def problem(self, value: float) -> str:
    """What is wrong with a number, '' if nothing is."""
    if isinstance(value, float) and not math.isfinite(value):
      good = self.infinite and value == math.inf
      return '' if good else 'must be a finite number'
    if value < self.low or self.above and value == self.low:
      return f'must be {"above" if self.above else "at least"} {self.low}'
    return f'must be at most {self.high}' if value > self.high else ''


class Each(NamedTuple):
  """Tuples of whole numbers in a range; may be empty."""

  range: Range


COUNT = Range(1, MOST)
Count = Annotated[int, COUNT]
CountOrZero = Annotated[int, Range(0, MOST)]
# Of tasks and of learners side by side: Python walks over these.
SideBySide = Annotated[int, Range(1, 2**20)]
SEED = Range(0, MOST_SEED)
Seed = Annotated[int, SEED]
Width = Annotated[int, Range(1, 2**20)]  # of a layer or a latent
Widths = Annotated[tuple[int, ...], Each(Range(1, 2**20))]
Number = Annotated[float, Range(-math.inf)]
Positive = Annotated[float, Range(0, above=True)]
PositiveOrInf = Annotated[float, Range(0, above=True, infinite=True)]
Weight = Annotated[float, Range(0)]  # also learning rates: 0 trains nothing
Share = Annotated[float, Range(0, 1)]
PositiveShare = Annotated[float, Range(0, 1, above=True)]


@functools.cache
def declared(kind: type) -> dict[str, Any]:
  """Field -> Range, Each or the tuple of its choices; only those declared."""
  try:
    types = typing.get_type_hints(kind, include_extras=True)
  except NameError:  # annotations of another file that are mere strings
    return {}
  found = {}
  for field in dataclasses.fields(kind):
    given = types.get(field.name)
    if typing.get_origin(given) is Literal:
      found[field.name] = typing.get_args(given)
    elif typing.get_origin(given) is Annotated:
      found.update(
        {
          field.name: part
          for part in given.__metadata__
          if isinstance(part, (Range, Each))
        }
      )
  return found


def check(config: Any, prefix: str) -> None:
  """Checks every declared field, those of groups inside too.

  Args:
    config: a dataclass instance.
    prefix: what the dotted names of settings begin with, in messages.

  Raises:
    ValueError: names the first setting that is wrong, its value and what it
      takes.
  """
  for name, problem in _problems(config):
    raise ValueError(f'{prefix}.{name}: {problem}')


def require(value: Any, limit: Range, name: str) -> None:
  """Checks one number of any origin; raises ValueError, see `check`."""
  problem = _problem(value, limit)
  if problem:
    raise ValueError(f'{name}: {problem}')


def chosen(config: Any, field: str, choice: str) -> bool:
  """Whether a setting has this one of its declared choices.

  For branches: a misspelt value is never taken for another choice.

  Raises:
    ValueError: the setting has a value that is none of its choices, or
      `choice` is none.
  """
  choices = declared(type(config))[field]
  for value in (getattr(config, field), choice):
    if value not in choices:
      raise ValueError(f'{field}: {_problem(value, choices)}')
  return getattr(config, field) == choice


def _problems(config: Any) -> Iterator[tuple[str, str]]:
  """(dotted name, what is wrong) of all settings that are."""
  limits = declared(type(config))
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      for name, problem in _problems(value):
        yield f'{field.name}.{name}', problem
    elif field.name in limits:
      problem = _problem(value, limits[field.name])
      if problem:
        yield field.name, problem


def _problem(value: Any, limit: Any) -> str:
  """What is wrong with a value, '' if nothing is."""
  if isinstance(limit, Range):
    problem = limit.problem(value)
    return problem and f'{problem}, not {_short(value)}'
  if isinstance(limit, Each):
    for number in value:
      if type(number) is not int:
        return f'must hold whole numbers, not {_short(number)}'
      problem = limit.range.problem(number)
      if problem:
        return f'each {problem}, not {_short(number)}'
    return ''
  return (
    ''
    if value in limit
    else f'{_short(value)}; choose one of {", ".join(limit)}'
  )


def _short(value: Any) -> str:
  """A value for a message, of a length that can be read."""
  text = repr(value)
  return text if len(text) <= 80 else f'{text[:60]}... ({len(text)} characters)'
