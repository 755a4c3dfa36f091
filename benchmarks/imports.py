"""Time `import lora_jax` after `import jax, numpy`, each repeat in its own process.

Command:   python -m benchmarks.imports
Hardware:  any CPU, half a minute
Result:    the ratio of (jax, numpy and lora_jax) to (jax and numpy), which should be at most 1.15
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

REPEATS = 15
PROGRAM = """
import time
start = time.perf_counter()
import jax, numpy
theirs = time.perf_counter()
import lora_jax
print(theirs - start, time.perf_counter() - theirs)
"""


def main() -> None:
    argparse.ArgumentParser(description="Time of import lora_jax.").parse_args()
    """Print the medians and the median of the ratios."""
    rows = []
    for _ in range(REPEATS + 1):
        command = [sys.executable, "-c", PROGRAM]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        rows.append([float(x) for x in done.stdout.split()])
    rows = rows[1:]  # the first process reads the files from disk
    theirs, ours = (statistics.median(column) for column in zip(*rows, strict=True))
    ratio = statistics.median((a + b) / a for a, b in rows)
    print(f"jax, numpy: {theirs:.3f} s   lora_jax: {ours:.3f} s   together / alone: {ratio:.3f}")


if __name__ == "__main__":
    main()
