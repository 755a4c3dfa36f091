"""Compare ranks (the paper's Tables 6 and 18)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from experiments.paper import published
from experiments.paper.matrices import label
from experiments.paper.settings import Setting, matrices
from experiments.shared import charts
from lora_jax.report import formatting
from lora_jax.report.document import Block, Figure, Panel, Table

RankScores = Mapping[tuple[str, ...], Mapping[int, tuple[float, float]]]


def blocks(found: Sequence[Setting], name: str) -> list[Block]:
    """Make a figure and a table of settings that differ in rank and matrices, if there are any.

    Accuracies are compared with Table 6, losses with Table 18.
    """
    if not found:
        return []
    unit = found[0].unit
    classified = unit.factor != 1.0
    ordered = sorted(
        found, key=lambda s: (len(matrices(s)), s.config["lora.rank"], -s.config["lora.alpha"])
    )
    scales = [_scale(setting) for setting in ordered]
    common = max(dict.fromkeys(scales), key=scales.count)
    rows = []
    for setting in ordered:
        rows.append(
            (
                label(setting),
                str(setting.config["lora.rank"]),
                f"{setting.config['lora.alpha']:g}",
                f"{setting.trained:,}",
                setting.text("validation"),
                setting.text("test"),
                str(len(setting.runs)),
                *_paper(setting, classified),
            )
        )
    theirs = ("WikiSQL", "MNLI") if classified else ("GPT-2 M loss", "GPT-2 M BLEU")
    columns = ("matrices", "r", "alpha", "trained", "validation", "test", "seeds")
    table = Table(
        f"Scores are {unit.label}: mean ± standard deviation over seeds.",
        (*columns, *(f"paper: {x}" for x in theirs)),
        tuple(rows),
        ("matrices",),
    )
    ours: dict[str, dict[int, Sequence[float]]] = {}
    for setting in ordered:
        other = "" if _scale(setting) == common else f", alpha {setting.config['lora.alpha']:g}"
        line = ours.setdefault(f"{label(setting)}{other}", {})
        line[setting.config["lora.rank"]] = setting.shown("test")
    paper_lines, what, unit_of_theirs = _theirs(classified)
    values = [v for line in ours.values() for each in line.values() for v in each]
    panels = (
        Panel(
            f"{name}-ours",
            f"Test {unit.label} over the rank, a line for each choice of matrices: "
            + formatting.span(values),
            charts.lines(ours, "rank r", unit.label, "test"),
        ),
        Panel(
            f"{name}-paper",
            f"{what} over the rank: "
            + formatting.span(
                v for line in paper_lines.values() for each in line.values() for v in each
            ),
            charts.lines(paper_lines, "rank r", unit_of_theirs, what),
        ),
    )
    caption = "Scores over the rank; bars are the standard deviation over seeds."
    return [Figure(caption, panels), table]


def _paper(setting: Setting, classified: bool) -> list[str]:
    """Return the paper's two scores at this rank on these matrices."""
    rank = setting.config["lora.rank"]
    if classified:
        found = published.RANKS.get(matrices(setting), {}).get(rank)
        return [formatting.NONE] * 2 if found is None else [f"{value:.1f}" for value in found]
    loss_and_bleu = published.GENERATION.get(rank)
    if loss_and_bleu is None:
        return [formatting.NONE] * 2
    loss, bleu = loss_and_bleu
    return [f"{loss:.2f}", f"{bleu:.1f}"]


def _scale(setting: Setting) -> float:
    return float(setting.config["lora.alpha"] / setting.config["lora.rank"])


def _theirs(classified: bool) -> tuple[dict[str, dict[int, tuple[float]]], str, str]:
    """Return the paper's lines, their description and their unit."""
    if classified:
        short = {1: "q", 2: "q+v", 4: "q+k+v+o"}
        lines = {
            short[len(names)]: {rank: (value[0],) for rank, value in line.items()}
            for names, line in published.RANKS.items()
        }
        return lines, "the paper: GPT-3, WikiSQL", "accuracy, %"
    line = {rank: (value[0],) for rank, value in published.GENERATION.items()}
    return {"validation loss": line}, "the paper: GPT-2 medium, E2E", "loss"
