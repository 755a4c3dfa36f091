"""A run that is killed at random moments ends bit for bit as one that is never killed."""

from __future__ import annotations

import pathlib

import pytest

from tests.faults.kills import Kills
from tests.faults.scenarios import ChatRun, PairsRun, Run

KILLS = 20


@pytest.mark.slow
def test_a_run_that_is_killed_ends_as_one_that_is_not(tmp_path: pathlib.Path) -> None:
    """`tests.faults` compares records, adapters, optimizer and random state, and leftover files."""
    found = Kills("single run", Run(tmp_path / "run"), seed=1).run(KILLS)
    assert not found.failures, str(found)
    assert found.kills == KILLS and found.ends > 0
    assert len(found.moments) == 3 and found.torn > 0, str(found)
    assert len({str(state) for state in found.states}) >= 4, str(found)


@pytest.mark.slow
@pytest.mark.parametrize("scenario", [ChatRun, PairsRun])
def test_a_run_on_conversations_that_is_killed(tmp_path: pathlib.Path, scenario: type[Run]) -> None:
    """With packed rows, samples and a reference; `python -m tests.faults` kills it 40 times."""
    found = Kills("conversations", scenario(tmp_path / "run"), seed=2).run(3)
    assert not found.failures, str(found)
    assert found.kills == 3 and found.ends > 0
