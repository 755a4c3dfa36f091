"""What the paper claims, in its numbers and in ours."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterator, Sequence

from lora_jax.paper import methods, published
from lora_jax.paper.matrices import label
from lora_jax.paper.settings import Setting, settings, there
from lora_jax.report import digits
from lora_jax.report.document import Fact, Section, Table, Text

Row = tuple[str, str, str]  # claim, the paper's number, ours

_ALL = ("query", "key", "value", "output")


def section(runs: pathlib.Path) -> Section:
    """As much as can be said of the experiments in the folders of `runs`."""
    rows = [
        *_matrices(settings(there(runs / "matrices"))),
        *_ranks(settings(there(runs / "rank"))),
        *_examples(settings(there(runs / "samples"))),
    ]
    return Section(
        "The paper's claims, in numbers",
        (
            Text(
                "Differences are in points of test accuracy, and ± is the standard error of a "
                "difference of two means over seeds. The paper's models are a thousand times as "
                "large and its tasks are others: what can be compared is the sign, and whether a "
                "difference is larger than what seeds alone do."
            ),
            Table(
                "What the paper found, GPT-3 175B, and what was found here.",
                ("difference", "paper", "ours"),
                tuple(rows),
                ("difference", "paper", "ours"),
            ),
        ),
    )


def difference(one: Setting, two: Setting, split: str = "test") -> str:
    """One less two, in the unit of their scores, and its standard error."""
    found = methods.difference(one.shown(split), two.shown(split))
    if not math.isfinite(found.value):
        return digits.NONE
    decimals = one.unit.decimals
    plus = f" ± {found.error:.{decimals}f}" if math.isfinite(found.error) else ""
    return f"{found.value:+.{decimals}f}{plus}"


def _matrices(found: Sequence[Setting]) -> Iterator[Row]:
    ours = {label(setting): setting for setting in found}
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


def _ranks(found: Sequence[Setting]) -> Iterator[Row]:
    # Of two with one rank the one with the smaller alpha: the paper has one alpha for all ranks.
    alphas = sorted(found, key=lambda setting: -setting.config["lora.alpha"])
    ours = {(label(setting), setting.config["lora.rank"]): setting for setting in alphas}
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


def _examples(found: Sequence[Setting]) -> Iterator[Row]:
    ours = {
        (setting.config["method.name"], setting.config["data.train_limit"]): setting
        for setting in found
    }
    paper = published.SAMPLES
    for limit in (100, 1_000):
        if ("lora", limit) in ours and ("full", limit) in ours:
            its = paper["lora"][limit] - paper["full"][limit]
            yield (
                f"LoRA over full fine-tuning, {limit:,} examples",
                f"{its:+.1f} MNLI",
                difference(ours["lora", limit], ours["full", limit]),
            )


def facts(runs: pathlib.Path) -> list[Fact]:
    """The numbers that one comes for, as far as they are there."""
    found = []
    ours = {label(setting): setting for setting in settings(there(runs / "matrices"))}
    if "q+v" in ours:
        best = max(ours.values(), key=lambda setting: setting.mean("validation"))
        note = f"best on validation: {label(best)}, {best.text('test')}"
        found.append(Fact("q and v, test accuracy", f"{ours['q+v'].text('test')} %", note))
    by_rank = {
        setting.config["lora.rank"]: setting
        for setting in sorted(
            settings(there(runs / "rank")), key=lambda setting: -setting.config["lora.alpha"]
        )
        if label(setting) == "q+v"
    }
    if 1 in by_rank and 64 in by_rank:
        apart = difference(by_rank[64], by_rank[1])
        note = "test accuracy on q and v; the paper's: +0.1 on WikiSQL and on MNLI"
        found.append(Fact("rank 64 over rank 1", f"{apart} points", note))
    return found
