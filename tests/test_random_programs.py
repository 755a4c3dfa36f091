"""Random programs: every matrix that reaches a product is a target, or is named with the reason."""

from __future__ import annotations

import pytest

from tests.cases import random_programs

pytestmark = pytest.mark.standard_promotion


@pytest.mark.few(1)
@pytest.mark.parametrize("start", range(0, 30, 15))
def test_random_programs(start: int) -> None:
    for seed in range(start, start + 15):
        random_programs.assert_targets_or_named(seed)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(30, 2000, 197))
def test_many_random_programs(start: int) -> None:
    for seed in range(start, start + 197):
        random_programs.assert_targets_or_named(seed)
