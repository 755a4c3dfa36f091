"""Display the progress of a group: one curve for all members, plain lines elsewhere."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from lora_jax.system.console import Console
from lora_jax.training.progress import CurveBar


class GroupDisplay(CurveBar):
    """Shows the steps of all members, the mean of their losses, and evaluations as they come."""

    def __init__(self, console: Console, every: int) -> None:
        """Show the curve of the mean; without a terminal, print a line every `every` ticks."""
        shown = "loss {task.fields[loss]}  {task.fields[speed]}  {task.fields[live]}"
        super().__init__(console, every, shown, total=None, live="")
        self.losses: dict[str, float] = {}  # member -> its newest loss

    def tick(self, tick: int, steps: Sequence[tuple[int, int]], live: Sequence[str]) -> None:
        taken, total = (sum(column) for column in zip(*steps, strict=True))
        self.update(self.task, completed=taken, total=total)
        speed = self.tasks[0].speed  # without the first tick, which compiles
        losses = [self.losses[name] for name in live if name in self.losses]
        mean = statistics.fmean(losses) if losses else math.nan
        self.curve.add(taken / total, mean)
        numbers: dict[str, Any] = {
            "loss": f"{mean:.4f}" if losses else "-",
            "speed": f"{speed:,.1f} steps/s" if speed else "-",
            "live": f"{len(live)} of {len(steps)} members",
            "left": self.left(taken, total),
        }
        self.update(self.task, **numbers)
        if not self.console.is_terminal and (tick % self.every == 0 or taken == total):
            self.say(
                f"step {taken}/{total} of all  mean loss {numbers['loss']}  {numbers['speed']}  "
                f"{numbers['live']}"
            )


class Lines:
    """Shows the lines of one member's metrics in the display of the group."""

    def __init__(self, display: GroupDisplay, name: str) -> None:
        self._display, self._name = display, name

    def step(self, line: dict[str, Any]) -> None:
        """Remember the loss of a training line."""
        self._display.losses[self._name] = line["loss"]

    def evaluation(self, line: dict[str, Any], note: str = "") -> None:
        self._display.evaluation(line, note, f"{self._name}  ")
