"""Analyse one adapter's update for a report: its spectrum, and the directions that it amplifies."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lora_jax import analysis
from lora_jax.checkpoint import adapter_path
from lora_jax.checkpoint.saved_adapter import SavedAdapter
from lora_jax.layout import Layout
from lora_jax.report import charts, formatting
from lora_jax.report.document import Block, Figure, Note, Panel, Paragraph, Section, Table
from lora_jax.report.module_index import Place, label, layers, matrices, places
from lora_jax.serving.base_choice import BaseChoice
from lora_jax.system.console import USER_ERRORS
from lora_jax.updates.kind import kind_of

_TITLE = "What the update is made of"
MOST = 24  # at most this many matrices are drawn: with more, their names cannot be read


def sections(run: pathlib.Path, base: BaseChoice) -> tuple[Section, ...]:
    """Analyse the best adapter of a run, or the last one if there is no best.

    Args:
      run: the run directory or the adapter's folder.
      base: the base model to open.

    Returns:
      The sections. If the adapter or its base cannot be opened, a note says so in its place.
    """
    try:
        _, folder = adapter_path.find(str(run))[0]
        layout, parameters = _matrices(SavedAdapter.open_lora(folder, run.name))
        found = analysis.spectrum(layout, parameters, _needed(layout, run, base))
    except USER_ERRORS as error:
        return (Section(_TITLE, (Note(f"The adapter cannot be analysed: {error}"),)),)
    if not layout.targets:
        return (Section(_TITLE, (Note("No matrix is adapted, so there is no update to show."),)),)
    there = places(layout)
    whose = Paragraph(
        f"This is the update of adapters/{folder.name} of {run.name}."
        if folder != run
        else f"This is the update of {run}."
    )
    spectra = Section(_TITLE, (whose, *_spectra(there, found, layout)))
    return spectra, Section("Amplified directions of W", _amplified(run, base))


def _matrices(member: SavedAdapter) -> tuple[Layout, dict[str, Any]]:
    """Return the adapter without its biases, which have no directions."""
    layout = Layout(tuple(t for t in member.layout.targets if t.inputs))
    return layout, {t.path: member.parameters[t.path] for t in layout.targets}


def _needed(layout: Layout, run: pathlib.Path, base: BaseChoice) -> Any:
    """Return the base parameters if the adapter's update depends on them (DoRA), else None."""
    rescales = any(kind_of(target).rescales for target in layout.targets)
    return base.open([str(run)], object).params if rescales else None


def _spectra(
    there: Sequence[Place], found: dict[str, analysis.Spectrum], layout: Layout
) -> tuple[Block, ...]:
    ours = [_at(found[place.path], place) for place in there]
    energy = sum(float(one.energy) for one in ours)
    columns = [
        [label(place.layer) for place in there],
        [place.matrix for place in there],
        [f"{layout[p.path].fan_in:,} x {layout[p.path].fan_out:,}" for p in there],
        [str(layout[place.path].rank) for place in there],
        formatting.column(one.effective_rank for one in ours),
        formatting.column(one.values[0] for one in ours),
        formatting.column(np.sqrt(one.energy) for one in ours),
        [f"{one.energy / energy:.1%}" if energy else formatting.NONE for one in ours],
    ]
    names = ("layer", "matrix", "in x out", "rank", "effective rank", "σ₁", "‖ΔW‖", "energy")
    table = Table(
        "Each matrix of the update ΔW = (alpha/r) B A. Energy is its share of the total ‖ΔW‖².",
        names,
        tuple(zip(*columns, strict=True)),
        ("matrix",),
    )
    text = (
        "The effective rank is e to the power of the entropy of the singular values, each divided "
        "by their sum. It is r if all r singular values are equal, and 1 if only one is not zero. "
        "Norms are Frobenius norms, and σ₁ is the largest singular value."
    )
    return Paragraph(text), *_pictures(there, ours, energy), table


def _at(found: Any, place: Place) -> Any:
    """Return one matrix of the result of an analysis, whose target may have stacked axes."""
    return type(found)(*(part[place.at] for part in found))


