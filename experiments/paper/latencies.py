"""The contents of latency.json, and their section of the report."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import statistics
from collections.abc import Sequence

from experiments.paper import measurement_file
from experiments.paper.forward import BASE, HOULSBY, LIN, MERGED, METHODS, UNMERGED
from experiments.paper.published import LATENCY, Latency
from lora_jax.errors import LoraError
from lora_jax.report import formatting, svg
from lora_jax.report.document import Figure, Panel, Paragraph, Section, Table
from measuring import timing

FILE = "latency.json"
NAMES = {
    BASE: "base",
    MERGED: "LoRA, merged",
    UNMERGED: "LoRA, not merged",
    LIN: "Adapter^L",
    HOULSBY: "Adapter^H",
}
_PAPER = {BASE: "lora", MERGED: "lora", LIN: "lin", HOULSBY: "houlsby"}  # Table 1's rows
_TITLE = "Table 1: the time of one forward pass"
_COMMAND = "python -m experiments.paper.latency --out {}"


@dataclasses.dataclass(frozen=True)
class Timed:
    """The measurements of one method at one shape.

    added: the number of parameters that the method adds.
    added_whole: the same for all 24 layers.
    seconds: the time of each repeat.
    flops: the FLOPs of one pass.
    instructions: the number of instructions of the program.
    """

    method: str
    added: int
    added_whole: int
    seconds: tuple[float, ...]
    flops: float
    instructions: int

    @property
    def median(self) -> float:
        """The median time in seconds."""
        return statistics.median(self.seconds)

    @property
    def deviation(self) -> float:
        """The standard deviation in seconds; NaN for a single repeat."""
        return statistics.stdev(self.seconds) if len(self.seconds) > 1 else math.nan


@dataclasses.dataclass(frozen=True)
class Timings:
    """The measurements of all methods at one shape of the batch.

    Raises:
      LoraError: a method is missing.
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
        """The measurements of the base, with which the others are compared."""
        return self.runs[0]


@dataclasses.dataclass(frozen=True)
class Latencies:
    """The contents of latency.json.

    layers: the number of layers of the measured model; the full model has `whole_layers`.
    merged_is_base: whether merged LoRA compiles to the program of the base at every shape.
    seconds: the duration of all measurements.

    Raises:
      LoraError: `merged_is_base` is False.
    """

    machine: timing.Machine
    layers: int
    whole_layers: int
    merged_is_base: bool
    seconds: float
    shapes: tuple[Timings, ...]

    def __post_init__(self) -> None:
        if not self.merged_is_base:
            raise LoraError("merged_is_base is False, and only True is ever written")


def sections(folder: pathlib.Path) -> Sequence[Section]:
    """Return the section about latency.json in `folder`, or none if there is no such file."""
    file = folder / FILE
    command = _COMMAND.format(file)
    found = measurement_file.read(file, Latencies, command)
    if found is None:
        return ()
    return (Section(_TITLE, (*_texts(found), _figure(found), table(found))),)


def _texts(found: Latencies) -> tuple[Paragraph, ...]:
    base, whole = found.shapes[0].base, found.whole_layers
    layers = f"{found.layers} of the {whole}" if found.layers != whole else f"all {whole}"
    return (
        Paragraph(
            f"The model is a BERT encoder of GPT-2 medium's shape: it has the same products, "
            f"biases and norms, but no causal mask. It has {layers} layers, random weights, and no "
            f"product with the vocabulary. It ran on {found.machine.line()}, in "
            f"{found.seconds:,.0f} seconds. The paper measured GPT-2 medium on a Quadro RTX8000. "
            "Programs are compiled separately and run in turns; times are medians with standard "
            "deviations."
        ),
        Paragraph(
            "LoRA has rank 4 on query and value. Merged, it compiles to the program of the base at "
            f"every shape, compared line by line ({base.instructions:,} HLO instructions at "
            f"{found.shapes[0].batch} x {found.shapes[0].length}), so the difference of the times "
            "is the noise of the measurement. The width of the adapter layers is chosen to give "
            f"the paper's number of parameters in {found.whole_layers} layers."
        ),
    )


