"""The mean and spread of scores over seeds, and differences of them."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

from lora_jax.report import formatting

BEYOND = 2.0  # standard errors


def mean(values: Sequence[float]) -> float:
    """Return the mean; NaN of no values."""
    return statistics.fmean(values) if values else math.nan


def spread(values: Sequence[float]) -> float:
    """Return the standard deviation of a sample; NaN for fewer than two values."""
    return statistics.stdev(values) if len(values) > 1 else math.nan


def text(values: Sequence[float], factor: float = 100.0, decimals: int = 1) -> str:
    """Format mean and spread for a table, by default in per cent.

    >>> text([0.75, 0.77]), text([0.75]), text([])
    ('76.0 ± 1.4', '75.0', '-')
    """
    if not values:
        return formatting.NONE
    middle, apart = mean(values) * factor, spread(values) * factor
    plus = f" ± {apart:.{decimals}f}" if math.isfinite(apart) else ""
    return f"{middle:.{decimals}f}{plus}"


@dataclasses.dataclass(frozen=True)
class Difference:
    """The difference of two means; NaN if it is not known.

    error: its standard error, computed from both spreads with independent seeds.
    """

    value: float
    error: float

    @property
    def beyond(self) -> bool:
        """Whether it is more than two standard errors from zero."""
        return abs(self.value) > BEYOND * self.error


def difference(ours: Sequence[float], other: Sequence[float]) -> Difference:
    """Return the difference of the means of two samples.

    >>> found = difference([0.5, 0.7], [0.25, 0.25])
    >>> round(found.value, 4), round(found.error, 4), found.beyond
    (0.35, 0.1, True)
    """
    squares = sum(spread(x) ** 2 / len(x) if x else math.nan for x in (ours, other))
    return Difference(mean(ours) - mean(other), math.sqrt(squares))
