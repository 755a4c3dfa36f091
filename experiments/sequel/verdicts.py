"""Compare two methods at their own best rates, and say whether a claim holds here.

Differences are of test losses, seed by seed: both methods see the same rows in the same order, so
the seeds are pairs. The interval is Student's, at 95 %, and no wider statement is made: it holds
for these seeds of this model on this data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from experiments.sequel.claims import Claim
from experiments.shared.spreads import mean, spread

HOLDS, NOT, UNTOLD = "holds here", "does not hold here", "cannot be told at this size"
# Student's t at 97.5 %, by the number of pairs.
_STUDENT = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}


class Difference(NamedTuple):
    """The mean difference of pairs, and half of its 95 % interval; infinite for fewer than two."""

    value: float
    half: float

    def __str__(self) -> str:
        return f"{self.value:+.4f} ± {self.half:.4f}"


def paired(one: Sequence[float], other: Sequence[float]) -> Difference:
    """Return one minus other.

    >>> print(paired([0.50, 0.51, 0.52], [0.60, 0.61, 0.62]))
    -0.1000 ± 0.0000
    """
    apart = [a - b for a, b in zip(one, other, strict=True)]
    half = _STUDENT.get(len(apart), math.inf if len(apart) < 2 else 2.306)
    return Difference(mean(apart), half * spread(apart) / math.sqrt(len(apart) or 1))


def verdict(claim: Claim, difference: Difference) -> str:
    """Return whether a claim holds, for the loss of `claim.better` minus that of `claim.than`."""
    low, high = difference.value - difference.half, difference.value + difference.half
    if not (math.isfinite(low) and math.isfinite(high)):
        return UNTOLD
    if claim.expects == "better":
        return HOLDS if high < 0 else NOT if low > 0 else UNTOLD
    if -claim.margin < low and high < claim.margin:
        return HOLDS
    return NOT if low > claim.margin or high < -claim.margin else UNTOLD
