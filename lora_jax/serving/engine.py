"""An engine computes the requests of many threads together, in batches of a few shapes."""

from __future__ import annotations

import abc
import dataclasses
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import jax

from lora_jax.checkpoint.saved_adapter import SavedAdapter


@dataclasses.dataclass(eq=False, kw_only=True)
class Job:
    """A request that waits, or is being computed.

    number: its number among the requests that were given with it.
    results: what nobody has read yet; an error is the last.
    over: whether no more results will come. Set it to cancel the job.
    """

    number: int = 0
    adapter: int = 0
    results: deque[Any] = dataclasses.field(default_factory=deque)
    over: bool = False

    def end(self, result: Any) -> None:
        """Add the last result."""
        self.results.append(result)
        self.over = True


class Engine(abc.ABC):
    """Takes turns, each by a thread that waits for results, for the jobs of all threads.

    So there is no thread in the background, and nothing to close: work goes on while somebody waits
    for it.

    Attributes:
      compiled: key of a program -> seconds that it took to compile.
    """

    def __init__(self) -> None:
        self.compiled: dict[tuple[Any, ...], float] = {}
        self._programs: dict[tuple[Any, ...], Any] = {}
        self._changed, self._taken = threading.Condition(), False
        self._errands = deque[tuple[Future[Any], Callable[[], object]]]()

    @abc.abstractmethod
    def turn(self) -> None:
        """Do a part of the work. It is never run by two threads at once."""

    @abc.abstractmethod
    def busy(self) -> set[int]:
        """Return the ids of the adapters that unfinished jobs use."""

    @abc.abstractmethod
    def add(self, i: int, member: SavedAdapter) -> None:
        """Put an adapter into the slot `i`, between two turns. Nothing is compiled again."""

    @abc.abstractmethod
    def warm_up(self) -> None:
        """Compile all programs, between two turns, while nothing is computed."""

    def read(self, jobs: Sequence[Job]) -> Iterator[Any]:
        """Yield the results of jobs until all are over, and take turns while there are none."""
        left = [*jobs]

        def ready() -> bool:
            return any(job.results or job.over for job in left)

        while left:
            self._until(ready)
            over = [job for job in left if job.over]  # looked at before the results are
            for job in left:
                while job.results:
                    if isinstance(result := job.results.popleft(), BaseException):
                        raise result
                    yield result
            left = [job for job in left if job not in over]

    def between_turns(self, errand: Callable[[], object]) -> None:
        """Run `errand()` between two turns; an error of it is raised here."""
        future = Future[Any]()
        self._errands.append((future, errand))
        self._until(future.done)
        future.result()

    def _until(self, ready: Callable[[], bool]) -> None:
        """Take turns, or wait for the turns of other threads, until `ready()` is true."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: ready() or not self._taken)
                if ready():
                    return
                self._taken = True
            try:
                while self._errands:  # first, or they could wait for ever while others take turns
                    future, errand = self._errands.popleft()
                    try:
                        future.set_result(errand())
                    except Exception as error:  # noqa: BLE001  the other thread raises it
                        future.set_exception(error)
                self.turn()
            finally:
                with self._changed:
                    self._taken = False
                    self._changed.notify_all()

    def _run(
        self, key: tuple[Any, ...], f: Callable[..., Any], *arguments: Any, donated: Any = ()
    ) -> Any:
        """Call the program of the key, which is compiled the first time."""
        if key not in self._programs:
            started = time.monotonic()
            lowered = jax.jit(f, donate_argnums=donated).lower(*arguments)
            self._programs[key] = lowered.compile()
            self.compiled[key] = time.monotonic() - started
        return self._programs[key](*arguments)
