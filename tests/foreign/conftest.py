"""Allow rank promotion: other people's models use it."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True)
def rank_promotion() -> Iterator[None]:
    with jax.numpy_rank_promotion("allow"):
        yield
