"""Display the progress of a run: the curve of its loss on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from rich.progress import MofNCompleteColumn, TextColumn, TimeRemainingColumn

from lora_jax.system.console import Bar, Console
from lora_jax.training.loss_curve import LossCurve

_NUMBERS = "loss {task.fields[loss]}  lr {task.fields[rate]}  {task.fields[speed]}"


class Display(Bar):
    """A context manager that shows the newest training step, and evaluations as they come."""

    def __init__(self, console: Console, steps: int, start: int, every: int, unit: str) -> None:
        """Show steps `start` to `steps`; without a terminal, print a line every `every` steps."""
        self._curve = LossCurve()
        columns = (self._curve, MofNCompleteColumn(), TextColumn(_NUMBERS), TimeRemainingColumn())
        super().__init__(console, *columns)
        self._steps, self._every, self._unit = steps, every, unit
        fields: dict[str, Any] = {"loss": "-", "rate": "-", "speed": "-"}
        self._task = self.bar.add_task("train", total=steps, completed=start, **fields)
        self._recent = deque([(time.monotonic(), start, 0)], maxlen=50)  # (time, step, units)

    def step(self, line: dict[str, Any]) -> None:
        """Show a training line of metrics.jsonl."""
        now, step = time.monotonic(), line["step"]
        since, from_step, from_units = self._recent[0]
        units, elapsed = self._recent[-1][2] + line["units"], max(now - since, 1e-9)
        self._recent.append((now, step, units))
        numbers: dict[str, Any] = {
            "loss": f"{line['loss']:.4f}",
            "rate": f"{line['learning_rate']:.2e}",
            "speed": f"{(units - from_units) / elapsed:,.0f} {self._unit}/s",
        }
        self._curve.add(step / self._steps, line["loss"])
        self.bar.update(self._task, completed=step, **numbers)
        due = step % self._every == 0 or step == self._steps
        if due and not self.console.is_terminal:
            left = (self._steps - step) * elapsed / (step - from_step)
            self.say(
                f"step {step}/{self._steps}  loss {numbers['loss']}  "
                f"lr {numbers['rate']}  {numbers['speed']}  {left:.0f} s left"
            )

    def evaluation(self, line: dict[str, Any], note: str = "") -> None:
        """Show an evaluation line of metrics.jsonl."""
        numbers = (f"{k} {v:.4f}" for k, v in line.items() if k not in ("step", "split"))
        self.say(f"step {line['step']}  {line['split']}: {'  '.join(numbers)}{note}")
