"""Train SmolLM2 on definitions with its base as floats, as its own Q4_1, as NF4 and as int8.

Command:   python -m benchmarks.quantised
Hardware:  2 CPU cores, 3 GB; about 7 minutes of two quiet cores for each of the 12 runs
Result:    held-out loss per token before and after, bytes of the frozen weights, peak memory

Each run is `python train.py --config configs/smollm2_definitions.py` in its own process, so the
peak is that of one run. The float base is the dequantised Q4_1, with the same numbers. The two are
trained separately, and rounding differences grow in 150 steps of Adam. So one trained adapter is
also evaluated on both bases, where the losses must agree to 1e-3.
"""

import argparse
import pathlib
import statistics

import jax

import lora_jax
from benchmarks import common, runs
from lora_jax.cli import train as command_line
from lora_jax.training import evaluation, mesh, step
from lora_jax.training.config import Config

CONFIG = "configs/smollm2_definitions.py"
BASES = ("none", "stored", "nf4", "int8")


def main() -> None:
    parser = argparse.ArgumentParser(description="SmolLM2 with its base in four forms.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--bases", nargs="+", default=BASES, choices=BASES)
    parser.add_argument("--runs", type=pathlib.Path, default=runs.ROOT / "runs" / "quantised")
    options = parser.parse_args()
    rows = []
    for base in options.bases:
        found = [
            runs.summary(
                ["--config", CONFIG, "--model.quantize", base]
                + ["--seed", str(seed), "--steps", str(options.steps)],
                options.runs / f"{base}-{seed}",
            )
            for seed in options.seeds
        ]
        losses = [run["after"]["test"]["loss"] for run in found]
        rows.append(
            (
                base,
                f"{found[0]['before']['test']['loss']:.5f}",
                " ".join(f"{loss:.5f}" for loss in losses),
                f"{statistics.mean(losses):.5f}",
                f"{found[0]['base_bytes_per_device'] / 1e6:.1f}",
                " ".join(f"{run['peak_memory_bytes'] / 1e9:.2f}" for run in found),
            )
        )
    print(f"\n{common.hardware()}\n")
    for base in ("none", "stored") if "stored" in options.bases else ():
        folder = options.runs / f"stored-{options.seeds[0]}" / "adapters" / "best"
        print(
            f"the adapter {folder}, test loss over the base {base}: {test_loss(base, folder):.7f}"
        )
    seeds = f"after, seeds {options.seeds}"
    print(common.table(("base", "before", seeds, "mean", "base MB", "peak GB"), rows))


def test_loss(base: str, folder: pathlib.Path) -> float:
    """Return the test loss of a saved adapter on SmolLM2's base in one of its forms."""
    config = command_line.parse(["--model.quantize", base], CONFIG, runs.ROOT)[1]
    assert isinstance(config, Config)
    grid = mesh.make(config.mesh)
    with jax.set_mesh(grid):
        workload, shard = config.workload(config), mesh.shard_of(grid)
        place = mesh.place(workload, config.mesh, grid, next(workload.train(shard)))
        params = workload.arrays(place.params)
        adapter = lora_jax.restore(folder)
        trained = {"adapters": adapter.parameters, "base": adapter.trainable}
        loss = jax.jit(step.evaluation_step(workload, adapter.layout))
        return evaluation.evaluate(
            lambda batch: loss(trained, params, batch),
            workload,
            place,
            workload.evaluation["test"](shard),
        )[0]["loss"]


if __name__ == "__main__":
    main()
