"""Where logged data come from: a file per source.

A source of one's own is a file with a `history.Source`, an entry here, and a
choice of `training.config.Source`.
"""

from offmeta.collection.sources import pearl, sac, script

SOURCES = {  # by config.collect.source
  'pearl': pearl.SOURCE,
  'sac': sac.SOURCE,
  'script': script.SOURCE,
}
