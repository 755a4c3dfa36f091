"""Hold Ctrl-C back while something runs that must not be cut in the middle."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Deliver a Ctrl-C of the block at its end; a second one is delivered at once.

    Orbax starts threads that wait for each other. If Ctrl-C comes between two starts, the first
    thread waits five minutes for one that never comes, and Python waits for it before it exits.

    In a thread other than the main one this does nothing, because no signal is delivered there.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    held: list[FrameType | None] = []

    def hold(number: int, frame: FrameType | None) -> None:
        if held:
            before(number, frame)
        held.append(frame)

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if held:
            before(signal.SIGINT, held[0])
