"""Sections of a report as values of JSON, and back.

A picture is not in them: it is read from the files that `render.write` puts beside the page.

>>> section = Section("Scores", (Text("Of one run."), Table("All", ("split",), (("test",),))))
>>> read(plain(section), pathlib.Path()) == section
True
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

from lora_jax.report import svg as ink
from lora_jax.report.document import Block, Figure, Note, Panel, Section, Table, Text


def plain(section: Section) -> dict[str, Any]:
    """As values of JSON."""
    return {"title": section.title, "blocks": [_plain(block) for block in section.blocks]}


def read(found: Any, folder: pathlib.Path) -> Section:
    """What `plain` gave, after it has been through JSON.

    Args:
      folder: where the pictures are.

    Raises:
      KeyError, TypeError, ValueError: it is something else.
      OSError: a picture is not there.
    """
    return Section(found["title"], tuple(_block(block, folder) for block in found["blocks"]))


def _plain(block: Block) -> dict[str, Any]:
    if isinstance(block, Figure):
        panels = [{"name": p.name, "alternative": p.alternative} for p in block.panels]
        return {"kind": "Figure", "caption": block.caption, "panels": panels}
    return {"kind": type(block).__name__, **dataclasses.asdict(block)}


def _block(found: Any, folder: pathlib.Path) -> Block:
    fields = {name: value for name, value in found.items() if name != "kind"}
    match found["kind"]:
        case "Text":
            return Text(**fields)
        case "Note":
            return Note(**fields)
        case "Table":
            rows = tuple(map(tuple, fields.pop("rows")))
            columns, texts = tuple(fields.pop("columns")), tuple(fields.pop("texts"))
            return Table(**fields, columns=columns, rows=rows, texts=texts)
        case "Figure":
            panels = tuple(
                Panel(**panel, drawing=_drawn(folder, panel["name"])) for panel in fields["panels"]
            )
            return Figure(fields["caption"], panels)
        case kind:
            raise ValueError(f"no block is a {kind!r}")


def _drawn(folder: pathlib.Path, name: str) -> ink.Drawn:
    svg, png = (folder / f"{name}.{kind}" for kind in ("svg", "png"))
    return ink.Drawn(ink.element(svg.read_text()), png.read_bytes())
