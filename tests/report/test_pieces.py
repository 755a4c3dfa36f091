"""The comparison of runs, and the place of a matrix in a model."""

from __future__ import annotations

import re
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


def luminance(color: str) -> float:
    """Return the relative luminance of WCAG 2."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, two: str) -> float:
    low, high = sorted(map(luminance, (one, two)))
    return (high + 0.05) / (low + 0.05)


def test_lines_and_texts_have_contrast_on_light_and_on_dark_pages() -> None:
    page = render.html(Report("run", "a", "b", (), ()), {})
    light, dark = page.split("prefers-color-scheme: dark")[:2]
    for theme in (light, dark):
        colors = dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{6});", theme))
        drawn = [color for name, color in colors.items() if name.startswith("line-")]
        assert len(drawn) == len(svg.LINES)
        for color in [*drawn, *(colors[name] for name in ("text", "soft", "accent"))]:
            assert contrast(color, colors["card"]) >= 4.5, color


def test_a_line_takes_its_colour_from_the_page() -> None:
    text = svg.inline(svg.svg(charts.by_layer({"q": [1.0, 2.0]}, ["0", "1"], "y")), "name", "")
    assert "stroke: var(--line-0)" in text
    assert not [color for color in svg.LINES if color in text]


def test_a_heat_map_of_many_layers_has_no_numbers() -> None:
    """Numbers are written where they can be read; the colour bar has a label."""
    for rows, written in ((6, 12), (30, 0)):
        names = [str(i) for i in range(rows)]
        axis, bar = charts.heat(np.ones((rows, 2)), names, ["q", "v"], "energy").axes
        assert len(axis.texts) == written
        assert bar.get_ylabel() == "energy"


def test_axes_end_at_one_and_show_the_tail() -> None:
    steps = range(100)
    shares = [{"step": i, "split": "validation", "accuracy": min(i / 50, 1)} for i in steps]
    assert charts.curve(shares, "accuracy").axes[0].get_ylim()[1] == 1
    steep = [{"step": i, "loss": 10 if i < 5 else 1 + i / 1e3, "learning_rate": i} for i in steps]
    assert charts.curve(steep, "loss").axes[0].get_yscale() == "log"
    falling = [{**line, "learning_rate": 1e-3 / (1 + line["step"])} for line in steep]
    assert charts.curve(falling, "learning_rate").axes[0].get_yscale() == "linear"


def test_a_legend_is_inside_of_its_figure() -> None:
    names = [f"lora.targets bert/encoder/layer_{i}/attention/query/kernel" * 2 for i in range(4)]
    drawn = charts.by_layer({name: [1.0, 2.0] for name in names}, ["0", "1"], "y")
    svg.png(drawn)
    (legend,) = drawn.legends
    found, whole = legend.get_window_extent(), drawn.bbox
    assert whole.x0 <= found.x0 and found.x1 <= whole.x1
    assert whole.y0 <= found.y0 and found.y1 <= whole.y1
