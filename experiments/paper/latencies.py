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
        return statistics.stdev(self.seconds) if len(self.seconds) > 1 else math.nan


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
    merged_is_base: whether merged LoRA is the base's own program at every shape.
    seconds: that the measuring took.

    Raises:
      LoraError: it is not.
    """

    machine: timing.Machine
    layers: int
    whole_layers: int
    merged_is_base: bool
    seconds: float
    shapes: tuple[Timings, ...]

    def __post_init__(self) -> None:
        if not self.merged_is_base:
            raise LoraError("merged_is_base is False, and nothing else can be written")


def sections(folder: pathlib.Path) -> Sequence[Section]:
    """What latency.json in `folder` says; nothing where there is none.

    Raises:
      LoraError: it is damaged.
    """
    file = folder / FILE
    command = _COMMAND.format(file)
    found = measurement_file.read(file, Latencies, command)
    if found is None:
        return ()
    return (Section(_TITLE, (*_texts(found), _figure(found), table(found))),)


def _texts(found: Latencies) -> tuple[Paragraph, ...]:
    base, whole = found.shapes[0].base, found.whole_layers
    layers = f"{found.layers} of its {whole}" if found.layers != whole else f"all {whole}"
    return (
        Paragraph(
            f"A BERT encoder of GPT-2 medium's shape (the same products, biases and norms, and no "
            f"causal mask), {layers} layers and no product with the vocabulary, random weights; on "
            f"{found.machine.line()}, in {found.seconds:,.0f} seconds. The paper's are of GPT-2 "
            "medium on a Quadro RTX8000. Programs are compiled apart and run in turns; times are "
            "medians and standard deviations."
        ),
        Paragraph(
            "LoRA has rank 4 on query and value. Merged it is the base's own program at every "
            f"shape, compared line by line ({base.instructions:,} HLO instructions at "
            f"{found.shapes[0].batch} x {found.shapes[0].length}), so what its time differs by is "
            "the noise of the measurement. The adapter layers are as wide as it takes to have the "
            f"paper's number of parameters in {found.whole_layers} layers."
        ),
    )


def table(found: Latencies) -> Table:
    """A row for each shape and method."""
    rows = [_row(at, one) for at in found.shapes for one in at.runs]
    whole = f"of {found.whole_layers} layers"
    names = ("batch x length", "method", "numbers added", whole, "ms", "over the base")
    return Table(
        "Milliseconds of one forward pass, ours and the paper's; LoRA merged and the base are one "
        "row there. FLOPs are XLA's count.",
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
    """The paper's time, or None where it has none."""
    return LATENCY.get((at.batch, at.length), {}).get(_PAPER.get(method, ""))


def _spread(middle: float, deviation: float) -> str:
    """Milliseconds.

    >>> _spread(1449.4, 0.8), _spread(1449.4, math.nan)
    ('1,449.4 ± 0.8', '1,449.4')
    """
    return f"{middle:,.1f}" + (f" ± {deviation:,.1f}" if math.isfinite(deviation) else "")


def _over(ratio: float, decimals: int = 1) -> str:
    """A ratio as what it is above one; NaN is none.

    >>> _over(1482.0 / 1449.4), _over(1.0), _over(math.nan)
    ('+2.2%', '+0.0%', '-')
    """
    return f"{100 * (ratio - 1):+.{decimals}f}%" if math.isfinite(ratio) else formatting.NONE


def _paper_over(at: Timings, method: str) -> float:
    """The paper's time over that of its base; NaN where it has none."""
    theirs, base = _published(at, method), _published(at, BASE)
    return math.nan if theirs is None or base is None else theirs.milliseconds / base.milliseconds


def _figure(found: Latencies) -> Figure:
    """Per cent over the base: a bar for each method, the paper's as a mark on it."""
    methods = METHODS[1:]
    width = 0.8 / len(methods)
    said = []
    with svg.style():
        drawing, axis = svg.new()
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
    caption = "Time of one forward pass over the base's, in per cent; diamonds are the paper's."
    return Figure(caption, (Panel("latency", text, drawing),))


def _percents(at: Timings, method: str) -> tuple[float, float, float]:
    """Ours over the base, its standard deviation, and the paper's; NaN where there is none."""
    one = next(run for run in at.runs if run.method == method)
    base, paper = at.base.median, _paper_over(at, method)
    return 100 * (one.median / base - 1), 100 * one.deviation / base, 100 * (paper - 1)