def _pictures(there: Sequence[Place], ours: Sequence[Any], energy: float) -> list[Figure]:
    rows, names = layers(there), matrices(there)
    labels = [label(row) for row in rows]
    panels = []
    for number, name in enumerate(names[:MOST]):
        every = zip(there, ours, strict=True)
        own = [(place.layer, one.values) for place, one in every if place.matrix == name]
        found = np.full((len(rows), max(len(v) for _, v in own)), np.nan)
        for layer, values in own:
            found[rows.index(layer), : len(values)] = values
        least, most = np.nanmin(found[:, 0]), np.nanmax(found[:, 0])
        text = (
            f"Singular values of the update of {name}: the largest of a layer is "
            + formatting.span([least, most])
        )
        panels.append(Panel(f"values-{number + 1}", text, charts.values(found, labels, name)))
    caption = f"Singular values of the update, from dark (the largest) to light.{cut(names)}"
    figures = [Figure(caption, tuple(panels))]
    if len(there) > 1:
        shares = grid(there, [one.energy / (energy or 1) for one in ours])
        ranks = grid(there, [one.effective_rank for one in ours])
        drawn = [("share of the energy", shares, "energy"), ("effective rank", ranks, "ranks")]
        heats = tuple(
            Panel(
                name,
                f"Heat map of the {what} by layer and matrix: {formatting.span(shown.ravel())}",
                charts.heat(shown[:, :MOST], labels, names[:MOST], what),
            )
            for what, shown, name in drawn
        )
        figures.append(
            Figure(
                f"Energy and effective rank of the update by layer and matrix.{cut(names)}", heats
            )
        )
    return figures


def cut(names: Sequence[str]) -> str:
    """Return the sentence that a caption adds if not all matrices are drawn."""
    more = f" The first {MOST} of {len(names)} matrices are drawn; the table lists all."
    return more if len(names) > MOST else ""


def grid(there: Sequence[Place], numbers: Sequence[float]) -> Any:
    """Arrange one number for each matrix as an array [layer, matrix]; NaN where there is none."""
    rows, names = layers(there), matrices(there)
    found = np.full((len(rows), len(names)), np.nan)
    for place, number in zip(there, numbers, strict=True):
        found[rows.index(place.layer), names.index(place.matrix)] = number
    return found


class AmplifiedUpdate(NamedTuple):
    """The directions of W that an adapter amplifies: an entry for each matrix, all in one order."""

    layout: Layout
    there: tuple[Place, ...]
    ours: list[Any]  # an analysis.Amplification of each matrix


def amplified(run: pathlib.Path, base: BaseChoice) -> AmplifiedUpdate:
    """Measure what of W the best adapter of a run amplifies.

    Args:
      run: the run directory or the adapter's folder.
      base: the base model to open.

    Returns:
      The numbers of every matrix.

    Raises:
      console.USER_ERRORS: the adapter or its base cannot be opened.
    """
    served = base.open([str(run)], object)
    layout, parameters = _matrices(served.members[0])
    found = analysis.amplification(layout, served.params, parameters)
    there = places(layout)
    return AmplifiedUpdate(layout, there, [_at(found[place.path], place) for place in there])


def _amplified(run: pathlib.Path, base: BaseChoice) -> tuple[Block, ...]:
    try:
        found = amplified(run, base)
    except USER_ERRORS as error:
        return (
            Note(
                "This section needs the weights of the base model, which cannot be opened here; "
                "the rest of the report does not need them. --base names another base, "
                f"--allow-other-base accepts a base that differs. {error}"
            ),
        )
    factors = np.array([one.factor for one in found.ours])
    known = factors[np.isfinite(factors)]
    middle = formatting.column([np.median(known)])[0] if known.size else formatting.NONE
    text = (
        f"The median amplification factor of {len(factors)} matrices is {middle}; the range is "
        f"{formatting.span(factors)}."
    )
    return Paragraph(text), *_factors(found.there, factors), table7(found)


def _factors(there: Sequence[Place], factors: Any) -> list[Figure]:
    rows, names = layers(there), matrices(there)
    if len(rows) == 1:
        return []
    lines = grid(there, factors.tolist()).T
    panel = Panel(
        "amplification",
        f"Amplification factor by layer, a line for each matrix: {formatting.span(factors)}",
        charts.by_layer(
            dict(zip(names[:MOST], lines, strict=False)),
            [label(row) for row in rows],
            "amplification factor",
        ),
    )
    return [Figure(f"Amplification factor of each layer.{cut(names)}", (panel,))]


def table7(found: AmplifiedUpdate) -> Table:
    """Return the table of all matrices: the paper's Table 7.

    Args:
      found: the numbers of every matrix.

    Returns:
      A row for each matrix.
    """
    there, ours = found.there, found.ours
    columns = [
        [label(place.layer) for place in there],
        [place.matrix for place in there],
        [str(found.layout[place.path].rank) for place in there],
        formatting.column(one.weight for one in ours),
        formatting.column(one.update for one in ours),
        formatting.column(one.along_update for one in ours),
        formatting.column(one.along_weight for one in ours),
        formatting.column(one.along_random for one in ours),
        formatting.column(one.factor for one in ours),
    ]
    names = ("layer", "matrix", "r", "‖W‖", "‖ΔW‖", "of ΔW", "of W", "random", "factor")
    return Table(
        "‖UᵀWV‖, where U and V hold the top r singular directions of ΔW, of W itself, or random "
        "ones. The factor is ‖ΔW‖ divided by the first of the three (the paper's Table 7).",
        names,
        tuple(zip(*columns, strict=True)),
        ("matrix",),
    )
