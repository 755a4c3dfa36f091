"""Write a report as files: report.html, which needs no other file, report.md, and the figures.

Jinja2 renders both from `templates/` and escapes HTML. `plain` escapes Markdown: a `|` in a cell
would end the cell.
"""

from __future__ import annotations

import functools
import pathlib
import re
from collections.abc import Callable, Sequence
from html import escape

import jinja2

from lora_jax.report import svg
from lora_jax.report.document import Figure, Report, Table, Term
from lora_jax.system import table, whole_files

HTML, MARKDOWN = "report.html", "report.md"
_SIGNS = re.compile(r"([\\`*|\[\]~])|(?<![A-Za-z0-9])(_)|(_)(?![A-Za-z0-9])")


def write(
    report: Report, folder: pathlib.Path, *, below: pathlib.Path | None = None
) -> pathlib.Path:
    """Write all files of a report. report.html is written last.

    Args:
      report: the report.
      folder: the folder, which is made if it does not exist.
      below: the folder that the user named, see `whole_files.write`. None: `folder`.

    Returns:
      The path of report.html.
    """
    inline: dict[str, str] = {}
    write_file = functools.partial(whole_files.write, below=below)
    for panel in report.panels:
        write_file(folder / f"{panel.name}.png", svg.png(panel.drawing))
        drawn = svg.svg(panel.drawing)
        inline[panel.name] = svg.inline(drawn, panel.name, panel.alternative)
        write_file(folder / f"{panel.name}.svg", svg.standalone(drawn).encode())
    write_file(folder / MARKDOWN, markdown(report).encode())
    write_file(folder / HTML, html(report, inline).encode())
    return folder / HTML


def html(report: Report, inline: dict[str, str]) -> str:
    """Render a report as HTML; `inline` holds the SVG element of each panel by its name."""
    environment = _environment(autoescape=True)
    environment.filters["linked"] = lambda text, but=None: linked(text, report.terms, but)
    template = environment.get_template("report.html.j2")
    return template.render(report=report, drawings=inline, lines=svg.LINES)


def linked(text: str, terms: Sequence[Term], but: Term | None = None) -> str:
    """Return a text as HTML in which the first of each term is a link to its explanation.

    If two terms begin at the same place, the longer one counts. `but` is the term that the text
    explains; it does not become a link.
    """
    found = [(match.span(), term) for term in terms if (match := term.pattern.search(text))]
    found.sort(key=lambda one: (one[0][0], -one[0][1]))
    parts, at = [], 0
    for (start, end), term in found:
        if start >= at and term is not but:
            link = f'<a class="term" href="#{term.anchor}">{escape(text[start:end])}</a>'
            parts += [escape(text[at:start]), link]
            at = end
    return "".join([*parts, escape(text[at:])])


def images(figure: Figure) -> str:
    """Return the Markdown that shows the PNG files of a figure, which are in the same folder."""
    return "\n".join(f"![{plain(p.alternative)}]({p.name}.png)" for p in figure.panels)


def markdown(report: Report, images: Callable[[Figure], str] = images) -> str:
    environment = _environment(autoescape=False)
    environment.filters |= {"plain": plain, "table": markdown_table, "images": images}
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


def plain(text: str) -> str:
    r"""Escape text so that Markdown shows it unchanged, on one line.

    >>> plain("<b>&|*"), plain("learning_rate _x_")
    ('&lt;b&gt;&amp;\\|\\*', 'learning_rate \\_x\\_')
    """
    line = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _SIGNS.sub(r"\\\g<0>", line)


def markdown_table(found: Table) -> str:
    """Render a table with padded columns, so that it can be read as plain text, too."""
    rows = [tuple(map(plain, row)) for row in found.rows]
    if found.marked is not None:
        rows[found.marked] = tuple(f"**{cell}**" for cell in rows[found.marked])
    texts = [i for i, name in enumerate(found.columns) if name in found.texts]
    rule = [":--" if i in texts else "--:" for i in range(len(found.columns))]
    lines = table.padded([tuple(map(plain, found.columns)), rule, *rows], texts)
    lines[1] = [cell.replace(" ", "-") for cell in lines[1]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
