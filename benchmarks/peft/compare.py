"""Seconds of one training step: lora_jax over PyTorch + Hugging Face PEFT, same shapes, same run.

    python -m benchmarks.peft.compare
    python -m benchmarks.peft.compare --vectors avx2

The first run makes an environment of its own (`benchmarks/peft/.venv`) with PyTorch,
`transformers` and PEFT: 1 GB, or several where pip picks the build of PyTorch that brings CUDA.
--python takes the interpreter of one that is there already. Two worker processes, one for each
side, hold the same model with the same losses (see `ours.py`, `theirs.py`); they are asked in
turns, on the same cores, while the other one waits. A step is the gradient, AdamW and the update.
Numbers are medians, theirs of the faster of their two attentions; CPU seconds are those of all
threads.

--vectors avx2 has both sides leave the wider vectors of this CPU alone, as on one without them
(`narrow.py`). That emulates such a CPU: its caches and its clock are this one's.
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

# What makes XLA, its YNNPACK, ATen, oneDNN and MKL take AVX2 alone. (MKL's sgemm takes it anyway
# on an AMD CPU.)
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
    """Seconds of one run, by the clock and of the CPU."""

    wall: float
    cpu: float


def environment() -> pathlib.Path:
    """The interpreter of their environment, made if it is not there."""
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
    """The median seconds of each (side, run), all of them taken in turns."""
    taken = {(side, run): [] for side, worker in workers.items() for run in worker.runs}
    for _ in range(repeats):
        for side, run in taken:
            taken[side, run].append(workers[side].seconds(run))
    return {
        key: Seconds(*map(statistics.median, zip(*each, strict=True)))
        for key, each in taken.items()
    }


def compare(model: str, args: argparse.Namespace) -> tuple[str, list[tuple[str, ...]]]:
    """Their versions, and the lines of the table for one model."""
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
    parser.add_argument("--python", type=pathlib.Path, help="with torch, transformers and peft")
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
