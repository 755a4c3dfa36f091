"""Time one forward pass: the base, LoRA merged and not merged, adapter layers (Table 1).

    python -m experiments.paper.latency --out runs/paper/latency/latency.json
    python -m experiments.paper.latency --out latency.json --layers 24 --shapes 1x128

The model has GPT-2 medium's shape. Of the built-in models the BERT encoder comes nearest to it: its
layers have the same products, biases, norms and GELU, and without token types it has exactly as
many parameters, 354,823,168. It differs in two ways that cost almost no FLOPs: norms come after the
residual instead of before it, and there is no causal mask on the scores. The product with the
vocabulary is left out, because it is the same for every method, and in a model of few layers it
would hide the cost of a layer. On a CPU the default is two of the 24 layers. Every method adds its
cost per layer, so relative numbers hold for 24 layers as well. Weights are random.

All programs are compiled separately and run in turns in one process. If merged LoRA does not
compile to exactly the program of the base, that is an error.

Exit status: 0 done, 1 an error that was printed, 2 a command line that cannot be read, 130 stopped
by Ctrl-C.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import tyro
from rich.console import Console

from experiments.paper import forward, measurement_file
from experiments.paper.forward import Sizes
from experiments.paper.latencies import Latencies, Timed, Timings, table
from experiments.paper.latencies import sections as sections
from experiments.paper.published import LATENCY_MILLIONS
from lora_jax import models
from lora_jax.errors import LoraError
from lora_jax.report import render
from lora_jax.system.console import guarded, say
from measuring import timing
from measuring.published_models import MEDIUM

_LAYERS = 2  # on a CPU
_TRIALS = 100  # as in the paper
_LEAST, _TOKENS = 3, 40_000  # on a CPU: the fewest repeats, and the tokens of all repeats together
# Rank 4 on query and value; the widths are the nearest to 0.5M and 11M parameters in 24 layers.
SMALL, LARGE = Sizes(4, lin=9, houlsby=5), Sizes(4, lin=224, houlsby=112)


@dataclasses.dataclass(frozen=True)
class LatencyOptions:
    """The options of `python -m experiments.paper.latency`."""

    out: str
    """The JSON file to write."""
    layers: int | None = None
    """Layers of the model. None: 2 on a CPU, all 24 on other devices."""
    repeats: int | None = None
    """Timed passes of each method. None: 100; on a CPU enough for 40,000 tokens, but at least 3."""
    shapes: tuple[str, ...] = ("32x512", "16x256", "1x128")
    """Shapes of the batch: batch x length."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `python -m experiments.paper.latency`, and return its exit status."""
    options = tyro.cli(
        LatencyOptions,
        prog="python -m experiments.paper.latency",
        description=__doc__,
        args=arguments,
    )
    return guarded(lambda: run(options, Console(stderr=True)))


def run(options: LatencyOptions, console: Console) -> None:
    """Measure, write the file, and print the table to stdout and the progress to `console`."""
    on_cpu = jax.default_backend() == "cpu"
    layers = _LAYERS if on_cpu else MEDIUM.num_layers
    if options.layers is not None:
        layers = options.layers
    if min(layers, 1 if options.repeats is None else options.repeats, len(options.shapes)) < 1:
        raise LoraError("--layers, --repeats and the number of --shapes must be at least 1")
    shapes = [_shape(text) for text in options.shapes]
    out = measurement_file.prepared(options.out)
    config = dataclasses.replace(MEDIUM, num_layers=layers)
    start = time.monotonic()
    found = []
    for batch, length in shapes:
        many = max(_LEAST, min(_TRIALS, _TOKENS // (batch * length))) if on_cpu else _TRIALS
        sizes = SMALL if LATENCY_MILLIONS.get((batch, length), 11.0) < 1 else LARGE
        found.append(measure(config, sizes, batch, length, options.repeats or many, console))
    whole = MEDIUM.num_layers
    taken = round(time.monotonic() - start, 1)
    result = Latencies(timing.machine(), layers, whole, True, taken, tuple(found))
    measurement_file.write(out, result)
    say(Console(), f"{result.machine.line()}\n\n{render.markdown_table(table(result))}")


def _shape(text: str) -> tuple[int, int]:
    """Read a shape such as `32x512`."""
    batch, _, length = text.partition("x")
    if not (batch.isdecimal() and length.isdecimal() and int(batch) and int(length)):
        raise LoraError(f"--shapes {text!r}: expected batch x length, such as 32x512")
    if int(length) > MEDIUM.max_positions:
        raise LoraError(f"--shapes {text!r}: the model has {MEDIUM.max_positions} positions")
    return int(batch), int(length)


def measure(
    config: models.BertConfig,
    sizes: Sizes,
    batch: int,
    length: int,
    repeats: int,
    console: Console,
    whole: int = MEDIUM.num_layers,
) -> Timings:
    """Compile and time all methods at one shape."""
    say(console, f"{batch} x {length}: {config.num_layers} layers, {repeats} repeats")
    made = forward.variants(config, sizes)
    programs = {name: forward.compiled(one, batch, length) for name, one in made.items()}
    forward.check_merged(programs)
    ids = jax.random.randint(
        jax.random.key(0), (batch, length), 0, config.vocab_size, dtype=jnp.int32
    )
    runs = {name: functools.partial(programs[name], one.weights, ids) for name, one in made.items()}
    with measurement_file.bar(console, f"{batch} x {length}", len(runs) * (repeats + 1)) as ran:
        seconds = timing.timings(runs, repeats, ran)
    added = forward.added(config, sizes)
    wholly = forward.added(dataclasses.replace(config, num_layers=whole), sizes)
    return Timings(
        batch,
        length,
        tuple(
            Timed(
                method=name,
                added=added[name],
                added_whole=wholly[name],
                seconds=tuple(seconds[name]),
                flops=forward.flops(program),
                instructions=forward.instructions(program),
            )
            for name, program in programs.items()
        ),
    )


if __name__ == "__main__":
    sys.exit(main())
