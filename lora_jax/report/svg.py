"""Style the figures, and convert them to PNG and to SVG for a page.

On a page, text and axes take the colour of the text around them, so that one drawing serves light
and dark pages: they are drawn in a colour that nothing else has, and `inline` replaces it with
`currentColor`. Lines take the colours of the page's theme. Letters are drawn as outlines, so that a
page does not depend on installed fonts.
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
from matplotlib.rcsetup import cycler

_LARGER = 1.2  # a page may enlarge a drawing by at most this factor
INK = "#010203"  # the placeholder for the colour of the text
# The colour of a line on a white page -> on a dark one; a page has them as `--line-0`, ...
LINES = {
    "#1c5fa8": "#7ab8ff",
    "#a84a00": "#ffae5c",
    "#1a7040": "#6fd69a",
    "#7a3fb0": "#cfa8ff",
    "#b3224d": "#ff9ab3",
    "#0b6d73": "#66d4da",
}
_STYLE: Any = {
    "axes.prop_cycle": cycler(color=list(LINES)),
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
    "grid.color": "#7c8796",  # visible on light and on dark pages
    "svg.fonttype": "path",
    "svg.hashsalt": "lora_jax",  # makes the same report the same file every time
    "text.parse_math": False,  # a `$` in a name does not begin a formula
}
_NOTHING = dict.fromkeys(("Date", "Creator", "Format", "Type"))


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Apply the report's style to figures that are made or saved inside the `with` block."""
    with mpl.rc_context(_STYLE):
        yield


@contextlib.contextmanager
def drawing(width: float = 4.6, height: float = 3.4) -> Iterator[tuple[Figure, Any]]:
    """Yield a new figure of this size in inches, and its one set of axes, in the report's style."""
    with style():
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)  # a canvas is needed to measure text, which keeps labels apart
        yield figure, figure.subplots()


def png(figure: Figure) -> bytes:
    """Return a figure as the bytes of a PNG file, dark on white."""
    file = io.BytesIO()
    with style():
        figure.savefig(file, format="png", dpi=150, facecolor="white")
    figure.set_layout_engine("none")  # the next file has the same layout, which takes long to make
    return file.getvalue()


def svg(figure: Figure) -> str:
    """Return a figure as an SVG element without comments, metadata or document type."""
    file = io.StringIO()
    with style():
        figure.savefig(file, format="svg", metadata=_NOTHING)
    text = file.getvalue()
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = text[text.index("<svg") :]
    return "\n".join(line.strip() for line in text.splitlines() if line.strip())


def standalone(element: str) -> str:
    """Return the SVG of `svg` as a file, dark on white."""
    return element.replace("<svg ", '<svg style="background: white" ', 1) + "\n"


def inline(element: str, name: str, alternative: str) -> str:
    """Return the SVG of `svg` for use inside an HTML page.

    `name` is a prefix for every id, because all drawings of a page share one namespace.
    `alternative` is the text that a screen reader reads.
    """
    text = re.sub(r'\bid="', f'id="{name}-', element)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    text = text.replace("url(#", f"url(#{name}-").replace(INK, "currentColor")
    for number, color in enumerate(LINES):
        text = text.replace(color, f"var(--line-{number})")
    points = float(text.split(' width="')[1].split("pt")[0])
    widest = f"max-width: {points * _LARGER:.0f}pt"
    label = html.escape(alternative)
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" style="{widest}" ', 1)
