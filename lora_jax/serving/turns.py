"""Work that many threads need, done by one of them at a time for all."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class Turns:
    """Lets a thread that waits for a result take the next turn, unless another thread is at it.

    So there is no thread in the background, and nothing to close: work goes on while somebody
    waits for it, and what a turn finds may be for any thread.
    """

    def __init__(self, turn: Callable[[], object]) -> None:
        """`turn` is the work; it is never run by two threads at once."""
        self._turn, self._changed, self._taken = turn, threading.Condition(), False
        self._errands = deque[tuple[Future[Any], Callable[[], Any]]]()

    def until(self, ready: Callable[[], object]) -> None:
        """Take turns, or wait for the turns of others, until `ready()` is true."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: ready() or not self._taken)
                if ready():
                    return
                self._taken = True
            try:
                self._work()
            finally:
                with self._changed:
                    self._taken = False
                    self._changed.notify_all()

    def do(self, errand: Callable[[], T]) -> T:
        """Run `errand()` between two turns, and return its result or raise its error."""
        future = Future[T]()
        self._errands.append((future, errand))
        self.until(future.done)
        return future.result()

    def _work(self) -> None:
        """Run the errands first: otherwise they could wait for ever while others take turns."""
        while self._errands:
            future, errand = self._errands.popleft()
            try:
                future.set_result(errand())
            except BaseException as error:
                future.set_exception(error)
                if not isinstance(error, Exception):
                    raise
        self._turn()
