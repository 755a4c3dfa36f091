"""Experiments. They need a checkout of the repository, because the wheel does not contain them."""
