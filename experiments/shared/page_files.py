"""Write the page: report.html, which contains its figures, and report.md, which refers to them.

A figure is drawn, or it is the SVG of an earlier page if the experiment has no runs here.
"""

from __future__ import annotations

import pathlib
import re

from lora_jax.report import render, svg
from lora_jax.report.document import Figure, Panel, Report
from lora_jax.report.render import HTML, MARKDOWN, plain
from lora_jax.system import whole_files


def write(report: Report, folder: pathlib.Path) -> pathlib.Path:
    """Write both files into `folder`, make it if needed, and return the path of report.html."""
    folder.mkdir(parents=True, exist_ok=True)
    inline = {panel.name: _inline(panel) for panel in report.panels}
    whole_files.write(folder / MARKDOWN, render.markdown(report, _alternatives).encode())
    whole_files.write(folder / HTML, render.html(report, inline).encode())
    return folder / HTML


def drawings(page: str) -> dict[str, str]:
    """Return the SVG of each panel of a page that `write` made, by the panel's name."""
    return dict(re.findall(r'<div class="panel" id="([\w-]+)">(.*?)</div>', page, re.DOTALL))


def _inline(panel: Panel) -> str:
    if isinstance(panel.drawing, str):
        return panel.drawing
    return svg.inline(svg.svg(panel.drawing), panel.name, panel.alternative)


def _alternatives(figure: Figure) -> str:
    shown = [f"- {plain(p.alternative)}" for p in figure.panels]
    return "\n".join([f"Drawn in [{HTML}]({HTML}):", "", *shown])
