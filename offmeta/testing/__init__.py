"""Contracts for implementations of our interfaces, and families to try on."""

from offmeta.testing.contracts import check_algorithm, check_env_family

__all__ = ['check_algorithm', 'check_env_family']
