"""Time the tracing of a gradient with 224 adapted weights, and compare it with the plain gradient.

    python -m benchmarks.trace

The model is a decoder of 32 unrolled layers with 7 adapted weights each. Plain is the gradient of
the loss with respect to all parameters, adapted the gradient with respect to the adapters; both are
traced from shapes by `jax.jit(...).trace`. JAX's caches are cleared before each trace, as in a new
process: this is the time that a user waits once, before compilation.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

import lora_jax
from benchmarks import common


def seconds(f: Callable[..., Any], *shapes: Any) -> float:
    """Return the seconds of one trace of `jit(f)` with empty caches."""
    jax.clear_caches()
    start = time.perf_counter()
    jax.jit(f).trace(*shapes)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description="Time of tracing the gradient: adapted / plain.")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    config = dataclasses.replace(common.SMOLLM2, num_layers=args.layers)
    setup = common.smollm2(config=config)
    layout = setup.layout(lora_jax.LoraSpec(rank=8, alpha=16.0, targets="layers_*/**/kernel"))
    adapters = common.adapter_shapes(layout)
    plain, adapted = [], []
    for _ in range(args.repeats + 1):
        plain.append(seconds(common.full_gradient(setup), setup.shapes, setup.batch))
        gradient = common.lora_gradient(setup, layout)
        adapted.append(seconds(gradient, adapters, setup.shapes, setup.batch))
    # The first pair is dropped, because it includes imports and first uses.
    before, after = statistics.median(plain[1:]), statistics.median(adapted[1:])
    print(common.hardware(), end="\n\n")
    header = ("adapted weights", "plain, s", "adapted, s", "adapted / plain")
    row = (f"{len(layout.targets)}", f"{before:.3f}", f"{after:.3f}", f"{after / before:.2f}")
    print(common.table(header, [row]))


if __name__ == "__main__":
    main()
