"""What a person sees of a command, on stderr: stdout is for the results."""

from __future__ import annotations

import os
import pathlib
import sys
from collections.abc import Callable
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
from rich.text import Text

from lora_jax import models
from lora_jax.errors import LoraError

# What a user can put right; anything else is a fault of the program and shows its traceback.
USER_ERRORS = (
    LoraError,
    models.ConfigError,
    models.WeightsError,
    models.source.ReferenceError,
    models.packages.PackageError,
    OSError,
)


def guarded(run: Callable[[], None]) -> int:
    """Run a command; its exit status.

    0 done, also where the reader of stdout wants no more; 1 an error that is printed; 130 Ctrl-C.
    """
    try:
        run()
        sys.stdout.flush()
    except BrokenPipeError:
        # What Python flushes as it ends would be an error once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except USER_ERRORS as error:
        say(Console(stderr=True, style="red"), f"error: {error}")
        return 1
    except KeyboardInterrupt:
        say(Console(stderr=True), "Stopped. What was written before is whole.")
        return 130
    return 0


def say(console: Console, text: str) -> None:
    """Print plain text."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


class _Rate(ProgressColumn):
    """How many of a unit came in a second."""

    def render(self, task: Task) -> Text:
        """`1,234 texts  56/s`, of what the bar has counted."""
        count, seconds = task.fields["count"], max(task.elapsed or 0.0, 1e-9)
        return Text(f"{count:,} {task.fields['unit']}  {count / seconds:,.0f}/s")


class Bar:
    """A bar on a terminal, and nothing elsewhere; a context manager.

    It is as long as the file that is read, where its size is known.
    """

    def __init__(self, console: Console, file: str | None, unit: str) -> None:
        """Of the lines of a file, each of which is one `unit`."""
        path = None if file is None else pathlib.Path(file)
        total = path.stat().st_size if path is not None and path.is_file() else None
        columns = (BarColumn(), _Rate(), TimeRemainingColumn())
        shown = console.is_terminal and file is not None
        self._bar = Progress(*columns, console=console, transient=True, disable=not shown)
        self._task = self._bar.add_task("", total=total, unit=unit, count=0)
        self._count = 0

    def advance(self, size: int) -> None:
        """One line of that many bytes is done."""
        self._count += 1
        self._bar.update(self._task, advance=size, count=self._count)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()
