"""The time of one forward pass: the base, LoRA merged and not, adapter layers (Table 1).

    python -m lora_jax.paper.latency --out runs/paper/latency/latency.json
    python -m lora_jax.paper.latency --out latency.json --layers 24 --shapes 1x128

The model has GPT-2 medium's shape. Of the built-in ones the BERT encoder is what comes nearest: its
layer has the same products, biases, norms and GELU, and with no token types it has the very number
of parameters, 354,823,168. It differs in two ways that cost no FLOPs to speak of: norms come after
the residual and not before, and no causal mask is laid over the scores. The product with the
vocabulary is left out: it is the same whatever the method, and in a model of few layers it would
hide what is per layer. On a CPU two of the 24 layers are the default; what the methods add is per
layer too, so relative numbers carry over. Weights are random.

All programs are compiled apart and run in turns in one process. Merged LoRA is compared with the
base: if its compiled program is not the base's own, to the letter, that is an error.

Exit status: 0 done, 1 an error that was printed, 2 a command line that cannot be read, 130 stopped
by Ctrl-C.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from rich.console import Console

from lora_jax import models
from lora_jax.errors import LoraError
from lora_jax.paper import forward, measured, tables
from lora_jax.paper.forward import BASE, HOULSBY, LIN, MERGED, METHODS, UNMERGED, Sizes
from lora_jax.paper.published import LATENCY, LATENCY_MILLIONS
from lora_jax.paper.shapes import MEDIUM
from lora_jax.report import digits, ink
from lora_jax.report.document import Figure, Note, Panel, Section, Table, Text
from lora_jax.serving import screen

FILE = "latency.json"
_TITLE = "Table 1: the time of one forward pass"
_COMMAND = "python -m lora_jax.paper.latency --out {}"
_LAYERS = 2  # on a CPU
_TRIALS = 100  # the paper's
_LEAST, _TOKENS = 3, 40_000  # on a CPU: repeats, and tokens of all repeats together
# Rank 4 on query and value; the widths that come nearest to 0.5M and 11M numbers in 24 layers.
SMALL, LARGE = Sizes(4, lin=9, houlsby=5), Sizes(4, lin=224, houlsby=112)
NAMES = {
    BASE: "base",
    MERGED: "LoRA, merged",
    UNMERGED: "LoRA, not merged",
    LIN: "Adapter^L",
    HOULSBY: "Adapter^H",
}
_PAPER = {BASE: "lora", MERGED: "lora", LIN: "lin", HOULSBY: "houlsby"}  # Table 1's rows


@dataclasses.dataclass(frozen=True)
class Timed:
    """One method at one shape.

    added: numbers beside the weights. added_whole: those of all 24 layers.
    seconds: of each repeat.
    flops: of one pass. instructions: of its program.
    """

    method: str
    added: int
    added_whole: int
    seconds: tuple[float, ...]
    flops: float
    instructions: int

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    @property
    def deviation(self) -> float:
        """Seconds; NaN for a single repeat."""
        return statistics.stdev(self.seconds) if len(self.seconds) > 1 else float("nan")


@dataclasses.dataclass(frozen=True)
class Timings:
    """All methods at one shape of the batch.

    Raises:
      LoraError: some method is missing.
    """

    batch: int
    length: int
    runs: tuple[Timed, ...]

    def __post_init__(self) -> None:
        found = tuple(run.method for run in self.runs)
        if found != METHODS:
            raise LoraError(f"runs are {found}, expected {METHODS}")

    @property
    def base(self) -> Timed:
        """What the others are compared with."""
        return self.runs[0]


@dataclasses.dataclass(frozen=True)
class Latencies:
    """What latency.json holds.

    layers: that the model had; a whole one has `whole_layers`.
    merged_is_base: at every shape; nothing is written where it is not.
    seconds: that the measuring took.
    """

    machine: measured.Machine
    layers: int
    whole_layers: int
    merged_is_base: bool
    seconds: float
    shapes: tuple[Timings, ...]


@dataclasses.dataclass(frozen=True)
class Options:
    """The command line."""

    out: str
    """The JSON file to write."""
    layers: int | None = None
    """Of the model. None: 2 on a CPU, and all 24 elsewhere."""
    repeats: int | None = None
    """Timed passes of each method. None: 100; on a CPU as many as have 40,000 tokens, from 3 on."""
    shapes: tuple[str, ...] = ("32x512", "16x256", "1x128")
    """Batch x length."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    options = tyro.cli(
        Options, prog="python -m lora_jax.paper.latency", description=__doc__, args=arguments
    )
    return screen.guarded(lambda: run(options, Console(stderr=True)))


