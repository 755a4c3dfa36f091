"""Measure memory, checkpoint and time of a step: LoRA against full fine-tuning (section 4.2).

    python -m experiments.paper.benefits --out runs/paper/benefits/benefits.json
    python -m experiments.paper.benefits --out benefits.json --models minilm --steps 10

It measures two models with their real shapes and random weights: MiniLM with two classes at 32 x 48
tokens, and SmolLM2 as a language model at 8 x 48. LoRA has rank 4 on query and value, as GPT-3 in
the paper. A step is the step of train.py: gradient, norm, AdamW, with a donated state. Both sides
are compiled separately and take their steps in turns in one process.

memory      memory of the compiled step as XLA reports it: parameters, optimizer, batch, temporaries
checkpoint  size on disk of the trained parameters, as train.py exports them
speed       tokens of a batch divided by the median seconds of a step

Exit status: 0 done, 1 an error that was printed, 2 a command line that cannot be read, 130 stopped
by Ctrl-C.
"""

from __future__ import annotations

import dataclasses
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any, Literal

import tyro
from rich.console import Console

import lora_jax
from experiments.paper import measurement_file, trained
from experiments.paper.published import CHECKPOINT, MEMORY, SPEED, Benefit
from experiments.paper.trained import CASES, SIDES, Case, StepBytes
from lora_jax.errors import LoraError
from lora_jax.report import render
from lora_jax.report.document import Paragraph, Section, Table
from lora_jax.system.console import guarded, say
from lora_jax.training.sizes import in_units
from measuring import timing

FILE = "benefits.json"
_TITLE = "Practical benefits: memory, checkpoint and speed"
_COMMAND = "python -m experiments.paper.benefits --out {}"


@dataclasses.dataclass(frozen=True)
class MeasuredSide:
    """The measurements of one side, LoRA or full fine-tuning.

    trained: the number of trained parameters.
    checkpoint: their bytes on disk.
    seconds: the time of each step.
    """

    side: str
    trained: int
    memory: StepBytes
    checkpoint: int
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median time of a step in seconds."""
        return statistics.median(self.seconds)


@dataclasses.dataclass(frozen=True)
class Compared:
    """Both sides of one model.

    parameters: the number of parameters of the model, without LoRA's factors.

    Raises:
      LoraError: a side is missing.
    """

    model: str
    rows: int
    length: int
    parameters: int
    sides: tuple[MeasuredSide, ...]

    def __post_init__(self) -> None:
        found = tuple(one.side for one in self.sides)
        if found != SIDES:
            raise LoraError(f"sides are {found}, expected {SIDES}")

    def speed(self, one: MeasuredSide) -> float:
        """Return the tokens per second of a side."""
        return self.rows * self.length / one.median


@dataclasses.dataclass(frozen=True)
class Benefits:
    """The contents of benefits.json. `seconds` is the duration of all measurements."""

    machine: timing.Machine
    seconds: float
    models: tuple[Compared, ...]


@dataclasses.dataclass(frozen=True)
class BenefitsOptions:
    """The options of `python -m experiments.paper.benefits`."""

    out: str
    """The JSON file to write."""
    models: tuple[Literal["minilm", "smollm2"], ...] = ("minilm", "smollm2")
    """The models to measure."""
    steps: int = 30
    """Timed steps of each side."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `python -m experiments.paper.benefits`, and return its exit status."""
    options = tyro.cli(
        BenefitsOptions,
        prog="python -m experiments.paper.benefits",
        description=__doc__,
        args=arguments,
    )
    return guarded(lambda: run(options, Console(stderr=True)))


def run(options: BenefitsOptions, console: Console) -> None:
    """Measure, write the file, and print the tables to stdout and the progress to `console`."""
    if options.steps < 1 or not options.models:
        raise LoraError("--steps and the number of --models must be at least 1")
    out = measurement_file.prepared(options.out)
    start = time.monotonic()
    found = tuple(measure(CASES[name], options.steps, console) for name in options.models)
    result = Benefits(timing.machine(), round(time.monotonic() - start, 1), found)
    measurement_file.write(out, result)
    shown = map(render.markdown_table, (_ratios(result), _memory(result)))
    say(Console(), "\n\n".join((result.machine.line(), *shown)))


