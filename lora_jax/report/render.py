"""Write a report as files: report.html, which needs no other file, report.md, and the figures.

Jinja2 makes both from the templates in `templates`, and escapes HTML. Markdown is escaped here, by
`_plain`: tabulate's Markdown tables leave a `|` in a cell as it is, which ends the cell.
"""

from __future__ import annotations

import os
import pathlib
import re

import jinja2

from lora_jax.report import svg
from lora_jax.report.document import Figure, Report, Table

HTML, MARKDOWN = "report.html", "report.md"
_SIGNS = re.compile(r"([\\`*|\[\]~])|(?<![A-Za-z0-9])(_)|(_)(?![A-Za-z0-9])")


def write(report: Report, folder: pathlib.Path, *, figure_files: bool = True) -> pathlib.Path:
    """Write all files into `folder`, which is made; report.html comes last.

    Args:
      report: what is written.
      folder: where to.
      figure_files: write each figure as SVG and PNG too, which report.md shows. Without them
        report.md says what each figure shows, and refers to report.html.

    Returns:
      The path of report.html.
    """
    folder.mkdir(parents=True, exist_ok=True)
    inline: dict[str, str] = {}
    for panel in report.panels:
        if isinstance(panel.drawing, str):
            assert not figure_files, f"{panel.name} is kept as a part of a page, not as a figure"
            inline[panel.name] = panel.drawing
            continue
        drawn = svg.svg(panel.drawing)
        inline[panel.name] = svg.inline(drawn, panel.name, panel.alternative)
        if figure_files:
            _put(folder / f"{panel.name}.svg", svg.standalone(drawn).encode())
            _put(folder / f"{panel.name}.png", svg.png(panel.drawing))
    _put(folder / MARKDOWN, markdown(report, figure_files).encode())
    _put(folder / HTML, html(report, inline).encode())
    return folder / HTML


def html(report: Report, inline: dict[str, str]) -> str:
    """The page.

    Args:
      report: what it says.
      inline: the SVG of each panel, by its name.
    """
    template = _environment(autoescape=True).get_template("report.html.j2")
    return template.render(report=report, drawings=inline)


def drawings(page: str) -> dict[str, str]:
    """Return the SVG of each panel of a page that `html` made, by the panel's name."""
    return dict(re.findall(r'<div class="panel" id="([\w-]+)">(.*?)</div>', page, re.DOTALL))


def markdown(report: Report, figure_files: bool = True) -> str:
    """Return the report as Markdown, which shows the PNG files in its folder if there are any."""
    environment = _environment(autoescape=False)
    images = _images if figure_files else _alternatives
    environment.filters |= {"plain": _plain, "table": markdown_table, "images": images}
    text = environment.get_template("report.md.j2").render(report=report)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _environment(autoescape: bool) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lora_jax.report"),
        autoescape=autoescape,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["kind"] = lambda block: type(block).__name__
    return environment


def _plain(text: str) -> str:
    r"""Text that Markdown shows as it is, in one line.

    >>> _plain("<b>&|*"), _plain("learning_rate _x_")
    ('&lt;b&gt;&amp;\\|\\*', 'learning_rate \\_x\\_')
    """
    line = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _SIGNS.sub(r"\\\g<0>", line)


def markdown_table(table: Table) -> str:
    """Columns as wide as what is in them, so that it can be read as it stands, too."""
    lines = [tuple(map(_plain, line)) for line in (table.columns, *table.rows)]
    if table.marked is not None:
        lines[table.marked + 1] = tuple(f"**{cell}**" for cell in lines[table.marked + 1])
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(table.columns))]
    left = [name in table.texts for name in table.columns]

    def row(cells: tuple[str, ...]) -> str:
        places = zip(cells, widths, left, strict=True)
        return f"| {' | '.join(c.ljust(w) if first else c.rjust(w) for c, w, first in places)} |"

    dashes = ["-" * (w - 1) for w in widths]
    rule = (f":{d}" if first else f"{d}:" for d, first in zip(dashes, left, strict=True))
    return "\n".join([row(lines[0]), f"| {' | '.join(rule)} |", *map(row, lines[1:])])


def _images(figure: Figure) -> str:
    return "\n".join(f"![{_plain(p.alternative)}]({p.name}.png)" for p in figure.panels)


def _alternatives(figure: Figure) -> str:
    shown = [f"- {_plain(p.alternative)}" for p in figure.panels]
    return "\n".join([f"Drawn in [{HTML}]({HTML}):", "", *shown])


def _put(path: pathlib.Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_bytes(content)
    os.replace(partial, path)
