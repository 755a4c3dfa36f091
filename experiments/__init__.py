"""Experiments that need a checkout of the repository: they are not in the wheel."""
