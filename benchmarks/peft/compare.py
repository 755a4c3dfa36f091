"""Time one gradient of lora_jax and of PyTorch + Hugging Face PEFT, with the same shapes.

    python -m benchmarks.peft.compare

The first run makes an environment (`benchmarks/peft/.venv`) with PyTorch, `transformers` and PEFT:
1 GB, or several if pip chooses a build of PyTorch with CUDA. Two worker processes, one for each
side, hold the same model with the same losses (see `ours.py`, `theirs.py`). They are asked in
turns, on the same cores, while the other one waits. The numbers are medians, for PyTorch with
the faster of two implementations of attention.
"""

import argparse
import os
import pathlib
import statistics
import subprocess
import sys
import venv

from benchmarks import common

HERE = pathlib.Path(__file__).resolve().parent
PACKAGES = ("torch", "transformers", "peft")


def environment() -> pathlib.Path:
    """Return the interpreter of their environment, which is made if it does not exist."""
    python = HERE / ".venv" / "bin" / "python"
    done = HERE / ".venv" / "installed"
    if not done.exists():
        venv.create(HERE / ".venv", with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
        done.touch()
    return python


class Worker:
    """A process that times its runs on request."""

    def __init__(self, *command: str):
        self._process = subprocess.Popen(
            command, cwd=HERE.parents[1], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        line = self._process.stdout.readline()
        if not line.startswith("ready"):
            raise RuntimeError(f"the worker {' '.join(command)} did not start; its error is above")
        _, self.versions, *self.runs = line.rstrip("\n").split("\t")

    def seconds(self, run: str) -> float:
        self._process.stdin.write(f"{run}\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def compare(model: str, cores: int, repeats: int) -> tuple[str, list[tuple[str, ...]]]:
    """Return their versions, and the lines of the table for one model."""
    ours = Worker(sys.executable, "-m", "benchmarks.peft.ours", model)
    theirs = Worker(str(environment()), str(HERE / "theirs.py"), model, str(cores))
    taken = {(w, run): [] for w in (ours, theirs) for run in w.runs}
    for _ in range(repeats):
        for worker, run in taken:
            taken[worker, run].append(worker.seconds(run))
    medians = {key: statistics.median(values) for key, values in taken.items()}
    ours.close()
    theirs.close()
    lines = []
    for run in ours.runs:
        mine = medians[ours, run]
        name, other = min(
            ((r, s) for (w, r), s in medians.items() if w is theirs and r.startswith(f"{run}/")),
            key=lambda pair: pair[1],
        )
        attention = name.split("/")[1]
        numbers = (f"{mine:.3f}", f"{other:.3f} ({attention})", f"{mine / other:.2f}")
        lines.append((common.SETUPS[model]().name, run, *numbers))
    return theirs.versions, lines


def main() -> None:
    parser = argparse.ArgumentParser(description="Gradient time: lora_jax / torch + PEFT.")
    parser.add_argument("--models", nargs="+", choices=common.SETUPS, default=list(common.SETUPS))
    parser.add_argument("--cores", type=int, default=2, help="cores that both sides may use")
    parser.add_argument("--repeats", type=int, default=11)
    args = parser.parse_args()
    environment()
    if sys.platform == "linux":
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    versions, lines = "", []
    for model in args.models:
        versions, more = compare(model, args.cores, args.repeats)
        lines += more
    print(common.hardware(versions), end="\n\n")
    header = ("model", "trained", "lora_jax, s", "torch + PEFT, s", "ours / theirs")
    print(common.table(header, lines))


if __name__ == "__main__":
    main()
