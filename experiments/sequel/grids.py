"""Grids of learning rates that go on until the best is not at an edge."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from experiments.shared.spreads import mean

RATES = tuple(float(f"{digit}e{power}") for power in range(-7, 3) for digit in (1, 3))
Losses = Mapping[float, Sequence[float]]  # rate -> validation losses, one for each seed


def best(losses: Losses) -> float:
    """Return the rate with the lowest mean loss. One that diverged with any seed is never best.

    >>> best({1e-3: [0.6, 0.7], 1e-2: [0.5, 0.6], 1e-1: [0.1, math.nan]})
    0.01
    """
    return min(sorted(losses), key=lambda rate: _known(mean(losses[rate])))


def edge(losses: Losses) -> str:
    """Return whether the best rate is the "lowest" or "highest" that was tried, or ""."""
    rates = sorted(losses)
    return {rates[0]: "lowest", rates[-1]: "highest"}.get(best(losses), "")


def next_rate(losses: Losses, longer: int, first: int) -> float | None:
    """Return the rate with which a grid goes on; None if its best is inside, or it is too long.

    A grid of `first` rates may become longer by so many. All rates are in `RATES`.

    >>> next_rate({3e-3: [0.6], 1e-2: [0.5], 3e-2: [0.4]}, longer=2, first=3)
    0.1
    >>> next_rate({3e-3: [0.6], 1e-2: [0.5], 3e-2: [0.7]}, longer=2, first=3) is None
    True
    """
    at = edge(losses)
    if not at or len(losses) >= first + longer:
        return None
    return RATES[RATES.index(best(losses)) + (1 if at == "highest" else -1)]


def _known(value: float) -> float:
    return value if math.isfinite(value) else math.inf
