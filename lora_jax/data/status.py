"""Progress messages for reading data, which are shown only if it takes long."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import TypeVar

import jax
import rich.console
import rich.progress

T = TypeVar("T")

_LONG = 20_000  # this many items take about a second


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
