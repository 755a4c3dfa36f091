"""The protocol of the two workers: a name on standard input, its seconds on standard output."""

import sys
import time
from collections.abc import Callable, Mapping


def serve(runs: Mapping[str, Callable[[], object]], versions: str) -> None:
    """Warm up each run, print that it is ready, then time the run that each line of input names."""
    for run in runs.values():
        run()
        run()
    print("ready", versions, *runs, sep="\t", flush=True)
    for line in sys.stdin:
        run = runs[line.strip()]
        start = time.perf_counter()
        run()
        print(time.perf_counter() - start, flush=True)
