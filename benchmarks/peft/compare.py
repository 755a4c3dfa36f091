"""Compare the time of one training step of lora_jax with that of PyTorch + Hugging Face PEFT.

    python -m benchmarks.peft.compare
    python -m benchmarks.peft.compare --vectors avx2

The first run makes an environment (`benchmarks/peft/.venv`) with PyTorch, `transformers` and PEFT.
It takes 1 GB, or several if pip picks the build of PyTorch that brings CUDA. --python names the
interpreter of an existing environment instead. Each side has a worker process with the same model
and the same losses (see `ours.py`, `theirs.py`). The workers take steps in turns, on the same
cores, while the other one waits. A step is the gradient, AdamW and the update. The numbers are
medians; of torch's two attentions, the faster one counts. CPU seconds add up all threads.

With --vectors avx2, both sides use AVX2 and no wider vectors (`narrow.py`). This emulates a CPU
without wider vectors, with the caches and the clock of this one.
"""

import argparse
import os
import pathlib
import statistics
import subprocess
import sys
import venv
from typing import NamedTuple

from benchmarks import commands, common
from benchmarks.peft import narrow

HERE = pathlib.Path(__file__).resolve().parent
PACKAGES = ("torch", "transformers", "peft")
TRAINED = ("q and v", "all-linear")

# Variables that limit XLA, its YNNPACK, ATen, oneDNN and MKL to AVX2. (On an AMD CPU, MKL's sgemm
# uses AVX2 in any case.)
VECTORS = {
    "native": {},
    "avx2": {
        "XLA_FLAGS": "--xla_cpu_max_isa=AVX2",
        narrow.VARIABLE: "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
}


class Seconds(NamedTuple):
    """Wall-clock and CPU seconds of one run."""

    wall: float
    cpu: float


def environment() -> pathlib.Path:
    """Return the Python of the environment with PyTorch; make the environment if needed."""
    python = HERE / ".venv" / "bin" / "python"
    done = HERE / ".venv" / "installed"
    if not done.exists():
        venv.create(HERE / ".venv", with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
        done.touch()
    return python


class Worker:
    """A process that times its runs on request."""

    def __init__(self, *command: str, vectors: str = "native"):
        self._process = subprocess.Popen(
            command,
            cwd=HERE.parents[1],
            env={**os.environ, **VECTORS[vectors]},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        line = self._process.stdout.readline()
        if not line.startswith("ready"):
            raise RuntimeError(f"the worker {' '.join(command)} did not start; its error is above")
        _, self.versions, *self.runs = line.rstrip("\n").split("\t")

    def seconds(self, run: str) -> Seconds:
        self._process.stdin.write(f"{run}\n")
        self._process.stdin.flush()
        return Seconds(*map(float, self._process.stdout.readline().split()))

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def medians(workers: dict[str, Worker], repeats: int) -> dict[tuple[str, str], Seconds]:
    """Return the median seconds of each (side, run). All of them run in turns."""
    taken = {(side, run): [] for side, worker in workers.items() for run in worker.runs}
    for _ in range(repeats):
        for side, run in taken:
            taken[side, run].append(workers[side].seconds(run))
    return {
        key: Seconds(*map(statistics.median, zip(*each, strict=True)))
        for key, each in taken.items()
    }


def compare(model: str, args: argparse.Namespace) -> tuple[str, list[tuple[str, ...]]]:
    """Return the versions of the other side, and the lines of the table for one model."""
    theirs = (str(HERE / "theirs.py"), model, str(args.cores), *args.trained)
    workers = {
        "ours": Worker(
            sys.executable, "-m", "benchmarks.peft.ours", model, *args.trained, vectors=args.vectors
        ),
        "theirs": Worker(str(args.python), *theirs, vectors=args.vectors),
    }
    found = medians(workers, args.repeats)
    for worker in workers.values():
        worker.close()
    lines = []
    for run in args.trained:
        mine = found["ours", run]
        both = {a: found["theirs", f"{run}/{a}"] for a in ("eager", "sdpa")}
        attention = min(both, key=lambda a: both[a].wall)
        other = both[attention]
        numbers = (
            *(f"{mine.wall:.3f}", f"{other.wall:.3f} ({attention})"),
            *(f"{mine.wall / other.wall:.2f}", f"{mine.cpu:.3f}", f"{other.cpu:.3f}"),
            f"{mine.cpu / other.cpu:.2f}",
        )
        lines.append((common.SETUPS[model]().name, run, *numbers))
    return workers["theirs"].versions, lines


def main() -> None:
    parser = argparse.ArgumentParser(description="A training step: lora_jax / torch + PEFT.")
    parser.add_argument("--models", nargs="+", choices=common.SETUPS, default=list(common.SETUPS))
    parser.add_argument("--trained", nargs="+", default=list(TRAINED), help="or full")
    parser.add_argument("--vectors", choices=VECTORS, default="native")
    parser.add_argument("--cores", type=int, default=2, help="cores that both sides may use")
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--python", type=pathlib.Path, help="a Python with torch and peft")
    args = parser.parse_args()
    args.python = args.python or environment()
    if sys.platform == "linux":
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    versions, lines = "", []
    for model in args.models:
        versions, more = compare(model, args)
        lines += more
    said = f"{common.hardware(versions)}; vectors: {args.vectors}; {commands.load()}"
    print(said, end="\n\n")
    header = ("model", "trained", "lora_jax, s", "torch + PEFT, s", "ours / theirs")
    print(common.table((*header, "CPU s", "theirs", "ours / theirs"), lines))


if __name__ == "__main__":
    main()
