"""Train cells, those with the same shapes as one program.

One program may mix learning rates, LoRA+'s ratios, alphas, scalings and seeds: they are data of the
step (`lora_jax.sweeps`). It may mix ranks and targets of plain LoRA too, but pads all to the
largest, which costs more than it saves for ranks 4 and 256; so here each rank has its own program.
Another kind, another base (quantised, or changed by PiSSA) and another length have other shapes.
"""

from __future__ import annotations

import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from experiments.sequel.cells import Cell
from experiments.sequel.results import Results, scored
from lora_jax.report.run_files import read
from lora_jax.sweeps import loop
from lora_jax.sweeps.config import GroupConfig, Member
from lora_jax.system.console import Console, say
from lora_jax.training import mesh
from lora_jax.training.config import MeshConfig

MEMORY = 4e9  # bytes of a program: full fine-tuning of all cells at once takes more
MOST = 12  # cells of a program: a killed one is trained again from its start


def shapes_of(cell: Cell) -> tuple[Any, ...]:
    """Return the settings that cells of one program must share."""
    config = cell.config
    return config.group_key, config.model, config.data, config.steps, config.lora.rank


def programs(cells: Sequence[Cell]) -> Iterator[list[Cell]]:
    """Yield the cells of each program."""
    ordered: dict[Any, list[Cell]] = {}
    for cell in cells:
        ordered.setdefault(shapes_of(cell), []).append(cell)
    for alike in ordered.values():
        yield from (alike[at : at + MOST] for at in range(0, len(alike), MOST))


def train(cells: Sequence[Cell], folder: pathlib.Path, results: Results, console: Console) -> None:
    """Train the cells that have no results yet, and add their results after each program."""
    waiting = {cell.key: cell for cell in cells if cell.key not in results.cells}
    found = list(programs(list(waiting.values())))
    for number, alike in enumerate(found, 1):
        names = ", ".join(dict.fromkeys(f"{cell.arm} at {cell.rate:g}" for cell in alike))
        say(console, f"program {number} of {len(found)}, {len(alike)} cells: {names}")
        members = tuple(Member(cell.key, cell.config) for cell in alike)
        began = time.monotonic()
        grid = mesh.make(MeshConfig())
        with jax.set_mesh(grid):
            loop.run(GroupConfig(members=members, memory=MEMORY), grid, folder, console)
        seconds = (time.monotonic() - began) / len(alike)
        runs = {cell.key: read(folder / cell.key)[0] for cell in alike}
        results.add({key: scored(run, seconds, len(alike)) for key, run in runs.items()})