def table(found: Latencies) -> Table:
    """Return the table with a row for each shape and method."""
    rows = [_row(at, one) for at in found.shapes for one in at.runs]
    whole = f"of {found.whole_layers} layers"
    names = ("batch x length", "method", "numbers added", whole, "ms", "over the base")
    return Table(
        "Milliseconds of one forward pass, ours and the paper's, which has one row for merged LoRA "
        "and the base. FLOPs are counted by XLA.",
        (*names, "FLOPs over the base", "paper: ms", "paper: over the base"),
        tuple(rows),
        ("batch x length", "method"),
    )


def _row(at: Timings, one: Timed) -> tuple[str, ...]:
    theirs = _published(at, one.method)
    return (
        f"{at.batch} x {at.length}",
        NAMES[one.method],
        f"{one.added:,}",
        f"{one.added_whole / 1e6:.2f}M",
        _spread(1e3 * one.median, 1e3 * one.deviation),
        _over(one.median / at.base.median),
        _over(one.flops / at.base.flops, 2),
        formatting.NONE if theirs is None else _spread(*theirs),
        _over(_paper_over(at, one.method)),
    )


def _published(at: Timings, method: str) -> Latency | None:
    """Return the paper's time, or None if it has none."""
    return LATENCY.get((at.batch, at.length), {}).get(_PAPER.get(method, ""))


def _spread(middle: float, deviation: float) -> str:
    """Format milliseconds.

    >>> _spread(1449.4, 0.8), _spread(1449.4, math.nan)
    ('1,449.4 ± 0.8', '1,449.4')
    """
    return f"{middle:,.1f}" + (f" ± {deviation:,.1f}" if math.isfinite(deviation) else "")


def _over(ratio: float, decimals: int = 1) -> str:
    """Format a ratio as its excess over one in per cent; NaN becomes "-".

    >>> _over(1482.0 / 1449.4), _over(1.0), _over(math.nan)
    ('+2.2%', '+0.0%', '-')
    """
    return f"{100 * (ratio - 1):+.{decimals}f}%" if math.isfinite(ratio) else formatting.NONE


def _paper_over(at: Timings, method: str) -> float:
    """Return the paper's time divided by that of its base; NaN if it has none."""
    theirs, base = _published(at, method), _published(at, BASE)
    return math.nan if theirs is None or base is None else theirs.milliseconds / base.milliseconds


def _figure(found: Latencies) -> Figure:
    """Draw the excess over the base in per cent: our bar for each method, and the paper's mark."""
    methods = METHODS[1:]
    width = 0.8 / len(methods)
    said = []
    with svg.drawing() as (drawing, axis):
        for number, method in enumerate(methods):
            places = [
                x + (number - (len(methods) - 1) / 2) * width for x in range(len(found.shapes))
            ]
            ours, errors, theirs = zip(*(_percents(at, method) for at in found.shapes), strict=True)
            color = f"C{number}"
            axis.bar(
                places, ours, 0.9 * width, yerr=errors, color=color, ecolor=svg.INK, capsize=2,
                error_kw={"alpha": 0.6}, label=NAMES[method],
            )  # fmt: skip
            axis.plot(places, theirs, "D", color=color, markeredgecolor=svg.INK, markersize=5)
            said.append(f"{NAMES[method]} {', '.join(f'{x:+.1f}%' for x in ours)}")
        axis.plot(
            [], [], "D", color="none", markeredgecolor=svg.INK, markersize=5, label="the paper's"
        )
        axis.axhline(0, color=svg.INK, alpha=0.6, linewidth=0.8)
        shapes = [f"{at.batch} x {at.length}" for at in found.shapes]
        axis.set_xticks(range(len(shapes)), shapes)
        axis.set(xlabel="batch x length", ylabel="time over the base, %")
        axis.grid(axis="y")
        drawing.legend(loc="outside lower center", ncols=3)
    text = f"Time over the base at {', '.join(shapes)}: {'; '.join(said)}"
    caption = "Time of one forward pass over the base, in per cent; diamonds are the paper's."
    return Figure(caption, (Panel("latency", text, drawing),))


def _percents(at: Timings, method: str) -> tuple[float, float, float]:
    """Return our excess over the base, its deviation, and the paper's excess or NaN."""
    one = next(run for run in at.runs if run.method == method)
    base, paper = at.base.median, _paper_over(at, method)
    return 100 * (one.median / base - 1), 100 * one.deviation / base, 100 * (paper - 1)