def measure(case: Case, steps: int, console: Console) -> Compared:
    """Compile both sides of one model, and measure their memory, checkpoints and times."""
    say(console, f"{case.name} {case.rows} x {case.length}: {steps} steps of each side")
    made = {name: make() for name, make in trained.sides(case).items()}
    memory = {name: trained.memory(side) for name, side in made.items()}
    counts = {name: lora_jax.count(side.state.trained) for name, side in made.items()}
    runs = {name: trained.stepping(side) for name, side in made.items()}
    with measurement_file.bar(console, case.name, len(runs) * (steps + 1)) as ran:
        seconds = timing.timings(runs, steps, ran)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder)
        sizes = {
            name: trained.written(side, runs[name](), path, name) for name, side in made.items()
        }
    parts = tuple(
        MeasuredSide(name, counts[name], memory[name], sizes[name], tuple(seconds[name]))
        for name in SIDES
    )
    return Compared(case.name, case.rows, case.length, counts["full"], parts)


def sections(folder: pathlib.Path) -> Sequence[Section]:
    """Return the section about benefits.json in `folder`, or none if there is no such file."""
    file = folder / FILE
    command = _COMMAND.format(file)
    found = measurement_file.read(file, Benefits, command)
    if found is None:
        return ()
    return (Section(_TITLE, (*_texts(found), _ratios(found), _memory(found))),)


def _texts(found: Benefits) -> tuple[Paragraph, ...]:
    steps = len(found.models[0].sides[0].seconds)
    saved = 1 - SPEED.full / SPEED.lora
    return (
        Paragraph(
            "This compares the training step of train.py with random weights. LoRA has rank 4 on "
            "query and value and trains the head of a classifier; full fine-tuning trains all "
            f"parameters. Times are medians of {steps} steps, taken in turns in one process, on "
            f"{found.machine.line()}, in {found.seconds:,.0f} seconds. Checkpoints are exported as "
            "train.py does and measured on disk."
        ),
        Paragraph(
            "The paper's 350 GB are two bytes for each parameter and leave out activations, which "
            "are included here. Its tokens per second are for one V100, and the 25% of its "
            f"footnote 5 are time saved: 1 - {SPEED.full} / {SPEED.lora} is {saved:.1%}."
        ),
    )


def _ratios(found: Benefits) -> Table:
    rows = []
    for model in found.models:
        full, lora = model.sides
        name = f"{model.model} {model.rows} x {model.length}"
        memory = Benefit(full.memory.total, lora.memory.total)
        disk = Benefit(full.checkpoint, lora.checkpoint)
        speed = Benefit(model.speed(full), model.speed(lora))
        rows += [
            _row(name, "memory of a step", memory, MEMORY, in_units),
            _row(name, "checkpoint on disk", disk, CHECKPOINT, in_units),
            _row(name, "tokens/s", speed, SPEED, lambda value: f"{value:,.1f}"),
        ]
    return Table(
        "LoRA and full fine-tuning, ours and GPT-3 175B in the paper.",
        (
            *("model", "measured", "full", "LoRA", "LoRA / full"),
            *("paper: full", "paper: LoRA", "paper: LoRA / full"),
        ),
        tuple(rows),
        ("model", "measured"),
    )


def _row(name: str, what: str, ours: Benefit, theirs: Benefit, text: Any) -> tuple[str, ...]:
    sides = [[text(b.full), text(b.lora), _ratio(b)] for b in (ours, theirs)]
    return (name, what, *sides[0], *sides[1])


def _ratio(found: Benefit) -> str:
    """
    >>> _ratio(MEMORY), _ratio(CHECKPOINT), _ratio(SPEED)
    ('0.292', '0.000100', '1.33')
    """
    return f"{found.lora / found.full:#.3g}"


def _memory(found: Benefits) -> Table:
    rows = []
    for model in found.models:
        for one in model.sides:
            memory = one.memory
            parts = (memory.weights, memory.optimizer, memory.gradients, memory.rest, memory.total)
            side = "LoRA" if one.side == "lora" else one.side
            share = f"{one.trained / model.parameters:.2%}"
            rows.append((model.model, side, f"{one.trained:,}", share, *map(in_units, parts)))
    return Table(
        "The memory of a step by use; the rest includes activations.",
        (
            *("model", "side", "trained", "of all", "weights", "optimizer", "gradients", "rest"),
            "in all",
        ),
        tuple(rows),
        ("model", "side"),
    )


if __name__ == "__main__":
    sys.exit(main())
