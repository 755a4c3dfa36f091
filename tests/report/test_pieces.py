"""The comparison of runs, and the place of a matrix in a model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from etils import epath

from lora_jax import LoraError, Target
from lora_jax.layout import Layout
from lora_jax.report import charts, render, svg
from lora_jax.report.document import Figure, Panel, Report, Section, Table
from lora_jax.report.module_index import ModuleIndex, label
from lora_jax.report.subspace_similarity import RunAdapter, of_ranks, of_seeds


def target(path: str, rank: int = 2, stack: int = 0) -> Target:
    shape = (*[stack] * bool(stack), 8, 8)
    axes = range(len(shape))
    return Target(path, shape, tuple(axes[:-2]), (axes[-2],), (axes[-1],), rank, 4.0)


def one(name: str, rank: int, paths: tuple[str, ...] = ("q",), **config: Any) -> RunAdapter:
    layout = Layout(tuple(target(path, rank) for path in paths))
    return RunAdapter(name, {"lora.rank": rank, **config}, epath.Path(name), layout, rank)


def test_ranks_that_differ_in_little_else_are_compared() -> None:
    runs = [one("a", 8, lr=1), one("b", 2, lr=2), one("c", 1, lr=3), one("d", 1, lr=1)]
    pair = of_ranks(runs)
    assert pair is not None
    assert [x.name for x in pair] == ["d", "a"]
    assert of_ranks(runs[:1]) is None
    assert of_ranks([one("a", 1), one("b", 2, ("q", "v"))]) is None


def test_seeds_that_differ_in_nothing_else_are_compared() -> None:
    runs = [one("a", 2, seed=0), one("b", 2, seed=1), one("c", 4, seed=0), one("d", 4, seed=1)]
    pair = of_seeds(runs)
    assert pair is not None
    assert [x.name for x in pair] == ["c", "d"]
    assert of_seeds([one("a", 2, seed=0), one("b", 2, seed=1, lr=1)]) is None
    assert of_seeds([one("a", 2, seed=0), one("b", 4, seed=1)]) is None


def test_layers_by_number_and_by_stack() -> None:
    paths = [f"bert/layer_{i}/{name}/kernel" for i in (10, 2) for name in ("att/query", "mlp/up")]
    found = ModuleIndex.of(Layout(tuple(target(path) for path in paths))).places
    assert [(p.layer, p.matrix) for p in found] == [
        *((2, "query"), (2, "up"), (10, "query"), (10, "up"))
    ]
    stacked = ModuleIndex.of(Layout((target("layers/attention/q/kernel", stack=3),)))
    assert [(p.layer, p.at, p.matrix) for p in stacked.places] == [(i, (i,), "q") for i in range(3)]
    assert stacked.middle_layer == 1
    names = (f"{x}/layer_0/query/kernel" for x in ("encoder", "decoder"))
    both = ModuleIndex.of(Layout(tuple(map(target, names)))).places
    assert [(p.layer, p.matrix) for p in both] == [(0, "encoder/query"), (0, "decoder/query")]
    (bare,) = ModuleIndex.of(Layout((target("first/kernel"),))).places
    assert (bare.layer, label(bare.layer), bare.matrix) == (None, "-", "first")


def test_a_name_is_no_formula() -> None:
    """A name is drawn as it is, not as a formula."""
    drawn = charts.by_layer({r"$\x$ --><b>": [0.1, 0.2]}, ["0", "1"], "y", (0.1, "$_$"))
    text = svg.inline(svg.svg(drawn), "name", 'of "a" & <b>')
    assert "<b>" not in text
    assert 'aria-label="of &quot;a&quot; &amp; &lt;b&gt;"' in text


def test_a_drawing_takes_the_colour_of_the_page() -> None:
    element = svg.svg(charts.heat(np.eye(2), ["0", "1"], ["a", "b"], "t"))
    assert svg.INK in element
    text = svg.inline(element, "name", "")
    assert svg.INK not in text
    assert text.count("currentColor") > 4
    assert svg.svg(charts.heat(np.eye(2), ["0", "1"], ["a", "b"], "t")) == element


def test_tables_of_markdown_are_aligned() -> None:
    table = Table("", ("name", "n"), (("a|b", "1"), ("c", "1,000")), ("name",), marked=1)
    assert render.markdown_table(table).splitlines() == [
        "| name  |         n |",
        "| :---- | --------: |",
        "| a\\|b  |         1 |",
        "| **c** | **1,000** |",
    ]
    with pytest.raises(LoraError, match="has 1 cells"):
        Table("", ("a", "b"), (("1",),))


def test_two_pictures_of_one_name_are_an_error() -> None:
    """A second picture of the same name would overwrite the first, so it is an error."""
    figure = Figure("", (Panel("phi", "", None),))
    with pytest.raises(LoraError, match="more than one picture is named phi"):
        Report("", "", "", (), (Section("a", (figure,)), Section("b", (figure,))))
