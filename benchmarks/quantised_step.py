"""Measure the gradient of adapters of a quantised base: arguments, temporaries, and time.

Command:   python -m benchmarks.quantised_step
Hardware:  any, a minute; on a CPU quantisation saves memory, not time
Result:    a table with one line for each way to write eight layers and each form of their weights

The temporaries of a quantised base must be as large as with a float base, plus about one layer's
float weight.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

import lora_jax

LAYERS, SIZE, ROWS, REPEATS = 8, 1024, 512, 9


def unrolled(params: Any, x: Any) -> Any:
    for w in params["w"]:
        x = jnp.tanh(x @ w)
    return x


def scanned(params: Any, x: Any) -> Any:
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]


def main() -> None:
    argparse.ArgumentParser(description="Gradients over quantised bases.").parse_args()
    """Print the table; the forms of a program take turns, so that noise affects all of them."""
    print(jax.devices()[0].device_kind, "JAX", jax.__version__)
    w = jax.random.normal(jax.random.key(0), (LAYERS, SIZE, SIZE)) / SIZE**0.5
    x = jnp.ones((ROWS, SIZE))
    print(f"{LAYERS} layers of {SIZE} x {SIZE} ({4e-6 * SIZE**2:.1f} MB each), {ROWS} rows")
    print("program    base   arguments MB  temporaries MB  median ms")
    for name, f, params in (("unrolled", unrolled, list(w)), ("scanned", scanned, w)):
        for line in _measured(name, f, {"w": params}, x):
            print(line)


def _measured(name: str, f: Any, params: Any, x: Any) -> list[str]:
    targets = "w/*" if name == "unrolled" else "w"
    layout = lora_jax.resolve(lora_jax.LoraSpec(8, targets=targets), f, params, x)
    adapters = lora_jax.init(jax.random.key(1), layout)
    g = lora_jax.adapt(layout, f)
    step = jax.jit(jax.grad(lambda adapters, base, x: (g(base, adapters, x) ** 2).sum()))
    bases = {"float": params}
    bases |= {s: lora_jax.quantize(params, s, layout) for s in ("int8", "int4", "nf4")}
    programs = {s: step.lower(adapters, base, x).compile() for s, base in bases.items()}
    times: dict[str, list[float]] = {s: [] for s in bases}
    for _ in range(REPEATS + 1):
        for s, base in bases.items():
            start = time.perf_counter()
            jax.block_until_ready(programs[s](adapters, base, x))
            times[s].append(1e3 * (time.perf_counter() - start))
    lines = []
    for s, program in programs.items():
        memory: Any = program.memory_analysis()
        arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
        median = statistics.median(times[s][1:])
        lines.append(
            f"{name:10} {s:6} {arguments / 1e6:12.1f} {temporaries / 1e6:15.1f} {median:10.1f}"
        )
    return lines


if __name__ == "__main__":
    main()
