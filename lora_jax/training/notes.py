"""The notes of a run: the JSON values that its checkpoints hold in addition to the arrays."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any


@dataclasses.dataclass
class Notes:
    """The JSON values that a run remembers in addition to its arrays.

    before: split -> scores before the first step.
    best: the step and the validation scores of the best adapter so far.
    last: the scores of the newest evaluation on the validation split.
    without_best: evaluations on the validation split since the best one.
    units: the sum of `Workload.size` over the batches so far.
    seconds: activity -> seconds spent on it so far.
    flops: of the products of the steps so far; 0 if the peak of the devices is not known.
    history: the settings that were changed on the way, each time with the step before them.
    samples: texts "before" and "after" (by the best adapter), with what is asked and expected.
    confusion: split -> examples by class and guess of the best adapter, of a classifier.
    shift: batches of the data before the first of this batch size, minus the steps before it.
    """

    before: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    best: dict[str, float] | None = None
    last: dict[str, float] | None = None
    without_best: int = 0
    units: int = 0
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    flops: float = 0.0
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    samples: list[dict[str, str]] = dataclasses.field(default_factory=list)
    confusion: dict[str, list[list[float]]] = dataclasses.field(default_factory=dict)
    shift: int = 0

    @contextlib.contextmanager
    def clock(self, name: str) -> Iterator[None]:
        """Count the time of the block as spent on `name`."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.add(name, time.monotonic() - start)

    def compiling(self, within: str) -> Callable[[float], None]:
        """Return a function that moves seconds of compilation from `within` to "compile"."""

        def report(seconds: float) -> None:
            self.add("compile", seconds)
            self.add(within, -seconds)

        return report

    def add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
