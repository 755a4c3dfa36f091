"""Draw the curve of the loss as a progress bar, whose cells are equal parts of the run."""

from __future__ import annotations

import math
import os

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.progress import ProgressColumn, Task
from rich.progress_bar import ProgressBar
from rich.text import Text

LEVELS = "▁▂▃▄▅▆▇█"
UNKNOWN, AHEAD = "·", "─"  # steps without a known loss, and future steps
WIDTH = 40  # the most cells
_PARTS = 5 * WIDTH  # the number of equal parts of the run; each keeps the mean of its losses


class LossCurve(ProgressColumn):
    """The column of a progress bar, instead of rich's `BarColumn`.

    On a terminal that cannot show block characters it is the plain bar.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sums = [0.0] * _PARTS
        self._counts = [0] * _PARTS

    def add(self, share: float, loss: float) -> None:
        if math.isfinite(loss):
            part = min(max(math.ceil(share * _PARTS) - 1, 0), _PARTS - 1)
            self._sums[part] += loss
            self._counts[part] += 1

    def render(self, task: Task) -> _Drawn:
        share = task.completed / task.total if task.total else 0.0
        return _Drawn(self, share, ProgressBar(task.total, task.completed, WIDTH))

    def heights(self, cells: int, share: float) -> list[float | None]:
        """Return the mean loss of each cell that has begun.

        A cell without a loss repeats the one before it, and is None if there is none.
        """
        found: list[float | None] = []
        for cell in range(min(math.ceil(share * cells), cells)):
            parts = range(cell * _PARTS // cells, (cell + 1) * _PARTS // cells)
            count = sum(self._counts[i] for i in parts)
            mean = sum(self._sums[i] for i in parts) / count if count else None
            found.append(found[-1] if mean is None and found else mean)
        return found


class _Drawn:
    """The curve at one moment; rich tells it the width."""

    def __init__(self, curve: LossCurve, share: float, plain: ProgressBar) -> None:
        self._curve, self._share, self._plain = curve, share, plain

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if options.ascii_only or options.legacy_windows or os.environ.get("TERM") == "linux":
            yield self._plain  # the fonts of a Linux console have no such characters
            return
        cells = min(options.max_width, WIDTH)
        heights = self._curve.heights(cells, self._share)
        style = "bar.finished" if self._share >= 1 else "bar.complete"
        yield Text.assemble(
            (sparkline(heights), style), (AHEAD * (cells - len(heights)), "bar.back"), end=""
        )

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(8, min(options.max_width, WIDTH))


def sparkline(heights: list[float | None]) -> str:
    """Return one block for each number; the smallest number has the lowest block.

    >>> sparkline([None, 4.0, 3.0, 2.0, 1.0]), sparkline([2.0, 2.0])
    ('·█▆▃▁', '▁▁')
    """
    known = [x for x in heights if x is not None]
    low, high = min(known, default=0.0), max(known, default=0.0)
    step = (high - low) / (len(LEVELS) - 1)
    return "".join(
        UNKNOWN if x is None else LEVELS[round((x - low) / step) if step else 0] for x in heights
    )
