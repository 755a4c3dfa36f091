"""The worker of lora_jax for `compare.py`: the training steps of `benchmarks.step_time`."""

import sys

import flax
import jax

from benchmarks import common, step_time
from benchmarks.peft.narrow import narrow
from benchmarks.peft.worker import serve


def main() -> None:
    narrow()
    model, *wanted = sys.argv[1:]
    steps = step_time.steps(common.SETUPS[model](), wanted)
    serve(steps, f"JAX {jax.__version__}, Flax {flax.__version__}")


if __name__ == "__main__":
    main()
