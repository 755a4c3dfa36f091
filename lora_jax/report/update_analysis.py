"""Analyse one adapter's update for a report: its spectrum, and the directions that it amplifies."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lora_jax import analysis
from lora_jax.checkpoint import adapter_path
from lora_jax.checkpoint.saved_adapter import SavedAdapter
from lora_jax.layout import Layout
from lora_jax.report import charts, formatting
from lora_jax.report.document import Block, Figure, Note, Panel, Paragraph, Section, Table
from lora_jax.report.module_index import ModuleIndex, Place, label
from lora_jax.serving.served_adapters import BaseChoice
from lora_jax.system.console import USER_ERRORS
from lora_jax.updates.kind import kind_of

_TITLE = "What the update is made of"


def sections(run: pathlib.Path, base: BaseChoice) -> tuple[Section, ...]:
    """Analyse the best adapter of a run, or the last one if there is no best, or an adapter.

    If the adapter or its base cannot be opened, a note says so in its place.
    """
    try:
        _, folder = adapter_path.find(str(run))[0]
        layout, parameters = _matrices(SavedAdapter.open_lora(folder, run.name))
        found = analysis.spectrum(layout, parameters, _needed(layout, run, base))
    except USER_ERRORS as error:
        return (Section(_TITLE, (Note(f"The adapter cannot be analysed: {error}"),)),)
    if not layout.targets:
        return (Section(_TITLE, (Note("No matrix is adapted, so there is no update to show."),)),)
    modules = ModuleIndex.of(layout)
    whose = run if folder == run else f"adapters/{folder.name} of {run.name}"
    head = Paragraph(f"This is the update of {whose}.")
    spectra = Section(_TITLE, (head, *_spectra(modules, found, layout)))
    return spectra, Section("Amplified directions of W", _amplified(run, base))


def _matrices(member: SavedAdapter) -> tuple[Layout, dict[str, Any]]:
    """Return the adapter without its biases, which have no directions."""
    layout = Layout(tuple(t for t in member.layout.targets if t.inputs))
    return layout, {t.path: member.parameters[t.path] for t in layout.targets}


def _needed(layout: Layout, run: pathlib.Path, base: BaseChoice) -> Any:
    """Return the base parameters if the adapter's update depends on them (DoRA), else None."""
    rescales = any(kind_of(target).rescales for target in layout.targets)
    return base.open([str(run)]).params if rescales else None


def _spectra(
    modules: ModuleIndex, found: dict[str, analysis.Spectrum], layout: Layout
) -> tuple[Block, ...]:
    measured = [_at(found[place.path], place) for place in modules.places]
    energy = sum(float(one.energy) for one in measured)
    targets = [layout[place.path] for place in modules.places]
    columns = {
        "in x out": [f"{target.fan_in}x{target.fan_out}" for target in targets],
        "rank": [str(target.rank) for target in targets],
        "effective rank": formatting.column(one.effective_rank for one in measured),
        "σ₁": formatting.column(one.values[0] for one in measured),
        "‖ΔW‖": formatting.column(np.sqrt(one.energy) for one in measured),
        "energy": [f"{x.energy / energy:.1%}" if energy else formatting.NONE for x in measured],
    }
    caption = (
        "Each matrix of the update ΔW = (alpha/r) B A. Energy is its share of the total ‖ΔW‖²."
    )
    table = _by_matrix(caption, modules, columns)
    text = (
        "The effective rank is e to the power of the entropy of the singular values, each divided "
        "by their sum. It is r if all r singular values are equal, and 1 if only one is not zero. "
        "Norms are Frobenius norms, and σ₁ is the largest singular value."
    )
    return Paragraph(text), *_pictures(modules, measured, energy), table


def _by_matrix(caption: str, modules: ModuleIndex, columns: Mapping[str, list[str]]) -> Table:
    """Return a table with a row for each matrix."""
    columns = {
        "layer": [label(place.layer) for place in modules.places],
        "matrix": [place.matrix for place in modules.places],
        **columns,
    }
    return Table(caption, tuple(columns), tuple(zip(*columns.values(), strict=True)), ("matrix",))


def _at(found: Any, place: Place) -> Any:
    """Return one matrix of the result of an analysis, whose target may have stacked axes."""
    return type(found)(*(part[place.at] for part in found))


