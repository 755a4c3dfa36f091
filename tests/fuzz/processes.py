"""Processes that run cases; a process that hangs or dies is a fault of its case."""

from __future__ import annotations

import collections
import logging
import multiprocessing
import os
import pathlib
import queue
import shutil
import tempfile
import threading
import traceback
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from tests.fuzz import cases

WALL = 60  # a process that does not end its case within so many seconds hangs
STARTED = 2 * WALL  # the first case waits for the import of JAX


class Ended(NamedTuple):
    """The end of a case; `found` is the traceback of a fault, or "" if there was none."""

    kind: str
    number: int
    end: str
    found: str = ""


def run_one(kind: str, seed: int, number: int, root: pathlib.Path) -> Ended:
    try:
        return Ended(kind, number, cases.run(kind, seed, number, root))
    except KeyboardInterrupt:
        raise
    except BaseException:  # noqa: BLE001  any error is a fault
        return Ended(kind, number, "fault", traceback.format_exc())


def start_process() -> None:
    """Apply the settings of a process that runs cases."""
    for name in ("absl", "asyncio", "jax"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    jax.config.update("jax_platforms", "cpu")


def work(pipe: Any, seed: int, folder: str) -> None:
    """Run the cases that come through a pipe, and send how each ended."""
    start_process()
    log = os.open(f"{folder}/stderr-{os.getpid()}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 2)  # libraries print panics and the reason why they end the process there
    root = pathlib.Path(tempfile.mkdtemp(dir=folder))
    while True:
        kind, number = pipe.recv()
        end = run_one(kind, seed, number, root)
        if end.found:
            kept = pathlib.Path(folder, "found", f"{kind}-{number}")
            shutil.copytree(root / "case", kept, dirs_exist_ok=True)
        pipe.send(end)


def run_all(tasks: list[tuple[str, int]], seed: int, jobs: int, folder: str) -> Iterator[Ended]:
    """Run the (kind, number) of `tasks` in `jobs` processes; yield how each case ended."""
    left, ends = collections.deque(tasks), queue.SimpleQueue[Ended]()
    context = multiprocessing.get_context("spawn")

    def one_process() -> None:
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(theirs, seed, folder), daemon=True)
        process.start()
        theirs.close()  # so that the end of the process is the end of the pipe
        wait, what = STARTED, ""
        while left and not what:
            task = left.popleft()
            ours.send(task)
            try:
                end = ours.recv() if ours.poll(wait) else None
                what = "" if end else "the process hangs"
            except EOFError:
                what = "the process died"
            ends.put(Ended(*task, "fault", what) if what else end)
            wait = WALL
        process.kill()

    def processes() -> None:
        while left:
            one_process()

    for _ in range(jobs):
        threading.Thread(target=processes, daemon=True).start()
    for _ in tasks:
        yield ends.get()
