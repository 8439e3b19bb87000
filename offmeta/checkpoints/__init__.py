"""Checkpoints on disk: whole or absent, checked, of any number of processes."""
