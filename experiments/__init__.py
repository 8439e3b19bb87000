"""Command-line programs: run, benchmark."""
