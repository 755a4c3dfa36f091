"""Run any number of cases, spread over processes; one that hangs or dies is a fault of its case.

python -m tests.fuzz --cases 100000 --seed 1
python -m tests.fuzz --cases 5000 --kind gguf peft
python -m tests.fuzz --kind gguf --seed 1 --only 4711      # one case again, with its traceback

Each fault is printed, and its files are kept. The exit status is 1 if a fault was found.
"""

from __future__ import annotations

import argparse
import collections
import os
import pathlib
import random
import sys
import tempfile

from rich.progress import track

from lora_jax.system.console import printable
from tests.fuzz import cases
from tests.fuzz.processes import run_all, run_one, start_process


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", nargs="*", choices=cases.KINDS, default=[])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", type=int, default=None)
    options = parser.parse_args()
    names, folder = options.kind or list(cases.KINDS), tempfile.mkdtemp(prefix="fuzz-")
    if options.only is not None:
        start_process()
        every = iter([run_one(names[0], options.seed, options.only, pathlib.Path(folder))])
        total = 1
    else:
        share = options.cases / sum(cases.KINDS[name].cases for name in names)
        tasks = [(n, i) for n in names for i in range(round(share * cases.KINDS[n].cases))]
        random.Random(options.seed).shuffle(tasks)
        every, total = run_all(tasks, options.seed, options.jobs, folder), len(tasks)
    counts = collections.Counter[tuple[str, str]]()
    try:
        for end in track(every, total=total):
            counts[end.kind, end.end] += 1
            if end.found:
                sys.stdout.write(printable(f"{end.kind} {end.number}: {end.found}\n"))
    except KeyboardInterrupt:
        sys.stdout.write("interrupted\n")
    for (kind, end), count in sorted(counts.items()):
        sys.stdout.write(f"{kind:14}{end:10}{count:8,}\n")
    sys.stdout.write(f"folder {folder}\n")
    return any(end == "fault" for _, end in counts)


if __name__ == "__main__":
    sys.exit(main())
