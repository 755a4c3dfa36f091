"""Our side of the comparison: gradients through `lora_jax.adapt`, see `benchmarks.step_time`."""

import sys

import flax
import jax

from benchmarks import common, step_time
from benchmarks.peft.worker import serve


def main() -> None:
    gradients = step_time.gradients(common.SETUPS[sys.argv[1]]())
    runs = {name: lambda run=run: jax.block_until_ready(run()) for name, run in gradients.items()}
    serve(runs, f"JAX {jax.__version__}, Flax {flax.__version__}")


if __name__ == "__main__":
    main()
