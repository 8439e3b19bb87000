"""Phases, loops, checkpoints and metric files: the side effects live here."""
