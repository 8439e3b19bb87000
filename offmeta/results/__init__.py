"""Results: a run's files in, tables and pictures out. Imports no jax."""

from offmeta.results.records import load
from offmeta.results.report import build
from offmeta.results.summary import summarize
from offmeta.results.tables import text_table

__all__ = ['build', 'load', 'summarize', 'text_table']
