"""Measure tokens per second of decoding, with one adapter in a batch, with many, and with none.

    python -m benchmarks.generate

The model is SmolLM2-135M with random weights, the adapters have rank 8 on q and v. "merged" is the
base alone, which is the same program as with an adapter in its weights. "one adapter" is the
ordinary program of `adapt` with one set of factors. The mixed programs take ids: the same adapter
in every row, or another one in each. It times the compiled step of decoding: one token for every
row, with a cache of --capacity slots, half full. All sides run in turns in one process, and the
numbers are medians.
"""

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax
from benchmarks import common
from lora_jax import models
from lora_jax.models import cache as caches

BATCHES = (1, 8, 32)


def runs(rows: int, capacity: int, params: Any, members: Any) -> dict[str, Callable[[], Any]]:
    """Return side -> a function that writes one token to each row; the cache is half full."""
    config = common.SMOLLM2
    model = models.DecoderModel(config)
    layout, stacked = lora_jax.multi.stack(members[:rows])
    tokens, slot = jnp.ones((rows, 1), jnp.int32), jnp.int32(capacity // 2)

    def read(params: Any, tokens: Any, cache: Any) -> Any:
        return model.apply({"params": params}, tokens, cache, method=model.decode)

    def side(call: Callable[..., Any], *chosen: Any) -> Callable[[], Any]:
        def step(cache: Any, params: Any, chosen: Any) -> Any:
            logits, new = call(params, *chosen, tokens, cache)
            found = jnp.argmax(logits[:, -1], axis=-1)
            return found, caches.written(cache, new, slot, after=found)

        cache = caches.empty(config, rows, capacity)
        half = jnp.where(jnp.arange(capacity) < capacity // 2, jnp.arange(capacity), -1)
        cache = cache._replace(positions=jnp.broadcast_to(half, (rows, capacity)))
        compiled = jax.jit(step, donate_argnums=0)

        def run() -> Any:
            nonlocal cache
            found, cache = compiled(cache, params, chosen)
            return found

        return run

    adapted = lora_jax.adapt(layout, read)

    def mixed(params: Any, stacked: Any, ids: Any, *rest: Any) -> Any:
        return adapted(params, lora_jax.multi.select(stacked, ids), *rest)

    return {
        "merged": side(read),
        "one adapter": side(lora_jax.adapt(members[0][0], read), members[0][1]),
        "mixed, all with one": side(mixed, stacked, np.zeros(rows, np.int32)),
        "mixed, each its own": side(mixed, stacked, np.arange(rows, dtype=np.int32)),
    }


def adapters(count: int) -> list[Any]:
    """Return random (layout, adapters) pairs."""
    setup = common.smollm2()
    spec = lora_jax.LoraSpec(8, 16.0, targets=setup.query_value)
    layout = setup.layout(spec)
    shapes = common.adapter_shapes(layout)
    return [(layout, common.normal(shapes, seed)) for seed in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Decoding: mixed batches / the merged model.")
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--capacity", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    params, members = common.normal(common.smollm2().shapes, 0), adapters(max(args.batches))
    lines = []
    for rows in args.batches:
        seconds = common.interleaved(runs(rows, args.capacity, params, members), args.repeats)
        for name, taken in seconds.items():
            ratio = f"{seconds['merged'] / taken:.3f}"
            lines.append((str(rows), name, f"{taken:.4f}", f"{rows / taken:,.1f}", ratio))
    print(common.hardware(), end="\n\n")
    print(common.table(("rows", "program", "s", "tokens/s", "of merged"), lines))


if __name__ == "__main__":
    main()
