"""Algorithms by name: name -> (Config, make)."""

from offmeta.algorithms import pearl, smac

ALGORITHMS = {
    'pearl': (pearl.Config, pearl.make),
    'smac': (smac.Config, smac.make),
}
