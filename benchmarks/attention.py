"""Compare attention in blocks of queries with attention in one piece, on a CPU.

    python -m benchmarks.attention

One row of 1,024 to 8,192 tokens, with the heads of SmolLM2 (9 of width 64, 3 for keys and values),
causal, in float32. Each side is the forward pass with the gradient of queries, keys and values,
compiled in one process, and the two take turns. The table has medians of seconds by the clock and
of CPU seconds, and the temporaries that XLA allocates.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import commands, common
from lora_jax.models import attention, sight

HEADS, SHARED, WIDTH = 9, 3, 64
LENGTHS = (1024, 2048, 4096, 8192)


def compiled(length: int, form: Callable[..., Any]) -> tuple[Callable[[], Any], int]:
    """Return a function that attends once, with its gradient, and the bytes of its temporaries."""
    keys = jax.random.split(jax.random.key(0), 3)
    sizes = (HEADS, SHARED, SHARED)
    arrays = [
        jax.random.normal(key, (1, length, heads, WIDTH))
        for key, heads in zip(keys, sizes, strict=True)
    ]

    def loss(query: Any, key: Any, value: Any) -> jax.Array:
        seen = sight.visible(length, causal=True)
        return jnp.square(form(query, key, value, seen, scale=WIDTH**-0.5, cap=None)).sum()

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).lower(*arrays).compile()
    memory: Any = step.memory_analysis()
    return functools.partial(step, *arrays), memory.temp_size_in_bytes


def measure(length: int, repeats: int) -> tuple[str, ...]:
    """Return a line of the table."""
    sides = {
        name: compiled(length, form)
        for name, form in (("whole", attention._whole), ("blocks", attention._by_blocks))
    }
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(repeats + 1):
        for name, (run, _) in sides.items():
            wall, cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(run())
            taken[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    median = {
        name: [statistics.median(column) for column in zip(*times[1:], strict=True)]
        for name, times in taken.items()
    }
    whole, blocks = median["whole"], median["blocks"]
    return (
        f"{length:,}",
        *(f"{seconds:.3f}" for seconds in (whole[0], blocks[0])),
        f"{blocks[0] / whole[0]:.2f}",
        *(f"{seconds:.3f}" for seconds in (whole[1], blocks[1])),
        f"{blocks[1] / whole[1]:.2f}",
        *(f"{bytes_ / 1e6:,.0f}" for _, bytes_ in sides.values()),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Attention in blocks and in one piece, on a CPU.")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    asked = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    header = ["tokens", "whole, s", "blocks, s", "blocks / whole", "whole, CPU s", "blocks, CPU s"]
    header += ["of CPU s", "whole, MB", "blocks, MB"]
    rows = [measure(length, asked.repeats) for length in asked.lengths]
    print(f"{common.hardware()}; {commands.load()}\n")
    print(common.table(header, rows))


if __name__ == "__main__":
    main()
