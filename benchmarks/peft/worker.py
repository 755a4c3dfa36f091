"""The protocol of the two workers: a name on standard input, its seconds on standard output."""

import sys
import time
from collections.abc import Callable, Mapping


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
