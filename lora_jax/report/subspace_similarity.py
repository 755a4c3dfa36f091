"""Compare the subspaces that two runs have found, as figures 3 and 4 of the paper do."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from lora_jax import analysis
from lora_jax.adapters import Adapter, init
from lora_jax.checkpoint import adapter, adapter_path
from lora_jax.checkpoint.adapter import restore
from lora_jax.checkpoint.storage import RemotePath
from lora_jax.errors import LoraError
from lora_jax.layout import Layout
from lora_jax.report import charts, formatting, update_analysis
from lora_jax.report.document import Block, Figure, Note, Panel, Paragraph, Section, Table
from lora_jax.report.module_index import ModuleIndex, Place
from lora_jax.report.run_files import SavedRun
from lora_jax.sweeps.comparison import flat
from lora_jax.updates.kind import kind_of

_TITLE = "Directions that runs share"
_RANK = ("lora.rank", "lora.alpha")  # fields that may differ when ranks are compared
_SHARED = 0.5


@dataclasses.dataclass(frozen=True)
class RunAdapter:
    """A run that has saved an adapter.

    config: dotted path -> value, for the fields that decide the result.
    rank: the largest rank of its layout.
    """

    name: str
    config: dict[str, Any]
    folder: RemotePath
    layout: Layout
    rank: int


def section(runs: Sequence[SavedRun]) -> Section:
    """Compare the smallest rank with the largest, and two seeds with each other and with chance.

    A run without an adapter is left out with a note.
    """
    blocks: list[Block] = [
        Paragraph(
            "φ(i, j) compares two adapters. It is the part of the first one's i most important "
            "directions of A that is contained in the second one's j most important directions: 0 "
            "if they are orthogonal, 1 if the smaller space is contained in the larger. For two "
            "random spaces of d-dimensional vectors it is about max(i, j)/d."
        )
    ]
    found, left_out = _open(runs)
    blocks += left_out
    for what, pair, runs_that in (
        ("ranks", of_ranks(found), "with the same matrices and different ranks"),
        ("seeds", of_seeds(found), "that differ only in the seed"),
    ):
        lacking = Paragraph(f"There are no two runs {runs_that}.")
        blocks += [lacking] if pair is None else _compared(pair, what)
    return Section(_TITLE, tuple(blocks))


def of_ranks(found: Sequence[RunAdapter]) -> tuple[RunAdapter, RunAdapter] | None:
    """Return the runs of smallest and largest rank that adapt the same matrices, or None.

    Among several such pairs it is the one with the fewest other differences, then the first.
    """
    pairs = list[tuple[RunAdapter, RunAdapter]]()
    for ones in _same_targets(found):
        low, high = min(one.rank for one in ones), max(one.rank for one in ones)
        if low < high:
            pairs += [(a, b) for a in ones for b in ones if (a.rank, b.rank) == (low, high)]

    def cost(pair: tuple[RunAdapter, RunAdapter]) -> tuple[float, int]:
        return -pair[1].rank / pair[0].rank, len(_differences(*pair, _RANK))

    return min(pairs, key=cost, default=None)


def of_seeds(found: Sequence[RunAdapter]) -> tuple[RunAdapter, RunAdapter] | None:
    """Return two runs that differ only in the seed, of the largest rank that has two, or None."""
    pairs = [
        pair
        for ones in _same_targets(found)
        for pair in itertools.combinations(ones, 2)
        if _differences(*pair, ()) == ["seed"]
    ]
    return max(pairs, key=lambda pair: pair[0].rank) if pairs else None


def _same_targets(found: Sequence[RunAdapter]) -> list[list[RunAdapter]]:
    groups = defaultdict[Any, list[RunAdapter]](list)
    for one in found:
        groups[tuple((t.path, t.form) for t in one.layout.targets)].append(one)
    return [ones for ones in groups.values() if ones[0].layout.targets]


def _differences(one: RunAdapter, two: RunAdapter, without: Sequence[str]) -> list[str]:
    fields = dict.fromkeys([*one.config, *two.config])
    differ = (f for f in fields if one.config.get(f) != two.config.get(f))
    return [field for field in differ if field not in without]


def _open(runs: Sequence[SavedRun]) -> tuple[list[RunAdapter], list[Note]]:
    found, left_out = [], []
    for run in runs:
        try:
            _, folder = adapter_path.find(str(run.path))[0]
            layout = adapter.restore_layout(folder)
        except LoraError as error:
            left_out.append(Note(f"{run.name} is left out: {error}"))
            continue
        rank = max((target.rank for target in layout.targets), default=0)
        found.append(RunAdapter(run.name, flat(run.config), folder, layout, rank))
    return found, left_out


def _compared(pair: tuple[RunAdapter, RunAdapter], what: str) -> list[Block]:
    """Make the table and figures of one pair. `what` is "ranks" or "seeds" and names the files."""
    one, two = pair
    try:
        first, second = restore(one.folder), restore(two.folder)
        found = analysis.similarity(first, second)
    except LoraError as error:
        return [Note(f"{one.name} and {two.name} cannot be compared: {error}")]
    modules = ModuleIndex.of(one.layout)
    phis = {place: found[place.path][place.at] for place in modules.places}
    ranks = what == "ranks"
    names = [f"rank {x.rank}" if ranks else f"seed {x.config.get('seed')}" for x in pair]
    both = " against ".join(names)
    blocks: list[Block] = [Paragraph(f"{both}: {one.name} and {two.name}.")]
    blocks.append(_maps(modules, phis, names, what, one.layout))
    top = [float(phis[place][0, 0]) for place in modules.places]
    widest = {t.path: t.fan_in for t in one.layout.targets}
    caption = f"φ(1, 1), for the most important direction of each adapter: {', '.join(names)}."
    how: dict[str, Any] = {"level": (1 / max(widest.values()), "random"), "top": _tenth(top)}
    blocks += update_analysis.by_layer(modules, top, f"top-{what}", "φ(1, 1)", caption, **how)
    sides = {"A": phis}
    if not any(kind_of(target).rescales for target in one.layout.targets):  # DoRA's needs W
        updates = analysis.similarity(first, second, of="input")
        sides["ΔW"] = {place: updates[place.path][place.at] for place in modules.places}
    blocks.append(_counted(modules, sides, widest, both))
    return blocks


def _counted(
    modules: ModuleIndex,
    sides: dict[str, dict[Place, Any]],
    widest: dict[str, int],
    what: str,
) -> Table:
    rows = []
    for name in modules.names:
        own = [place for place in modules.places if place.matrix == name]
        for side, phis in sides.items():
            values = np.array([phis[place][0, 0] for place in own])
            known = values[np.isfinite(values)]
            numbers = [f(known) if known.size else None for f in (np.mean, min, max)]
            cells = map(formatting.score, numbers)
            shared = f"{(known > _SHARED).sum()} of {len(own)}"
            rows.append((name, side, *cells, shared, f"{1 / widest[own[0].path]:.4f}"))
    return Table(
        f"φ(1, 1), {what}, over the layers; for random spaces it is 1/d. The rows of A compare "
        "the directions that the maps show. The rows of ΔW compare the input directions of the "
        "whole update, ordered by their singular values, which depend on B as well.",
        ("matrix", "of", "mean", "least", "most", f"layers above {_SHARED}", "random"),
        tuple(rows),
        ("matrix", "of"),
    )


def _maps(
    modules: ModuleIndex,
    phis: dict[Place, Any],
    names: Sequence[str],
    what: str,
    layout: Layout,
) -> Figure:
    """Draw the maps of two matrices of the middle layer, and either chance or enlarged corners."""
    layer = modules.middle_layer
    chosen = _chosen([place for place in modules.places if place.layer == layer])
    where = "" if layer is None else f", layer {layer}"
    maps = [phis[place] for place in chosen]
    if what == "seeds":
        maps.append(_chance(layout, chosen[0]))
    scale = _tenth(np.concatenate([found.ravel() for found in maps]))  # one for all panels
    panels = []
    for number, place in enumerate(chosen):
        title = f"{place.matrix}{where}"
        panels.append(_panel(f"{what}-{number + 1}", phis[place], names, title, scale))
    caption = f"φ(i, j){where}: {' and '.join(place.matrix for place in chosen)}"
    if what == "seeds":
        both = ("one", "the other")
        panels.append(_panel("seeds-random", maps[-1], both, "two random Gaussian matrices", scale))
        return Figure(f"{caption}, and two random matrices of the same size.", tuple(panels))
    small = min(phis[chosen[0]].shape)
    if small == 1:
        return Figure(f"{caption}.", tuple(panels))
    for number, place in enumerate(chosen):
        lower = np.tril(np.ones((small, small), bool))
        zoomed = np.where(lower, phis[place][:small, :small], np.nan)
        title = f"{place.matrix}{where}: j ≤ i"
        panels.append(_panel(f"{what}-{number + 1}-zoomed", zoomed, names, title, scale))
    return Figure(f"{caption}; then the lower left triangle of each map, larger.", tuple(panels))


def _panel(name: str, found: Any, names: Sequence[str], title: str, scale: float) -> Panel:
    rows, columns = found.shape
    text = f"Heat map of φ(i, j), {title}, {rows} x {columns}: {formatting.span(found.ravel())}"
    return Panel(f"phi-{name}", text, charts.phi(found, names, title, scale))


def _tenth(values: Any) -> float:
    """Return the largest value, rounded up to a tenth."""
    known = np.asarray(values)[np.isfinite(values)]
    return max(math.ceil(10 * known.max()) / 10, 0.1) if known.size else 1.0


def _chosen(own: Sequence[Place]) -> list[Place]:
    """Choose query and value, as in the paper, or else the first two matrices."""
    endings = ("query", "q", "value", "v")
    wanted = [p for end in endings for p in own if p.matrix.rpartition("/")[2] == end]
    return (wanted if len(wanted) >= 2 else list(own))[:2]


def _chance(layout: Layout, place: Place) -> Any:
    """Compare two untrained adapters that were initialized with different keys."""
    target = layout[place.path]
    layout = Layout((target.plain(target.rank),))
    one, two = (init(jax.random.key(seed), layout) for seed in (0, 1))
    return analysis.similarity(Adapter(layout, one), Adapter(layout, two))[place.path][place.at]
