"""The options that `predict` and `generate` share, and what both do with them."""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Annotated, Literal

import tyro
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from lora_jax.errors import LoraError, listed
from lora_jax.serving import jsonl
from lora_jax.serving.served_adapters import BaseChoice, Served
from lora_jax.system.console import Bar, Console


@dataclasses.dataclass(frozen=True)
class AdapterOptions(BaseChoice):
    """The adapters to use, the lines that they answer, and where the answers go."""

    adapter: Annotated[tuple[str, ...], tyro.conf.arg(metavar="[NAME=]PATH")] = ()
    """A run directory of train.py, a folder of run directories, or a folder of lora_jax.save."""
    file: str | None = None
    """The file with the lines to answer; - is stdin. None: stdin if something is piped in."""
    skip_broken: bool = False
    """Go on after a line that cannot be answered, and write the reason in its place."""

    def source(self, typed: Sequence[str], counts: Sequence[str]) -> str | None:
        """Check the options, and return the file to read; None if the options `typed` have it all.

        The options `counts` must be at least 1.
        """
        for name in counts:
            if (value := getattr(self, name)) < 1:
                raise LoraError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        given = [f"--{name}" for name in (*typed, "file") if getattr(self, name)]
        if len(given) > 1:
            raise LoraError(f"{given[0]} and {given[1]} exclude each other: drop one")
        if not given and sys.stdin.isatty():
            ways = ", ".join(f"--{name}" for name in typed)
            raise LoraError(f"nothing to answer: give {ways} or --file, or pipe lines in")
        return self.file if given else jsonl.STANDARD

    def served(self, task: Literal["predict", "generate"], console: Console) -> Served:
        """Open the adapters and their base, and show the progress on the console."""
        with OpeningBar(console) as bar:
            return self.open(self.adapter, task, bar.count)


def opening(served: Served, each: Sequence[str]) -> str:
    """Return the text that is printed when the adapters are open, with a line for each."""
    return f"{len(each)} adapter{'s' * (len(each) > 1)} on {served.reference}\n{listed(each, 10)}"


def skipped(faults: Sequence[str], count: int, out: str | None) -> str:
    """Return the text about broken lines, at the end of a command."""
    where = f', with an "error" in {out}' if out is not None else ""
    return f"{len(faults):,} of {count:,} lines are broken{where}:\n{listed(faults)}"


class OpeningBar(Bar):
    """Shows how many adapters are open: a bar on a terminal; elsewhere ten lines, if many."""

    def __init__(self, console: Console) -> None:
        columns = TextColumn("opening"), BarColumn(), MofNCompleteColumn()
        super().__init__(console, *columns, transient=True)
        self._task = self.add_task("", total=None)

    def count(self, number: int, total: int) -> None:
        self.update(self._task, completed=number, total=total)
        tenth = total >= 20 and number * 10 // total > (number - 1) * 10 // total
        if tenth and not self.console.is_terminal:
            self.say(f"opened {number} of {total} adapters")


class FileBar(Bar):
    """A progress bar for the lines of a file, with the file's size as its length if it is known."""

    def __init__(self, console: Console, file: str | None, unit: str) -> None:
        """Show a bar for `file`, whose lines are `unit`; None shows no bar."""
        rate = TextColumn("{task.fields[count]:,} {task.fields[unit]}  {task.fields[rate]:,.0f}/s")
        columns = BarColumn(), rate, TimeRemainingColumn()
        super().__init__(console, *columns, shown=file is not None, transient=True)
        path = None if file is None else pathlib.Path(file)
        total = path.stat().st_size if path is not None and path.is_file() else None
        self.add_task("", total=total, unit=unit, count=0, rate=0.0)

    def count(self, size: int) -> None:
        """Count one more line, of `size` bytes."""
        (task,) = self.tasks
        count = task.fields["count"] + 1
        rate = count / max(task.elapsed or 0.0, 1e-9)
        self.update(task.id, advance=size, count=count, rate=rate)
