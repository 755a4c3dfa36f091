"""SmolLM2 trained on definitions over its base as floats, as its own Q4_1, as NF4 and as int8.

Command:   python -m benchmarks.quantised --seeds 3
Hardware:  2 CPU cores, 3 GB; about 7 minutes of two quiet cores for each of the 12 runs
Result:    held-out loss per token before and after, bytes of the frozen weights, peak memory

Each run is `python train.py --config configs/smollm2_definitions.py` in a process of its own, so
the peak is that run's alone. The float base is the dequantised Q4_1, the same numbers: the two
losses must agree to 1e-3.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
BASES = ("none", "stored", "nf4", "int8")


def main() -> None:
    """Run every base with every seed and print a table."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--bases", nargs="+", default=BASES, choices=BASES)
    options = parser.parse_args()
    print("base     seed  before   after  base MB  peak MB  s/step")
    for base in options.bases:
        losses = []
        for seed in range(options.seeds):
            found = one(base, seed, options.steps)
            before, after = (found[when]["test"]["loss"] for when in ("before", "after"))
            losses.append(after)
            sizes = (found["base_bytes_per_device"] / 1e6, found["peak_memory_bytes"] / 1e6)
            print(
                f"{base:8} {seed:4d} {before:7.4f} {after:7.4f} {sizes[0]:8.1f} {sizes[1]:8.0f}"
                f" {1 / found['steps_per_second']:7.2f}",
                flush=True,
            )
        print(f"{base:8} mean          {statistics.mean(losses):7.4f}", flush=True)


def one(base: str, seed: int, steps: int) -> Any:
    """The summary of one run."""
    config = ROOT / "configs" / "smollm2_definitions.py"
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(config)]
    command += ["--model.quantize", base, "--seed", str(seed), "--steps", str(steps)]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        (summary,) = pathlib.Path(folder).rglob("summary.json")
        return json.loads(summary.read_text())


if __name__ == "__main__":
    main()
