"""Command-line programs: run, compare, benchmark, ..."""
