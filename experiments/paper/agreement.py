"""Compare the paper's claims in numbers with our results."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence

from experiments.paper import published
from experiments.paper.experiments import Claim, Claims
from experiments.paper.matrices import label
from experiments.paper.settings import Setting, settings, there
from experiments.shared import spreads
from lora_jax.report import formatting
from lora_jax.report.document import Fact, Paragraph, Section, Table

_ALL = ("query", "key", "value", "output")


def section(rows: Sequence[Claim]) -> Section:
    """Return the section that compares the claims of all experiments."""
    return Section(
        "The paper's claims, in numbers",
        (
            Paragraph(
                "Differences are in points of test accuracy, and ± is the standard error of a "
                "difference of two means over seeds. The paper's models are a thousand times "
                "larger, and its tasks are different. Only two things can be compared: the sign of "
                "a difference, and whether it is larger than the differences between seeds."
            ),
            Table(
                "Differences that the paper found with GPT-3 175B, and ours.",
                ("difference", "paper", "ours"),
                tuple(rows),
                ("difference", "paper", "ours"),
            ),
        ),
    )


def difference(one: Setting, two: Setting, split: str = "test") -> str:
    """Format score one minus score two, in the unit of their scores, with its standard error."""
    found = spreads.difference(one.shown(split), two.shown(split))
    if not math.isfinite(found.value):
        return formatting.NONE
    decimals = one.unit.decimals
    plus = f" ± {found.error:.{decimals}f}" if math.isfinite(found.error) else ""
    return f"{found.value:+.{decimals}f}{plus}"


def of_matrices(folder: pathlib.Path) -> Claims:
    """Return the claims of Table 5, and the result of the paper's choice as a fact."""
    ours = {label(setting): setting for setting in settings(there(folder))}
    facts = []
    if "q+v" in ours:
        best = max(ours.values(), key=lambda setting: setting.mean("validation"))
        note = f"best on validation: {label(best)}, {best.text('test')}"
        facts.append(Fact("q and v, test accuracy", f"{ours['q+v'].text('test')} %", note))
    return tuple(_matrices(ours)), facts


def of_ranks(folder: pathlib.Path) -> Claims:
    """Return the claims of Table 6, and the largest rank against the smallest as a fact."""
    # If a rank is there twice, take the smaller alpha: the paper has one alpha for all ranks.
    found = sorted(settings(there(folder)), key=lambda setting: -setting.config["lora.alpha"])
    ours = {(label(setting), setting.config["lora.rank"]): setting for setting in found}
    facts = []
    if ("q+v", 1) in ours and ("q+v", 64) in ours:
        apart = difference(ours["q+v", 64], ours["q+v", 1])
        note = "test accuracy on q and v; the paper's: +0.1 on WikiSQL and on MNLI"
        facts.append(Fact("rank 64 over rank 1", f"{apart} points", note))
    return tuple(_ranks(ours)), facts


def of_samples(folder: pathlib.Path) -> Claims:
    """Return the claims of Table 16."""
    return tuple(_examples(settings(there(folder)))), ()


def _matrices(ours: Mapping[str, Setting]) -> Iterator[Claim]:
    paper = published.MATRICES
    pairs = (
        ("q+v", ("query", "value"), "q", ("query",)),
        ("q+v", ("query", "value"), "q+k", ("query", "key")),
        ("q+k+v+o", _ALL, "q+v", ("query", "value")),
        ("v", ("value",), "q", ("query",)),
    )
    for one, its, two, others in pairs:
        if one in ours and two in ours:
            yield (
                f"{one} over {two}, one budget",
                _two(paper[its], paper[others]),
                difference(ours[one], ours[two]),
            )


def _ranks(ours: Mapping[tuple[str, int], Setting]) -> Iterator[Claim]:
    for one, two in ((1, 8), (64, 8)):
        for name, its in (("q", ("query",)), ("q+v", ("query", "value")), ("q+k+v+o", _ALL)):
            if (name, one) in ours and (name, two) in ours:
                paper = published.RANKS[its]
                yield (
                    f"rank {one} over rank {two}, on {name}",
                    _two(paper[one], paper[two]),
                    difference(ours[name, one], ours[name, two]),
                )


def _two(one: tuple[float, float], two: tuple[float, float]) -> str:
    return f"{one[0] - two[0]:+.1f} WikiSQL, {one[1] - two[1]:+.1f} MNLI"


def _examples(found: Sequence[Setting]) -> Iterator[Claim]:
    ours = {
        (setting.config["method.name"], setting.config["data.train_limit"]): setting
        for setting in found
    }
    paper = published.SAMPLES
    # The whole training split of MNLI has 392,000 examples.
    for limit, count, name in ((100, 100, "100"), (1_000, 1_000, "1,000"), (None, 392_000, "all")):
        if ("lora", limit) in ours and ("full", limit) in ours:
            its = paper["lora"][count] - paper["full"][count]
            yield (
                f"LoRA over full fine-tuning, {name} examples",
                f"{its:+.1f} MNLI",
                difference(ours["lora", limit], ours["full", limit]),
            )
