"""Run any number of cases, spread over processes.

python -m tests.fuzz --cases 100000 --seed 1
python -m tests.fuzz --cases 5000 --kind gguf peft
python -m tests.fuzz --kind gguf --seed 1 --only 4711      # one case again, with its traceback

Faults are printed once for each place in the code that raises them, with the case that causes them,
and the files of that case are kept. The exit status is 1 if a fault was found, and 0 otherwise.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import pathlib
import random
import sys
import tempfile
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from lora_jax.system.console import say
from tests.fuzz.kinds import KINDS
from tests.fuzz.processes import Ended, run_all, run_one, start_process


def main() -> int:
    """Run the command line and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", nargs="*", choices=KINDS, default=[])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", type=int, default=None)
    parser.add_argument("--folder", default=None, help="where the cases are made")
    options = parser.parse_args()
    console, names = Console(), options.kind or list(KINDS)
    folder = options.folder or tempfile.mkdtemp(prefix="fuzz-")
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    if options.only is not None:
        start_process()
        root = pathlib.Path(tempfile.mkdtemp(dir=folder))
        end = run_one(names[0], options.seed, options.only, root)
        say(console, f"{end.found}{end.end}; its files are in {root / 'case'}")
        return 1 if end.found else 0
    total = sum(KINDS[name].cases for name in names)
    tasks = [(n, i) for n in names for i in range(round(options.cases * KINDS[n].cases / total))]
    random.Random(options.seed).shuffle(tasks)
    counts, found = collections.Counter[tuple[str, str]](), dict[str, list[Ended]]()
    began = time.monotonic()
    bar = Progress(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console)
    with bar, contextlib.suppress(KeyboardInterrupt):  # faults found until then are shown
        task = bar.add_task("", total=len(tasks))
        for end in run_all(tasks, options.seed, options.jobs, folder):
            counts[end.kind, end.end] += 1
            bar.advance(task)
            if end.found:
                found.setdefault(end.place, []).append(end)
                if len(found[end.place]) == 1:
                    said = end.found.strip().splitlines()[-1][:300]
                    say(bar.console, f"{end.kind} {end.number}: {end.place}\n  {said}")
    for name in names:
        how = {end: n for (kind, end), n in sorted(counts.items()) if kind == name}
        say(console, f"{name:14}{how}")
    for place, ends in sorted(found.items(), key=lambda item: -len(item[1])):
        which = ", ".join(f"{e.kind} {e.number}" for e in ends[:5])
        say(console, f"{len(ends):6} x {place}: {which}")
    seconds = time.monotonic() - began
    say(console, f"{sum(counts.values()):,} cases in {seconds:,.0f} s; folder {folder}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