def _pictures(modules: ModuleIndex, measured: Sequence[Any], energy: float) -> list[Figure]:
    rows, panels = modules.layers, []
    for number, name in enumerate(modules.drawn):
        every = zip(modules.places, measured, strict=True)
        own = [(place.layer, one.values) for place, one in every if place.matrix == name]
        found = np.full((len(rows), max(len(v) for _, v in own)), np.nan)
        for layer, values in own:
            found[rows.index(layer), : len(values)] = values
        largest = formatting.span([np.nanmin(found[:, 0]), np.nanmax(found[:, 0])])
        text = f"Singular values of the update of {name}: the largest of a layer is {largest}"
        drawn = charts.values(found, modules.labels, name)
        panels.append(Panel(f"values-{number + 1}", text, drawn))
    caption = f"Singular values of the update, from strong (the largest) to faint.{modules.cut}"
    figures = [Figure(caption, tuple(panels))]
    if len(modules.places) > 1:
        shares = modules.grid(one.energy / (energy or 1) for one in measured)
        ranks = modules.grid(one.effective_rank for one in measured)
        maps = ("share of the energy", shares, "energy"), ("effective rank", ranks, "ranks")
        panels = []
        for what, shown, name in maps:
            text = f"Heat map of the {what} by layer and matrix: {formatting.span(shown.ravel())}"
            drawn = charts.heat(shown[:, : len(modules.drawn)], modules.labels, modules.drawn, what)
            panels.append(Panel(name, text, drawn))
        caption = f"Energy and effective rank of the update by layer and matrix.{modules.cut}"
        figures.append(Figure(caption, tuple(panels)))
    return figures


def by_layer(
    modules: ModuleIndex,
    numbers: Sequence[float],
    panel: str,
    what: str,
    caption: str,
    **options: Any,
) -> list[Figure]:
    """Draw a number of each matrix over the layers, a line for each; nothing for one layer.

    `options` go to `charts.by_layer`.
    """
    if len(modules.layers) == 1:
        return []
    lines = dict(zip(modules.drawn, modules.grid(numbers).T, strict=False))
    text = f"{what} by layer, a line for each matrix: {formatting.span(numbers)}"
    drawn = charts.by_layer(lines, modules.labels, what, **options)
    return [Figure(f"{caption}{modules.cut}", (Panel(panel, text, drawn),))]


class AmplifiedUpdate(NamedTuple):
    """The directions of W that an adapter amplifies: an entry for each matrix, all in one order."""

    layout: Layout
    modules: ModuleIndex
    measured: list[Any]  # an analysis.Amplification of each matrix


def amplified(run: pathlib.Path, base: BaseChoice) -> AmplifiedUpdate:
    """Measure what of W the best adapter of a run amplifies."""
    served = base.open([str(run)])
    layout, parameters = _matrices(served.members[0])
    found = analysis.amplification(layout, served.params, parameters)
    modules = ModuleIndex.of(layout)
    numbers = [_at(found[place.path], place) for place in modules.places]
    return AmplifiedUpdate(layout, modules, numbers)


def _amplified(run: pathlib.Path, base: BaseChoice) -> tuple[Block, ...]:
    try:
        found = amplified(run, base)
    except USER_ERRORS as error:
        text = (
            "This section needs the weights of the base model, which cannot be opened here; the "
            "rest of the report does not need them. --base names another base, --allow-other-base "
            f"accepts a base that differs. {error}"
        )
        return (Note(text),)
    factors = np.array([one.factor for one in found.measured])
    known = factors[np.isfinite(factors)]
    middle = formatting.column([np.median(known)])[0] if known.size else formatting.NONE
    text = (
        f"The median amplification factor of {len(factors)} matrices is {middle}; the range is "
        f"{formatting.span(factors)}."
    )
    what, caption = "amplification factor", "Amplification factor of each layer."
    lines = by_layer(found.modules, factors.tolist(), "amplification", what, caption)
    return Paragraph(text), *lines, table7(found)


def table7(found: AmplifiedUpdate) -> Table:
    """Return the table of all matrices: the paper's Table 7."""
    fields = {
        "‖W‖": "weight",
        "‖ΔW‖": "update",
        "of ΔW": "along_update",
        "of W": "along_weight",
        "random": "along_random",
        "factor": "factor",
    }
    columns = {"r": [str(found.layout[place.path].rank) for place in found.modules.places]}
    for name, field in fields.items():
        columns[name] = formatting.column(getattr(one, field) for one in found.measured)
    caption = (
        "How much of W lies in r directions: in the main ones of ΔW, in the main ones of W itself, "
        "and in random ones (‖UᵀWV‖). The factor is ‖ΔW‖ divided by the first of these three (the "
        "paper's Table 7)."
    )
    return _by_matrix(caption, found.modules, columns)