def run(options: Options, console: Console) -> None:
    """Measure and write; the table goes to stdout, progress to `console`.

    Raises:
      LoraError, OSError: a user's error.
    """
    shapes = [_shape(text) for text in options.shapes]
    on_cpu = jax.default_backend() == "cpu"
    layers = options.layers or (_LAYERS if on_cpu else MEDIUM.num_layers)
    if layers < 1 or (options.repeats or 1) < 1 or not shapes:
        raise LoraError("--layers, --repeats and the number of --shapes must be at least 1")
    out = measured.prepared(options.out)
    config = dataclasses.replace(MEDIUM, num_layers=layers)
    start = time.monotonic()
    found = []
    for batch, length in shapes:
        many = max(_LEAST, min(_TRIALS, _TOKENS // (batch * length))) if on_cpu else _TRIALS
        sizes = SMALL if LATENCY_MILLIONS.get((batch, length), 11.0) < 1 else LARGE
        found.append(measure(config, sizes, batch, length, options.repeats or many, console))
    whole = MEDIUM.num_layers
    taken = round(time.monotonic() - start, 1)
    result = Latencies(measured.machine(), layers, whole, True, taken, tuple(found))
    measured.write(out, result)
    screen.say(Console(), f"{result.machine.line()}\n\n{tables.plain(table(result))}")


def _shape(text: str) -> tuple[int, int]:
    """`32x512` as its numbers."""
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
    """Compile and time all methods at one shape.

    Args:
      whole: layers of the whole model.

    Raises:
      LoraError: merged LoRA is not the base's own program.
    """
    screen.say(console, f"{batch} x {length}: {config.num_layers} layers, {repeats} repeats")
    made = forward.variants(config, sizes)
    programs = {name: forward.compiled(one, batch, length) for name, one in made.items()}
    forward.check_merged(programs)
    ids = jax.random.randint(
        jax.random.key(0), (batch, length), 0, config.vocab_size, dtype=jnp.int32
    )
    runs = {name: functools.partial(programs[name], one.weights, ids) for name, one in made.items()}
    with measured.bar(console, f"{batch} x {length}", len(runs) * (repeats + 1)) as ran:
        seconds = measured.timings(runs, repeats, ran)
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


def sections(folder: pathlib.Path) -> Sequence[Section]:
    """What latency.json in `folder` says; a note with the command where there is none.

    Raises:
      LoraError: it is damaged.
    """
    file = folder / FILE
    command = _COMMAND.format(file)
    found = measured.read(file, Latencies, command)
    if found is None:
        return (Section(_TITLE, (Note(f"Not measured yet: {command}"),)),)
    return (Section(_TITLE, (*_texts(found), _figure(found), table(found))),)


def _texts(found: Latencies) -> tuple[Text, ...]:
    base, whole = found.shapes[0].base, found.whole_layers
    layers = f"{found.layers} of its {whole}" if found.layers != whole else f"all {whole}"
    return (
        Text(
            f"A BERT encoder of GPT-2 medium's shape (the same products, biases and norms, and no "
            f"causal mask), {layers} layers and no product with the vocabulary, random weights; on "
            f"{found.machine.line()}, in {found.seconds:,.0f} seconds. The paper's are of GPT-2 "
            "medium on a Quadro RTX8000. Programs are compiled apart and run in turns; times are "
            "medians and standard deviations."
        ),
        Text(
            "LoRA has rank 4 on query and value. Merged it is the base's own program at every "
            f"shape, compared line by line ({base.instructions:,} HLO instructions at "
            f"{found.shapes[0].batch} x {found.shapes[0].length}), so what its time differs by is "
            "the noise of the measurement. The adapter layers are as wide as it takes to have the "
            "paper's number of parameters in 24 layers."
        ),
    )


def table(found: Latencies) -> Table:
    """A row for each shape and method."""
    rows = [_row(at, one) for at in found.shapes for one in at.runs]
    names = ("batch x length", "method", "numbers added", "of 24 layers", "ms", "over the base")
    return Table(
        "Milliseconds of one forward pass, ours and the paper's; LoRA merged and the base are one "
        "row there. FLOPs are XLA's count.",
        (*names, "FLOPs over the base", "paper: ms", "paper: over the base"),
        tuple(rows),
        ("batch x length", "method"),
    )


def _row(at: Timings, one: Timed) -> tuple[str, ...]:
    theirs, of_base = (_published(at, method) for method in (one.method, BASE))
    there = theirs is not None and of_base is not None
    return (
        f"{at.batch} x {at.length}",
        NAMES[one.method],
        f"{one.added:,}",
        f"{one.added_whole / 1e6:.2f}M",
        _spread(1e3 * one.median, 1e3 * one.deviation),
        _over(one.median, at.base.median),
        _over(one.flops, at.base.flops, 2),
        _spread(theirs.milliseconds, theirs.deviation) if there else digits.NONE,
        _over(theirs.milliseconds, of_base.milliseconds) if there else digits.NONE,
    )


def _published(at: Timings, method: str) -> Any:
    """The paper's time, or None where it has none."""
    return LATENCY.get((at.batch, at.length), {}).get(_PAPER.get(method, ""))


def _spread(middle: float, deviation: float) -> str:
    """
    >>> _spread(1449.4, 0.8), _spread(1449.4, float("nan"))
    ('1,449.4 ± 0.8', '1,449.4')
    """
    return f"{middle:,.1f}" + (f" ± {deviation:,.1f}" if deviation == deviation else "")


def _over(value: float, base: float, decimals: int = 1) -> str:
    """
    >>> _over(1482.0, 1449.4), _over(1.0, 1.0)
    ('+2.2%', '+0.0%')
    """
    return f"{100 * (value / base - 1):+.{decimals}f}%"


def _figure(found: Latencies) -> Figure:
    """Per cent over the base: a bar for each method, the paper's as a mark on it."""
    methods = METHODS[1:]
    width = 0.8 / len(methods)
    said = []
    with ink.style():
        drawing, axis = ink.new(7.2, 3.8)
        for number, method in enumerate(methods):
            places = [
                x + (number - (len(methods) - 1) / 2) * width for x in range(len(found.shapes))
            ]
            ours, errors, theirs = zip(*(_percents(at, method) for at in found.shapes), strict=True)
            color = f"C{number}"
            axis.bar(
                places, ours, 0.9 * width, yerr=errors, color=color, ecolor=ink.INK, capsize=2,
                error_kw={"alpha": 0.6}, label=NAMES[method],
            )  # fmt: skip
            axis.plot(
                places, theirs, "D", color=color, markeredgecolor=ink.INK, markersize=6,
                label="the paper's" if number == len(methods) - 1 else None,
            )  # fmt: skip
            said.append(f"{NAMES[method]} {', '.join(f'{x:+.1f}%' for x in ours)}")
        axis.axhline(0, color=ink.INK, alpha=0.6, linewidth=0.8)
        shapes = [f"{at.batch} x {at.length}" for at in found.shapes]
        axis.set_xticks(range(len(shapes)), shapes)
        axis.set(xlabel="batch x length", ylabel="time over the base, %")
        axis.grid(axis="y")
        drawing.legend(loc="outside lower center", ncols=5)
    text = f"Time over the base at {', '.join(shapes)}: {'; '.join(said)}"
    caption = "Time of one forward pass over the base's, in per cent; diamonds are the paper's."
    return Figure(caption, (Panel("latency", text, drawing),))


def _percents(at: Timings, method: str) -> tuple[float, float, float]:
    """Ours over the base, its standard deviation, and the paper's; NaN where there is none."""
    one = next(run for run in at.runs if run.method == method)
    theirs, of_base = _published(at, method), _published(at, BASE)
    paper = float("nan")
    if theirs is not None and of_base is not None:
        paper = 100 * (theirs.milliseconds / of_base.milliseconds - 1)
    base = at.base.median
    return 100 * (one.median / base - 1), 100 * one.deviation / base, paper


if __name__ == "__main__":
    sys.exit(main())
