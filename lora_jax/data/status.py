"""Progress messages for reading data, which are shown only if it takes long."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import jax
import rich.console
import rich.progress

T = TypeVar("T")

_LONG = 20_000  # this many items take about a second
_LARGE = 20_000_000  # bytes of JSON that take about a second


def _console() -> rich.console.Console:
    """Return the console of stderr, which is quiet in all processes of a run but the first."""
    other = jax.distributed.is_initialized() and jax.process_index() > 0
    return rich.console.Console(stderr=True, quiet=other)


@contextlib.contextmanager
def status(description: str) -> Iterator[None]:
    """Show `description` while the block runs: a spinner on a terminal, a line elsewhere."""
    console = _console()
    if not console.is_terminal:
        console.print(description, highlight=False, soft_wrap=True)
    with console.status(description):
        yield


@contextlib.contextmanager
def bytes_read(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yield a function that shows how much of a file has been read, if it is large."""
    console = rich.console.Console(stderr=True)
    if total < _LARGE:
        yield lambda place: None
        return
    if not console.is_terminal:
        console.print(f"{description}: {total / 1e6:,.0f} MB ...", highlight=False)
    columns = (*rich.progress.Progress.get_default_columns(), rich.progress.DownloadColumn())
    hidden = not console.is_terminal
    with rich.progress.Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task(description, total=total)
        yield lambda place: bar.update(task, completed=place)


def tracked(items: Iterable[T], description: str, total: int) -> Iterator[T]:
    """Yield items, and show a progress bar on a terminal or a line elsewhere if there are many."""
    if total < _LONG:
        yield from items
        return
    console = _console()
    if not console.is_terminal:
        console.print(f"{description}: {total:,} ...", highlight=False)
    yield from rich.progress.track(
        items, description, total, console=console, transient=True, disable=not console.is_terminal
    )
