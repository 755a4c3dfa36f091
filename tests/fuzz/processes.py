"""Processes that run cases, and a watch over them: one that hangs or dies is a case that failed."""

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

WALL = 60  # seconds without a word after which a process is taken to hang


class Ended(NamedTuple):
    """How a case ended: `found` is "" or the traceback of what should not have happened."""

    kind: str
    number: int
    end: str
    place: str = ""
    found: str = ""


def run_one(kind: str, seed: int, number: int, root: pathlib.Path) -> Ended:
    """Run one case and say how it ended."""
    from tests.fuzz import one_case

    try:
        return Ended(kind, number, one_case.run(kind, one_case.generator(kind, seed, number), root))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001  whatever it is, it was found
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f for f in frames if "/lora_jax/" in f.filename] or frames
        place = (
            f"{type(error).__name__} at {pathlib.Path(ours[-1].filename).name}:{ours[-1].lineno}"
        )
        return Ended(kind, number, "found", place, traceback.format_exc())


def start_process() -> None:
    """Settings of a process that runs cases."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    import logging

    import jax

    for name in ("absl", "asyncio", "jax"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    jax.config.update("jax_platforms", "cpu")


def work(tasks: Any, ends: Any, seed: int, folder: str) -> None:
    """Run the cases of a queue until it says None."""
    start_process()
    log = os.open(f"{folder}/stderr-{os.getpid()}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 2)  # libraries print their panics themselves, and say there why they end a process
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
    """A process, the queues to it and from it, the cases that it was given, when it last spoke."""

    process: Any
    tasks: Any
    ends: Any
    given: collections.deque[tuple[str, int]]
    begun: Ended | None = None
    heard: float = 0.0


class Runner:
    """Starts processes, and starts another for one that hangs or dies."""

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
        alive = worker.process.is_alive()  # asked first: what it said before it died is heard below
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
