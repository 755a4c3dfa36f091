"""Processes that run cases; a process that hangs or dies is a fault of its case."""

from __future__ import annotations

import collections
import dataclasses
import multiprocessing
import os
import pathlib
import shutil
import tempfile
import time
import traceback
from collections.abc import Iterator
from typing import Any, NamedTuple

WALL = 60  # a process that sends nothing for so many seconds hangs


class Ended(NamedTuple):
    """The end of a case; `found` is the traceback of a fault, or "" if there was none."""

    kind: str
    number: int
    end: str
    place: str = ""
    found: str = ""


def run_one(kind: str, seed: int, number: int, root: pathlib.Path) -> Ended:
    """Run one case and return how it ended."""
    from tests.fuzz import one_case

    try:
        return Ended(kind, number, one_case.run(kind, one_case.generator(kind, seed, number), root))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001  any error is a fault
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f for f in frames if "/lora_jax/" in f.filename] or frames
        place = (
            f"{type(error).__name__} at {pathlib.Path(ours[-1].filename).name}:{ours[-1].lineno}"
        )
        return Ended(kind, number, "found", place, traceback.format_exc())


def start_process() -> None:
    """Apply the settings of a process that runs cases."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    import logging

    import jax

    for name in ("absl", "asyncio", "jax"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    jax.config.update("jax_platforms", "cpu")


def work(tasks: Any, ends: Any, seed: int, folder: str) -> None:
    """Run the cases of a queue until it gives None."""
    start_process()
    log = os.open(f"{folder}/stderr-{os.getpid()}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 2)  # libraries print panics and the reason why they end the process there
    root = pathlib.Path(tempfile.mkdtemp(dir=folder))
    while (task := tasks.get()) is not None:
        ends.put(Ended(*task, "begun"))
        end = run_one(task[0], seed, task[1], root)
        if end.found:
            kept = pathlib.Path(folder) / "found" / f"{end.kind}-{end.number}"
            shutil.copytree(root / "case", kept, dirs_exist_ok=True)
            (kept / "traceback.txt").write_text(end.found, errors="backslashreplace")
        ends.put(end)
    ends.put(None)


@dataclasses.dataclass
class _Worker:
    """A process, the queues to it and from it, its cases, and the time of its last message."""

    process: Any
    tasks: Any
    ends: Any
    given: collections.deque[tuple[str, int]]
    begun: Ended | None = None
    heard: float = 0.0


class Runner:
    """Start processes, and replace one that hangs or dies."""

    def __init__(self, tasks: list[tuple[str, int]], seed: int, jobs: int, folder: str) -> None:
        """Start `jobs` processes, which share the (kind, number) of `tasks`."""
        self.left, self.seed, self.folder = collections.deque(tasks), seed, folder
        self.context = multiprocessing.get_context("spawn")
        self.workers = [self._start() for _ in range(jobs)]

    def _start(self) -> _Worker:
        tasks, ends = self.context.SimpleQueue(), self.context.Queue()
        arguments = (tasks, ends, self.seed, self.folder)
        process = self.context.Process(target=work, args=arguments, daemon=True)
        process.start()
        worker = _Worker(process, tasks, ends, collections.deque())
        worker.heard = time.monotonic() + WALL  # it imports JAX first
        for _ in range(20):
            self._give(worker)
        return worker

    def _give(self, worker: _Worker) -> None:
        if self.left:
            worker.given.append(self.left.popleft())
            worker.tasks.put(worker.given[-1])
        else:
            worker.tasks.put(None)

    def ends(self) -> Iterator[Ended]:
        """Yield how each case ended."""
        while self.workers:
            for worker in list(self.workers):
                yield from self._hear(worker)
            time.sleep(0.02)

    def _hear(self, worker: _Worker) -> Iterator[Ended]:
        # This is asked first, so that all messages of a dead process are read below.
        alive = worker.process.is_alive()
        while not worker.ends.empty():
            end, worker.heard = worker.ends.get(), time.monotonic()
            if end is None:
                self.workers.remove(worker)
                return
            worker.begun = end if end.end == "begun" else None
            if worker.begun is None:
                yield end
            else:
                worker.given.popleft()
                self._give(worker)
        if alive and time.monotonic() - worker.heard < WALL:
            return
        what = "hangs" if alive else f"died with {worker.process.exitcode}"
        worker.process.kill()
        self.workers.remove(worker)
        self.left.extendleft(reversed(worker.given))
        if worker.begun is not None:
            yield worker.begun._replace(end="found", place=f"the process {what}", found=what)
        if self.left:
            self.workers.append(self._start())
