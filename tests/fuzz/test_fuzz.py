"""2,000 cases of changed files: each ends in an error of ours or in a right result.

The cases are the same in every run and on every worker. Other cases, in any number, are run by
hand:

    python -m tests.fuzz --cases 100000 --seed 1
"""

from __future__ import annotations

import pathlib

import hypothesis
import pytest
from hypothesis import strategies

from lora_jax.system.console import quiet_storage
from tests.fuzz import cases
from tests.fuzz.cases import KINDS

pytestmark = pytest.mark.slow


# The cases are deterministic and nothing is kept on disk; `tests.fuzz.bounds` has its own time
# limit.
SETTINGS = hypothesis.settings(
    derandomize=True,
    database=None,
    deadline=None,
    verbosity=hypothesis.Verbosity.quiet,
    suppress_health_check=list(hypothesis.HealthCheck),
    phases=(hypothesis.Phase.generate,),
)
# Hypothesis draws the number of a case, not its changes. When it drew every change, a layout had
# 103 different cases of 240 instead of 137, none of them deep, in twice the time. The number is
# drawn as bits, because Hypothesis's integers are sometimes constants of the loaded modules, which
# differ from worker to worker.
NUMBERS = strategies.lists(strategies.booleans(), min_size=24, max_size=24).map(
    lambda bits: sum(bit << i for i, bit in enumerate(bits))
)


@pytest.mark.standard_promotion
@pytest.mark.parametrize("name", KINDS)
def test_every_case_ends_well(name: str, tmp_path: pathlib.Path) -> None:
    @hypothesis.settings(SETTINGS, max_examples=KINDS[name].cases)
    @hypothesis.given(NUMBERS)
    def run(number: int) -> None:
        try:
            ends.append(cases.run(name, 0, number, tmp_path))
        except BaseException as error:
            error.add_note(f"again: python -m tests.fuzz --kind {name} --only {number}")
            raise

    ends: list[str] = []
    with quiet_storage():  # hides the messages of writes that Orbax abandons when it fails
        run()
    assert set(ends) == {cases.REFUSED, cases.READ}, "the changes are too large, or too small"
