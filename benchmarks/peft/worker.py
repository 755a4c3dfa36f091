"""The protocol of the workers: they read the name of a run, and print its seconds."""

import random
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def serve(runs: Mapping[str, Callable[[], object]], versions: str) -> None:
    """Warm each run up, print "ready", then time the run that each line of standard input names.

    The answer is two numbers: wall-clock seconds, and CPU seconds of all threads.
    """
    for run in runs.values():
        run()
        run()
    print("ready", versions, *runs, sep="\t", flush=True)
    for line in sys.stdin:
        run = runs[line.strip()]
        begun, spent = time.perf_counter(), time.process_time()
        run()
        print(time.perf_counter() - begun, time.process_time() - spent, flush=True)


def prompts(rows: int, length: int) -> list[list[int]]:
    """Return random tokens below 49,152, which are the same on both sides."""
    draw = random.Random(0)
    return [[draw.randrange(49_152) for _ in range(length)] for _ in range(rows)]


def digest(written: Iterable[Any]) -> str:
    """Return a checksum of arrays of tokens."""
    numbers = [int(token) for array in written for token in array.flatten()]
    return f"{zlib.crc32(repr(numbers).encode()):08x}"
