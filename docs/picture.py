"""Draw the picture of the idea: `docs/_static/idea-light.svg` and `idea-dark.svg`.

    python docs/picture.py

Text stays text, so that it can be searched and read aloud. The background is transparent.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import matplotlib as mpl
from matplotlib import patches
from matplotlib import pyplot as plt

HERE = pathlib.Path(__file__).resolve().parent / "_static"
SIZE = 900, 400  # pixels
MONO = "monospace"


@dataclasses.dataclass(frozen=True)
class Colours:
    """The colours of one theme."""

    ink: str
    muted: str
    frozen: str
    trained: str
    on_trained: str


THEMES = {
    "light": Colours("#1f2328", "#59636e", "#dde3e9", "#0b57d0", "#ffffff"),
    "dark": Colours("#e6edf3", "#a3adb8", "#3a424c", "#8ab4f8", "#10161d"),
}


# The arrays of the model of the README: path, factor, shape.
FROZEN = (("up/kernel", "W", "[64, 256]"), ("out/kernel", "W", "[256, 10]"))
TRAINED = (
    ("up/kernel", "A", "[64, 4]"),
    ("", "B", "[4, 256]"),
    ("out/kernel", "A", "[256, 4]"),
    ("", "B", "[4, 10]"),
)


class Sheet:
    """One drawing, in pixels from the top left corner."""

    def __init__(self, colours: Colours) -> None:
        self.colours = colours
        self.figure = plt.figure(figsize=(SIZE[0] / 72, SIZE[1] / 72))
        self.axes: Any = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, SIZE[0]), ylim=(SIZE[1], 0))
        self.axes.axis("off")

    def text(self, x: float, y: float, text: str, size: float = 15, **kwargs: Any) -> None:
        settings = {"color": self.colours.ink, "va": "center", "ha": "left", **kwargs}
        self.axes.text(x, y, text, fontsize=size, **settings)

    def shape(self, points: list[tuple[float, float]], *, trained: bool) -> None:
        """Draw a matrix: a rectangle, or a trapezoid that narrows to the rank."""
        face = self.colours.trained if trained else self.colours.frozen
        edge = self.colours.trained if trained else self.colours.muted
        self.axes.add_patch(patches.Polygon(points, facecolor=face, edgecolor=edge, linewidth=1.2))

    def arrow(self, *points: tuple[float, float], trained: bool = False) -> None:
        """Draw an arrow through the points, with its head at the last one."""
        colour = self.colours.trained if trained else self.colours.ink
        self.axes.plot(*zip(*points[:-1], strict=True), color=colour, linewidth=1.6)
        style = {"arrowstyle": "-|>", "color": colour, "linewidth": 1.6, "mutation_scale": 14}
        self.axes.annotate(
            "", points[-1], points[-2], arrowprops={**style, "shrinkA": 0, "shrinkB": 0}
        )


def trees(sheet: Sheet) -> None:
    """Draw the two trees, on the left."""
    sheet.text(20, 34, "Two trees", 17, weight="bold")
    tree(sheet, 70, "params", "your model's weights: frozen", FROZEN)
    tree(sheet, 204, "adapters", "factors: trained, saved", TRAINED, trained=True)


def tree(
    sheet: Sheet,
    y: float,
    name: str,
    note: str,
    rows: tuple[tuple[str, ...], ...],
    *,
    trained: bool = False,
) -> None:
    """Draw one tree: its name, what happens to it, and its arrays."""
    end = y + 46 + 20 * len(rows)
    sheet.shape([(20, y), (27, y), (27, end), (20, end)], trained=trained)
    sheet.text(40, y + 10, name, 15, family=MONO, weight="bold")
    sheet.text(40, y + 32, note, 13, color=sheet.colours.muted)
    for row, cells in enumerate(rows):
        for x, cell in zip((40, 138, 160), cells, strict=False):
            sheet.text(x, y + 56 + 20 * row, cell, 12, family=MONO)


def product(sheet: Sheet) -> None:
    """Draw one product of the program as `adapt` runs it, on the right."""
    ink, trained = sheet.colours.ink, sheet.colours.trained
    sheet.text(350, 34, "One transformation", 17, weight="bold")
    sheet.text(350, 66, "dot_general x W", 14, family=MONO)
    sheet.text(500, 66, "becomes", 13, color=sheet.colours.muted)
    sheet.text(580, 66, "x W + (α/r) (x A) B", 14, family=MONO)
    sheet.text(372, 210, "x", 18, family=MONO, ha="center")
    sheet.arrow((390, 210), (420, 210), (420, 145), (510, 145))
    sheet.arrow((420, 212), (420, 280), (480, 280), trained=True)
    sheet.shape([(510, 95), (640, 95), (640, 195), (510, 195)], trained=False)
    sheet.text(575, 136, "W", 20, ha="center", weight="bold")
    sheet.text(575, 166, "frozen", 13, ha="center")
    sheet.shape([(480, 232), (540, 266), (540, 294), (480, 328)], trained=True)
    sheet.shape([(610, 266), (670, 232), (670, 328), (610, 294)], trained=True)
    for x, name in ((508, "A"), (642, "B")):
        sheet.text(x, 280, name, 18, ha="center", weight="bold", color=sheet.colours.on_trained)
    sheet.arrow((540, 280), (610, 280), trained=True)
    sheet.text(575, 264, "rank r", 12.5, ha="center")
    sheet.text(735, 262, "× α/r", 13, ha="center")
    sheet.axes.add_patch(patches.Circle((790, 210), 15, fill=False, edgecolor=ink, linewidth=1.6))
    sheet.text(790, 209, "+", 20, ha="center")
    sheet.arrow((640, 145), (790, 145), (790, 194))
    sheet.arrow((670, 280), (790, 280), (790, 226), trained=True)
    sheet.arrow((806, 210), (846, 210))
    sheet.text(864, 210, "y", 18, family=MONO, ha="center")
    law = "adapt(layout, f)(params, adapters, x)  ==  f(merge(layout, params, adapters), x)"
    sheet.text(SIZE[0] / 2, 376, law, 13, family=MONO, ha="center", color=trained)


def main() -> None:
    """Write both files."""
    mpl.use("svg")
    settings = {"svg.fonttype": "none", "svg.hashsalt": "lora_jax", "font.family": "sans-serif"}
    for name, colours in THEMES.items():
        with mpl.rc_context(settings):
            sheet = Sheet(colours)
            trees(sheet)
            product(sheet)
            metadata = {
                "Date": None,
                "Creator": None,
                "Title": "lora_jax: two trees, one transformation",
            }
            sheet.figure.savefig(HERE / f"idea-{name}.svg", transparent=True, metadata=metadata)
            plt.close(sheet.figure)


if __name__ == "__main__":
    main()
