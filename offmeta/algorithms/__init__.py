"""Algorithms by name; `register` adds one of your own."""

from collections.abc import Callable
from typing import Any, NamedTuple

from offmeta.algorithms import (
  borel,
  csro,
  focal,
  macaw,
  meta_bc,
  multitask,
  pearl,
  ppo,
  sac,
  smac,
  unicorn,
)
from offmeta.types import Algorithm


class Entry(NamedTuple):
  """What is known by an algorithm's name.

  Attributes:
    config: frozen dataclass of its settings, all with defaults.
    make: (Problem, settings, axis_name) -> Algorithm.
    validate: (settings) -> None; raises ValueError on what types cannot say.
    online_variants: whether it has an online phase on the training tasks.
    variant_fixed: settings that a variant of that phase cannot change.
    min_tasks: fewest training tasks; 2 if its losses compare tasks.
  """

  config: Callable[[], Any]
  make: Callable[..., Algorithm]
  validate: Callable[[Any], None] = lambda settings: None
  online_variants: bool = False
  variant_fixed: tuple[str, ...] = ()
  min_tasks: int = 1


ALGORITHMS = {
  'borel': Entry(borel.Config, borel.make, borel.validate),
  'csro': Entry(csro.Config, csro.make, focal.validate, min_tasks=2),
  'focal': Entry(focal.Config, focal.make, focal.validate, min_tasks=2),
  'macaw': Entry(macaw.Config, macaw.make, macaw.validate),
  'meta_bc': Entry(meta_bc.Config, meta_bc.make, meta_bc.validate),
  'multitask': Entry(multitask.Config, multitask.make),
  'pearl': Entry(pearl.Config, pearl.make, pearl.validate),
  'ppo': Entry(
    ppo.Config,
    ppo.make,
    ppo.validate,
    online_variants=True,
    variant_fixed=ppo.VARIANT_FIXED,
  ),
  'sac': Entry(sac.Config, sac.make),
  'smac': Entry(
    smac.Config,
    smac.make,
    smac.validate,
    online_variants=True,
    variant_fixed=smac.VARIANT_FIXED,
  ),
  'unicorn': Entry(unicorn.Config, unicorn.make, unicorn.validate, min_tasks=2),
}


_OWN = frozenset(ALGORITHMS)


def register(name: str, config: Callable[[], Any], make: Callable, **options):
  """Makes an algorithm known to the command line and to configurations.

  Args:
    name: config.algorithm, and the group of its settings.
    config, make, **options: see `Entry`.

  A name that was registered before is replaced: config files are read anew.

  Raises:
    ValueError: the name is one of the package's own, or no identifier.
  """
  if not name.isidentifier():
    raise ValueError(f'register: {name!r} is not a Python identifier')
  if name in _OWN:
    raise ValueError(f'register: there is an algorithm {name!r} already')
  ALGORITHMS[name] = Entry(config, make, **options)
