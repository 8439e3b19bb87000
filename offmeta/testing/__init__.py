"""Checks that users of the package can run on their own extensions."""
