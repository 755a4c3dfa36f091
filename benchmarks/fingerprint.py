"""Time the fingerprint of a whole model, first with compilation and then without.

    python -m benchmarks.fingerprint

It measures `lora_jax.fingerprint` of all parameters of the built-in shapes, with random values. A
run computes it once, when it starts.
"""

import argparse
import time

import jax

import lora_jax
from benchmarks import common


def main() -> None:
    argparse.ArgumentParser(description="The fingerprint of a whole model.").parse_args()
    rows = []
    for name, setup in (("MiniLM", common.minilm()), ("SmolLM2", common.smollm2())):
        params = jax.block_until_ready(common.normal(setup.shapes, seed=0))
        seconds = []
        for _ in range(2):
            start = time.perf_counter()
            lora_jax.fingerprint(params)
            seconds.append(time.perf_counter() - start)
        count = f"{lora_jax.count(params) / 1e6:.1f}M"
        rows.append((name, count, f"{seconds[0]:.2f}", f"{seconds[1]:.2f}"))
    print(common.hardware(), end="\n\n")
    print(common.table(("model", "parameters", "first, s", "again, s"), rows))


if __name__ == "__main__":
    main()
