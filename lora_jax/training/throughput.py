"""The speed of the last steps, for the model FLOPs utilisation."""

from __future__ import annotations

import collections
import math


class Throughput:
    """The FLOPs a second of the last ten steps."""

    def __init__(self) -> None:
        self._recent = collections.deque[tuple[float, float]](maxlen=11)

    def add(self, flops: float, seconds: float) -> float:
        """Take the FLOPs and the seconds of all steps so far; return the speed, NaN at first."""
        self._recent.append((flops, seconds))
        flops_then, seconds_then = self._recent[0]
        spent = seconds - seconds_then
        return (flops - flops_then) / spent if spent > 0 else math.nan
