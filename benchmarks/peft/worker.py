"""The protocol of the two workers: a name on standard input, its seconds on standard output."""

import random
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def serve(runs: Mapping[str, Callable[[], object]], versions: str) -> None:
    """Warm each run up, say so, then time the run that each line of standard input names.

    The answer is two numbers: seconds by the clock, and CPU seconds of all threads.
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
    """Random tokens below 49,152, the same on both sides."""
    draw = random.Random(0)
    return [[draw.randrange(49_152) for _ in range(length)] for _ in range(rows)]


def digest(written: Iterable[Any]) -> str:
    """A checksum of arrays of tokens."""
    numbers = [int(token) for array in written for token in array.flatten()]
    return f"{zlib.crc32(repr(numbers).encode()):08x}"
