"""The style of the figures, and their conversion to PNG and to SVG for a page.

On a page text and axes have the colour of the text around them, so that one drawing serves light
and dark: they are drawn in a colour that nothing else has, and `inline` puts `currentColor` in its
place. Letters are drawn as outlines: a page looks the same where it has none of our fonts.
"""

from __future__ import annotations

import contextlib
import html
import io
import re
from collections.abc import Iterator
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_LARGER = 1.2  # than it was drawn, at most
INK = "#010203"  # stands for the colour of the text
_STYLE: Any = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "font.size": 10,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "grid.alpha": 0.3,
    "grid.color": "#7c8796",  # between light and dark
    "svg.fonttype": "path",
    "svg.hashsalt": "lora_jax",  # the same report twice is the same file twice
    "text.parse_math": False,  # names are names: a `$` in one begins no formula
}
_NOTHING = dict.fromkeys(("Date", "Creator", "Format", "Type"))


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Drawings that are made in the block, and those that are saved, look like the report's."""
    with mpl.rc_context(_STYLE):
        yield


def new(width: float = 4.6, height: float = 3.4) -> tuple[Figure, Any]:
    """A drawing of one set of axes, in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # measures texts, for whoever keeps them apart
    return figure, figure.subplots()


def png(drawing: Figure) -> bytes:
    """A file of pixels, dark on white."""
    file = io.BytesIO()
    with style():
        drawing.savefig(file, format="png", dpi=150, facecolor="white")
    return file.getvalue()


def svg(drawing: Figure) -> str:
    """An SVG element that stands alone: no comment, no metadata, no document type."""
    file = io.StringIO()
    with style():
        drawing.savefig(file, format="svg", metadata=_NOTHING)
    text = file.getvalue()
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = text[text.index("<svg") :]
    return "\n".join(line.strip() for line in text.splitlines() if line.strip())


def standalone(element: str) -> str:
    """The SVG of `svg` as a file, dark on white."""
    return element.replace("<svg ", '<svg style="background: white" ', 1) + "\n"


def inline(element: str, name: str, alternative: str) -> str:
    """The SVG of `svg` within a page of HTML.

    Args:
      element: what `svg` gives.
      name: set before every id, since those of all drawings share the page.
      alternative: what is read out in place of the drawing.
    """
    text = re.sub(r'\bid="', f'id="{name}-', element)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    text = text.replace("url(#", f"url(#{name}-").replace(INK, "currentColor")
    points = float(text.split(' width="')[1].split("pt")[0])
    widest = f"max-width: {points * _LARGER:.0f}pt"
    label = html.escape(alternative)
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" style="{widest}" ', 1)
