"""2,000 cases of changed files: each ends in an error of ours or in a right result.

The cases are the same in every run and every worker. Any number of others is run by hand:

    python -m tests.fuzz --cases 100000 --seed 1
"""

from __future__ import annotations

import pathlib
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
    suppress_health_check=list(hypothesis.HealthCheck),
    phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
)


@pytest.mark.standard_promotion
@pytest.mark.parametrize("name", KINDS)
def test_every_case_ends_well(name: str, tmp_path: pathlib.Path) -> None:
    @hypothesis.settings(SETTINGS, max_examples=KINDS[name].cases)
    @hypothesis.given(strategies.randoms(use_true_random=False))
    def run(random: Random) -> None:
        ends.append(one_case.run(name, random, tmp_path))

    ends: list[str] = []
    with quiet_storage():  # of what Orbax abandons when it fails
        run()
    assert set(ends) == {one_case.REFUSED, one_case.READ}, "the changes are too large, or too small"
