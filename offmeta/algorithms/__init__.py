"""Algorithms by name: name -> (Config, make)."""

from offmeta.algorithms import pearl, sac, smac

ALGORITHMS = {
    'pearl': (pearl.Config, pearl.make),
    'sac': (sac.Config, sac.make),
    'smac': (smac.Config, smac.make),
}
