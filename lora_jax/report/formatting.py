"""Format numbers and settings as text."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

NONE = "-"


def column(values: Iterable[float]) -> list[str]:
    """Format numbers with equal decimals, so that the points line up; the largest gets four digits.

    >>> column([12.3456, 0.1, float("nan")]), column([0.00123])
    (['12.35', '0.10', '-'], ['0.001230'])
    """
    found = [float(value) for value in values]
    most = max((abs(value) for value in found if math.isfinite(value)), default=0.0)
    decimals = 3 if most == 0 else min(max(3 - math.floor(math.log10(most)), 0), 8)
    return [f"{value:,.{decimals}f}" if math.isfinite(value) else NONE for value in found]


def score(value: float | None) -> str:
    """Format a score of an evaluation.

    >>> score(0.5), score(None)
    ('0.5000', '-')
    """
    return NONE if value is None or not math.isfinite(value) else f"{value:.4f}"


def change(before: float | None, after: float | None) -> str:
    """Format a change of a score.

    >>> change(0.5, 0.75)
    '0.5000 → 0.7500'
    """
    return f"{score(before)} → {score(after)}"


def value(found: Any) -> str:
    """Format a value of a config.

    >>> value(None), value(("a", "b")), value(0.002), value(True)
    ('none', 'a, b', '0.002', 'yes')
    """
    if found is None:
        return "none"
    if isinstance(found, bool):
        return "yes" if found else "no"
    if isinstance(found, list | tuple):
        return ", ".join(map(value, found)) or "none"
    return f"{found:g}" if isinstance(found, float) else str(found)


def span(values: Iterable[float]) -> str:
    """Format the smallest and the largest number for use in a sentence.

    >>> span([0.25, 0.5]), span([])
    ('0.250 to 0.500', 'nothing')
    """
    found = sorted(value for value in map(float, values) if math.isfinite(value))
    if not found:
        return "nothing"
    low, high = (f"{value:#.3g}".removesuffix(".") for value in (found[0], found[-1]))
    return low if low == high else f"{low} to {high}"
