"""Losses: arrays in, per-example losses out; the caller takes the mean."""
