"""Compare a training step with and without the memory that commands keep (system/host_memory.py).

    python -m benchmarks.page_faults

Each side runs in its own processes, in turns. A process takes `--steps` steps after warm-up steps,
in which the heap grows to its size. The numbers are medians over the processes: wall-clock seconds
of a step, its CPU seconds (user and system, all threads), the system seconds alone, minor page
faults, and the peak resident memory of the process.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import jax

from benchmarks import commands, common, step_time
from lora_jax.system import host_memory

SIDES = {"given back": "0", "kept": ""}
WARMING_UP = 12


def measure(model: str, targets: str, steps: int) -> dict[str, float]:
    """Take the steps in this process, which keeps memory or not (benchmarks/__init__.py)."""
    jax.config.update("jax_platforms", "cpu")
    setup = common.SETUPS[model]()
    params, batch = setup.arrays()
    layout = setup.layout(setup.specs()[targets])
    gradient = common.lora_gradient(setup, layout)
    step = step_time.stepping(gradient, common.adapters(layout), params, batch)
    for _ in range(WARMING_UP):
        step()
    before, seconds = resource.getrusage(resource.RUSAGE_SELF), []
    for _ in range(steps):
        begun = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begun)
    after = resource.getrusage(resource.RUSAGE_SELF)
    system = after.ru_stime - before.ru_stime
    return {
        "wall": statistics.median(seconds),
        "cpu": (after.ru_utime - before.ru_utime + system) / steps,
        "system": system / steps,
        "faults": (after.ru_minflt - before.ru_minflt) / steps,
        "peak": after.ru_maxrss * 1024,
    }


def in_a_process(side: str, *arguments: str) -> dict[str, float]:
    """Run `measure` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.page_faults", "--measure", *arguments]
    environment = {**os.environ, host_memory.VARIABLE: SIDES[side]}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def rows(model: str, targets: str, steps: int, processes: int) -> list[tuple[str, ...]]:
    """Return the lines of the table for one model and its targets."""
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(processes):
        for side in SIDES:
            found[side].append(in_a_process(side, model, targets, str(steps)))
    median: dict[str, dict[str, float]] = {
        side: {name: statistics.median(x[name] for x in each) for name in each[0]}
        for side, each in found.items()
    }
    first = median["given back"]
    return [
        (common.SETUPS[model]().name, targets, side)
        + (f"{x['wall']:.3f}", f"{x['cpu']:.3f}", f"{x['cpu'] / first['cpu']:.3f}")
        + (f"{x['system']:.3f}", f"{x['faults']:,.0f}", f"{x['peak'] / 1e9:.2f}")
        for side, x in median.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Steps with and without kept memory.")
    parser.add_argument("--models", nargs="+", choices=common.SETUPS, default=list(common.SETUPS))
    parser.add_argument("--targets", nargs="+", default=["q and v"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--processes", type=int, default=3, help="processes of each side")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args: Any = parser.parse_args()
    if args.measure:
        model, targets, steps = args.measure
        print(json.dumps(measure(model, targets, int(steps))))
        return
    jax.config.update("jax_platforms", "cpu")
    lines = [
        line
        for model in args.models
        for targets in args.targets
        for line in rows(model, targets, args.steps, args.processes)
    ]
    print(f"{common.hardware()}; {commands.load()}", end="\n\n")
    header = ("model", "targets", "freed memory", "wall s", "CPU s", "/ given back")
    print(common.table((*header, "system s", "faults", "peak GB"), lines))


if __name__ == "__main__":
    main()
