"""The worker of lora_jax for `generation.py`: greedy generation, as by `lora-jax generate`."""

import sys

import flax
import jax
import numpy as np

from benchmarks.peft.narrow import narrow
from benchmarks.peft.worker import digest, prompts, serve
from lora_jax import models
from lora_jax.serving.generation import Decoder
from lora_jax.serving.jobs import Prompt


def main() -> None:
    narrow()
    folder, length, new, _, *rows = sys.argv[1:]
    source = models.open(folder)
    params, room = source.load(source.config), int(length) + int(new)
    decoders = {
        int(count): Decoder(source.config, params, rows=int(count), capacity=room) for count in rows
    }

    def run(count: int, tokens: int) -> np.ndarray:
        asked = [Prompt(row) for row in prompts(count, int(length))]
        pieces = list(decoders[count].read(decoders[count].submit(asked, tokens)))
        written = np.array([piece.token for piece in pieces]).reshape(tokens, count)
        return written.T

    runs = {
        f"{count} {tokens} -": lambda count=int(count), tokens=tokens: run(count, tokens)
        for count in rows
        for tokens in (1, int(new))
    }
    wrote = digest(run(int(count), int(new)) for count in rows)
    serve(runs, f"JAX {jax.__version__}, Flax {flax.__version__}; wrote {wrote}")


if __name__ == "__main__":
    main()
