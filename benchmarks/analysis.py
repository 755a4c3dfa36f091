"""Time the analysis of a 7B-shaped model's q and v: 32 layers of 4,096 x 4,096, r=64 and r=8.

    python -m benchmarks.analysis                     similarity and spectra
    python -m benchmarks.analysis --layers 2 --weights    also analyses of W, on fewer layers

The factors are random. A random W is the worst case: a Gaussian matrix has no gap between its
singular values, and its largest ones take longest to find.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks import common
from lora_jax import Adapter, Factors, Layout, Target, analysis, init_from_base


def adapter(rank: int, layers: int, width: int) -> Adapter:
    """Return an adapter of every layer's q and v without any zeros."""
    rng = np.random.default_rng(rank)
    targets = tuple(
        Target(f"layers_{i}/attention/{name}/kernel", (width, width), (), (0,), (1,), rank, 16.0)
        for i in range(layers)
        for name in ("q", "v")
    )
    normal = rng.standard_normal
    adapters = {
        t.path: Factors(normal(t.a_shape, np.float32), 1e-3 * normal(t.b_shape, np.float32))
        for t in targets
    }
    return Adapter(Layout(targets), adapters)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time of the analysis of a 7B-shaped model.")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--weights", action="store_true", help="also time analyses of a random W")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    small, large = (adapter(rank, args.layers, args.width) for rank in (8, 64))
    runs: dict[str, Callable[[], Any]] = {
        "phi of a, r=8 against r=64": lambda: analysis.similarity(small, large),
        "phi of the updates' input side": lambda: analysis.similarity(small, large, "input"),
        "spectra, r=64": lambda: analysis.spectrum(large.layout, large.parameters),
    }
    if args.weights:
        keys = jax.random.split(jax.random.key(0), 2 * args.layers)
        shape = (args.width, args.width)
        params = {
            t.path: np.asarray(jax.random.normal(key, shape))
            for t, key in zip(large.layout.targets, keys, strict=True)
        }
        runs["amplification, r=8"] = lambda: analysis.amplification(
            small.layout, params, small.parameters
        )
        runs["amplification, r=64"] = lambda: analysis.amplification(
            large.layout, params, large.parameters
        )
        runs["PiSSA, r=8"] = lambda: init_from_base(small.layout, params)
    print(f"{common.hardware()}\n{2 * args.layers} matrices of {args.width} x {args.width}\n")
    lines = []
    for name, call in runs.items():
        seconds = []
        for _ in range(args.repeats):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        lines.append((name, f"{np.median(seconds):.2f}"))
    print(common.table(("", "s"), lines))


if __name__ == "__main__":
    main()
