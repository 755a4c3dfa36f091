"""Processes that run cases, and a watch over them: one that hangs or dies is a case that failed."""

from __future__ import annotations

import multiprocessing
import os
import pathlib
import shutil
import tempfile
import time
import traceback
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
        end = run_one(*task[:1], seed, task[1], root)
        if end.found:
            kept = pathlib.Path(folder) / "found" / f"{end.kind}-{end.number}"
            shutil.copytree(root / "case", kept, dirs_exist_ok=True)
            (kept / "traceback.txt").write_text(end.found, errors="backslashreplace")
        ends.put(end)
    ends.put(None)


class Runner:
    """Starts processes, and starts another for one that hangs or dies."""

    def __init__(self, tasks: list[tuple[str, int]], seed: int, jobs: int, folder: str) -> None:
        self.left, self.seed, self.folder = iter(tasks), seed, folder
        self.context = multiprocessing.get_context("spawn")
        self.workers = [self._start() for _ in range(jobs)]

    def _start(self) -> dict[str, Any]:
        tasks, ends = self.context.SimpleQueue(), self.context.Queue()
        process = self.context.Process(
            target=work, args=(tasks, ends, self.seed, self.folder), daemon=True
        )
        process.start()
        worker = {"process": process, "tasks": tasks, "ends": ends, "task": None}
        for _ in range(20):
            tasks.put(next(self.left, None))
        return worker | {"heard": time.monotonic() + 60}

    def ends(self) -> Any:
        """Yield how each case ended."""
        while self.workers:
            for worker in list(self.workers):
                yield from self._hear(worker)
            time.sleep(0.02)

    def _hear(self, worker: dict[str, Any]) -> Any:
        while not worker["ends"].empty():
            end = worker["ends"].get()
            worker["heard"] = time.monotonic()
            if end is None:
                self.workers.remove(worker)
                worker["process"].join()
                return
            if end.end == "begun":
                worker["task"] = end
                worker["tasks"].put(next(self.left, None))
            else:
                worker["task"] = None
                yield end
        dead = not worker["process"].is_alive()
        if dead or time.monotonic() - worker["heard"] > WALL:
            worker["process"].kill()
            self.workers.remove(worker)
            if (task := worker["task"]) is not None:
                what = f"died with {worker['process'].exitcode}" if dead else "hangs"
                yield task._replace(end="found", place=f"the process {what}", found=what)
            if (one := next(self.left, None)) is not None:
                self.workers.append(self._start())
                self.workers[-1]["tasks"].put(one)
