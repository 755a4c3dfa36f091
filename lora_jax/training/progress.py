"""Display the progress of a run: the curve of its loss on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from rich.progress import MofNCompleteColumn, Task, TextColumn
from rich.text import Text

from lora_jax.system.console import Bar, Console
from lora_jax.training.loss_curve import LossCurve

_LONG = 5.0  # seconds; a shorter compilation is not worth a line


class Activity(TextColumn):
    """The fields of a task, or, while a program is compiled, its name and the seconds so far."""

    compiled, since = "", 0.0  # the program, or "" if none is compiled now

    def render(self, task: Task) -> Text:
        """Return the text, which rich asks for several times a second from a thread of its own."""
        if self.compiled:
            return Text(f"compiling {self.compiled}: {time.monotonic() - self.since:.0f} s")
        return super().render(task)


class CurveBar(Bar):
    """A bar that draws the curve of a loss, with the fields `shown` of its task."""

    def __init__(self, console: Console, every: int, shown: str, **task: Any) -> None:
        """Show a curve; without a terminal, print a line every `every` steps."""
        self.curve, self.every, self.activity = LossCurve(), every, Activity(shown)
        left = TextColumn("{task.fields[left]}")
        super().__init__(console, self.curve, MofNCompleteColumn(), self.activity, left)
        self.task = self.add_task("train", **{"loss": "-", "speed": "-", "left": "-", **task})
        self._compiling, self._first = 0.0, (0.0, -1)  # seconds; the time and number of a step

    def clock(self) -> float:
        """Return a time in seconds that stands still while a program is compiled."""
        return time.monotonic() - self._compiling

    def left(self, step: int, steps: int) -> str:
        """Return the time that the remaining steps take at the pace since the first one."""
        if self._first[1] < 0:
            self._first = (self.clock(), step)
        since, first = self._first
        pace = (self.clock() - since) / max(step - first, 1)
        return str(timedelta(seconds=round((steps - step) * pace))) if step > first else "-"

    @contextlib.contextmanager
    def compiling(self, program: str, shape: str = "") -> Iterator[None]:
        """Say that `program` is compiled, for batches of `shape`, until the block ends.

        The bar counts the seconds. Without a terminal a line says since when, unless it is short.
        """
        name = f"{program} ({shape})" if shape else program
        self.activity.compiled, self.activity.since = name, time.monotonic()
        line = f"compiling {name} since {time.strftime('%H:%M:%S')}"
        later = threading.Timer(_LONG, self.say, [line])
        later.daemon = True
        if not self.console.is_terminal:
            later.start()
        try:
            yield
        finally:
            later.cancel()
            self.activity.compiled = ""
            taken = time.monotonic() - self.activity.since
            self._compiling += taken
        if taken > _LONG and not self.console.is_terminal:
            self.say(f"compiled {name} in {taken:.0f} s")

    def evaluation(self, line: dict[str, Any], note: str = "", name: str = "") -> None:
        """Show an evaluation line of metrics.jsonl, of the member `name` if there are several."""
        numbers = (f"{k} {v:.4f}" for k, v in line.items() if k not in ("step", "split"))
        self.say(f"{name}step {line['step']}  {line['split']}: {'  '.join(numbers)}{note}")


class Display(CurveBar):
    """A context manager that shows the newest training step, and evaluations as they come."""

    def __init__(self, console: Console, steps: int, start: int, every: int, unit: str) -> None:
        shown = "loss {task.fields[loss]}  lr {task.fields[rate]}  {task.fields[speed]}"
        super().__init__(console, every, shown, total=steps, completed=start, rate="-")
        self._steps, self._unit = steps, unit
        self._recent = deque[tuple[float, int]](maxlen=50)  # (time, units so far)

    def step(self, line: dict[str, Any]) -> None:
        step, units = line["step"], line["units"]
        self._recent.append((self.clock(), units + (self._recent[-1][1] if self._recent else 0)))
        (since, before), (now, units) = self._recent[0], self._recent[-1]
        pace = f"{(units - before) / (now - since):,.0f}" if now > since else "-"
        numbers: dict[str, Any] = {
            "loss": f"{line['loss']:.4f}",
            "rate": f"{line['learning_rate']:.2e}",
            "speed": f"{pace} {self._unit}/s",
            "left": self.left(step, self._steps),
        }
        if line.get("mfu", math.nan) >= 0:
            numbers["speed"] += f"  MFU {line['mfu']:.1%}"
        self.curve.add(step / self._steps, line["loss"])
        self.update(self.task, completed=step, **numbers)
        due = step % self.every == 0 or step == self._steps
        if due and not self.console.is_terminal:
            self.say(
                f"step {step}/{self._steps}  loss {numbers['loss']}  "
                f"lr {numbers['rate']}  {numbers['speed']}  {numbers['left']} left"
            )
