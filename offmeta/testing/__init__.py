"""Contracts for implementations of our interfaces, and families to try on."""

from offmeta.testing.algorithm_contract import check_algorithm
from offmeta.testing.family_contract import check_env_family

__all__ = ['check_algorithm', 'check_env_family']
