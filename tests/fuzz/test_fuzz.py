"""2,000 cases of changed files: each ends in an error of ours or in a right result.

The cases are the same in every run and every worker. Any number of others is run by hand:

    python -m tests.fuzz --cases 100000 --seed 1
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from random import Random

import hypothesis
import pytest
from hypothesis import strategies

from lora_jax.console import quiet_storage
from tests.fuzz import one_case
from tests.fuzz.kinds import KINDS

# Deterministic, and nothing is kept on disk; `tests.fuzz.bounds` has its own limit of time.
SETTINGS = hypothesis.settings(
    derandomize=True,
    database=None,
    deadline=None,
    print_blob=False,
    verbosity=hypothesis.Verbosity.quiet,
    suppress_health_check=list(hypothesis.HealthCheck),
    phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
)
BIT = strategies.booleans()


class Drawn(Random):
    """A generator whose bits Hypothesis draws, so that it can make a failing case small.

    Bits alone: integers and floats it takes now and then from the constants of the modules that
    happen to be loaded, which are others in each worker. (`strategies.randoms` draws such.)
    """

    def __init__(self, draw: Callable[[strategies.SearchStrategy[bool]], bool]) -> None:
        """Draw by a function of Hypothesis."""
        super().__init__(0)
        self._draw = draw

    def getrandbits(self, k: int) -> int:
        """Return an integer of `k` bits."""
        return sum(self._draw(BIT) << i for i in range(k))

    def random(self) -> float:
        """Return one of 256 numbers from 0 to 1: it decides, and is not a value itself."""
        return self.getrandbits(8) / 256


@pytest.mark.standard_promotion
@pytest.mark.parametrize("name", KINDS)
def test_every_case_ends_well(name: str, tmp_path: pathlib.Path) -> None:
    @hypothesis.settings(SETTINGS, max_examples=KINDS[name].cases)
    @hypothesis.given(strategies.data())
    def run(data: strategies.DataObject) -> None:
        try:
            ends.append(one_case.run(name, Drawn(data.draw), tmp_path))
        except BaseException as error:
            error.add_note(f"The files of the smallest case that fails are in {tmp_path / 'case'}")
            raise

    ends: list[str] = []
    with quiet_storage():  # of what Orbax abandons when it fails
        run()
    assert set(ends) == {one_case.REFUSED, one_case.READ}, "the changes are too large, or too small"
