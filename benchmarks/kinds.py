"""Time one training step with each kind of update, and compare it with LoRA's.

    python -m benchmarks.kinds

All kinds have the same rank and targets, the same model, loss and optimizer, and take turns in one
process; the numbers are medians. The ratios are relative to the first kind. DoRA may take 1.25
times LoRA's time (PEFT's takes 1.26 to 2).
"""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

import lora_jax
from benchmarks import common
from benchmarks.step_time import stepping

KINDS = ("lora", "dora", "vera", "loha", "lokr")
BOUND = {"dora": 1.25}


def steps(
    setup: common.ModelSetup, layouts: dict[str, lora_jax.Layout]
) -> dict[str, Callable[[], Any]]:
    """Return the compiled training steps of each kind; each keeps its own state."""
    params, batch = setup.arrays()
    runs = {}
    for kind, layout in layouts.items():
        adapters = lora_jax.init(jax.random.key(1), layout, params=params)
        runs[kind] = stepping(common.lora_gradient(setup, layout), adapters, params, batch)
    return runs


def rows(
    setup: common.ModelSetup, kinds: Sequence[str], rank: int, repeats: int
) -> list[tuple[str, ...]]:
    """Return the lines of the table for one model."""
    lines: list[tuple[str, ...]] = []
    for name, spec in setup.specs().items():
        layouts = {
            kind: setup.layout(dataclasses.replace(spec, kind=kind, rank=rank)) for kind in kinds
        }
        seconds = common.interleaved(steps(setup, layouts), repeats)
        for kind, taken in seconds.items():
            ratio = taken / seconds[kinds[0]]
            held = "" if kind not in BOUND else "yes" if ratio <= BOUND[kind] else "NO"
            cells = (f"{layouts[kind].size:,}", f"{taken:.3f}", f"{ratio:.3f}", held)
            lines.append((setup.name, name, kind, *cells))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="Step time: each kind of update over LoRA.")
    parser.add_argument("--models", nargs="+", choices=common.SETUPS, default=list(common.SETUPS))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    lines = [
        line
        for name in args.models
        for line in rows(common.SETUPS[name](), args.kinds, args.rank, args.repeats)
    ]
    print(common.hardware(), end="\n\n")
    heading = ("model", "targets", "kind", "trained", "s", "/ first", "within the bound")
    print(common.table(heading, lines))


if __name__ == "__main__":
    main()
