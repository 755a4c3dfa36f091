"""Compare twenty steps of two real models on meshes of eight simulated devices with one device.

    python -m benchmarks.mesh

Each run is one command of `train.py`, which is printed. Losses are compared step by step. The bytes
of the base are on the device that holds the most.
"""

import argparse
import json
import os
import pathlib
import shlex
import subprocess
import sys
import tempfile

from benchmarks import common

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIGS = ("configs/minilm_reviews.py", "configs/smollm2_definitions.py")
MESHES = ((8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2))


def losses(
    config: str, mesh: tuple[int, int, int], folder: pathlib.Path, steps: int
) -> tuple[list[float], int]:
    """Return the loss of each step, and the bytes of the base on one device."""
    data, fsdp, tensor = map(str, mesh)
    command = [
        "train.py", "--config", config, "--run-dir", str(folder), "--steps", str(steps),
        "--evaluate-every", str(steps), "--data.eval-limit", "64", "--data.train-limit", "2000",
        "--mesh.data", data, "--mesh.fsdp", fsdp, "--mesh.tensor", tensor,
    ]  # fmt: skip
    devices = str(mesh[0] * mesh[1] * mesh[2])
    print(f"JAX_NUM_CPU_DEVICES={devices} python", shlex.join(command), flush=True)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": devices}
    subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL
    )
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    summary = json.loads((folder / "summary.json").read_text())
    return [x["loss"] for x in lines if "split" not in x], summary["base_bytes_per_device"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Losses on meshes of simulated devices.")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as place:
        for config in CONFIGS:
            name = pathlib.Path(config).stem
            folder = pathlib.Path(place) / name
            alone, whole = losses(config, (1, 1, 1), folder / "alone", args.steps)
            for mesh in MESHES:
                found, here = losses(config, mesh, folder / "-".join(map(str, mesh)), args.steps)
                pairs = zip(found, alone, strict=True)
                worst = max(abs(x - y) / abs(y) for x, y in pairs)
                share = here * mesh[1] * mesh[2] / whole
                rows.append((name, str(mesh), f"{worst:.1e}", f"{here / 1e6:.2f}", f"{share:.4f}"))
    print(f"\n{common.hardware()}\n")
    titles = ("config", "mesh", "largest relative gap of a loss", "base MB/device", "of the ideal")
    print(common.table(titles, rows))


if __name__ == "__main__":
    main()
