"""Analyse the directions of an update (figures 3 and 4), and what of W it amplifies (Table 7)."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

from experiments.paper import published, sweeps
from experiments.paper.experiments import Task
from experiments.paper.settings import there
from lora_jax.report import subspace_similarity, update_analysis
from lora_jax.report.document import Block, Figure, Note, Paragraph, Section, Table
from lora_jax.report.module_index import label
from lora_jax.report.run_files import SavedRun
from lora_jax.serving.served_adapters import BaseChoice
from lora_jax.system.console import USER_ERRORS

FILE = "experiments/paper/configs/directions.py"
MODELS = {"encoder": "MiniLM", "decoder": "SmolLM2"}  # attribute of that file -> its model
_COMPARED = (8, 64)  # the ranks of figure 3
_AMPLIFIED = (4, 64)  # the ranks of Table 7
_GAIN = published.AMPLIFICATION
_ROWS = (
    "Runs with the same seed are trained on the same rows in the same order. Their initial factors "
    "have no more in common than any two random ones. Another seed also has another order."
)


def tasks(folder: pathlib.Path) -> Sequence[Task]:
    """Return one command for each model."""
    return sweeps.tasks(folder, FILE, tuple(MODELS))


def sections(folder: pathlib.Path, base: BaseChoice) -> Sequence[Section]:
    """Return two sections for each model with finished runs.

    A note in the last section says which runs are missing.
    """
    found: list[Section] = []
    runs = {attribute: list(there(folder / attribute)) for attribute in MODELS}
    for attribute, model in MODELS.items():
        finished = [run for run in runs[attribute] if run.summary is not None]
        if finished:
            compared = [run for run in finished if _rank(run) in _COMPARED]
            shared = subspace_similarity.section(compared)
            shared = dataclasses.replace(shared, blocks=(*shared.blocks, Paragraph(_ROWS)))
            gains = Section("Amplified directions of W", tuple(_gains(finished, base)))
            found += [_of(one, attribute, model) for one in (shared, gains)]
    if found:
        notes = sweeps.notes(tasks(folder), {name: saved for name, saved in runs.items() if saved})
        found[-1] = dataclasses.replace(found[-1], blocks=(*found[-1].blocks, *notes))
    return found


def _of(section: Section, attribute: str, model: str) -> Section:
    """Add the model to the title of a section, and its attribute to the names of the pictures."""
    blocks = [
        Figure(
            block.caption,
            tuple(dataclasses.replace(p, name=f"{attribute}-{p.name}") for p in block.panels),
        )
        if isinstance(block, Figure)
        else block
        for block in section.blocks
    ]
    return Section(f"{section.title}: {model}", tuple(blocks))


def _rank(run: SavedRun) -> int:
    return int(run.config["lora"]["rank"])


def _gains(runs: Sequence[SavedRun], base: BaseChoice) -> list[Block]:
    found: dict[int, update_analysis.AmplifiedUpdate] = {}
    for rank in _AMPLIFIED:
        own = [run for run in runs if _rank(run) == rank]
        try:
            found |= {rank: update_analysis.amplified(own[0].path, base)} if own else {}
        except USER_ERRORS as error:
            return [
                Note(f"This section needs the weights of the base, which cannot be opened: {error}")
            ]
    if not found:
        return [Note(f"No run of rank {' or '.join(map(str, _AMPLIFIED))} has finished.")]
    blocks: list[Block] = [
        Paragraph(
            "The amplification factor is ‖ΔW‖ divided by ‖UᵀWV‖, where U and V hold the top r "
            "singular directions of ΔW. It tells how much stronger these directions are in the "
            "update than in W. A factor of 1 would double them."
        ),
        _middle(found),
    ]
    for rank, one in found.items():
        blocks += [*_factors(rank, one), update_analysis.table7(one)]
    return blocks


def _middle(found: dict[int, update_analysis.AmplifiedUpdate]) -> Table:
    """Return Table 7 for the first matrix of the middle layer, with the paper's numbers."""
    rows = []
    for rank, one in found.items():
        layer = one.modules.middle_layer
        at = next(i for i, place in enumerate(one.modules.places) if place.layer == layer)
        ours, paper = one.measured[at], _GAIN[rank]
        numbers = (
            ("of ΔW", ours.along_update, paper.along_update),
            ("of W", ours.along_weight, paper.along_weight),
            ("random", ours.along_random, paper.along_random),
            ("‖W‖", ours.weight, paper.weight),
            ("‖ΔW‖", ours.update, paper.update),
            ("factor", ours.factor, paper.update / paper.along_update),
        )
        place = f"{one.modules.places[at].matrix}, layer {label(layer)}"
        rows += [
            (f"r = {rank}", place, name, f"{mine:.4g}", f"{its:.4g}") for name, mine, its in numbers
        ]
    return Table(
        "‖UᵀWV‖ with the directions of ΔW, of W and random ones, and the norms: ours, and W_q's "
        "in the 48th of GPT-3's 96 layers (the paper's Table 7).",
        ("rank", "matrix", "", "ours", "paper"),
        tuple(rows),
        ("rank", "matrix", ""),
    )


def _factors(rank: int, one: update_analysis.AmplifiedUpdate) -> list[Figure]:
    factors = [float(ours.factor) for ours in one.measured]
    what, caption = f"amplification factor, r = {rank}", "Amplification factor of every layer"
    name = f"amplification-{rank}"
    return update_analysis.by_layer(one.modules, factors, name, what, f"{caption}, rank {rank}.")
