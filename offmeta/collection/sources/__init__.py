"""Where logged data come from: a file per source."""
