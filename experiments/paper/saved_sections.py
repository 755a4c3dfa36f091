"""Convert sections of a report to JSON values and back.

The figures are not among them: they are read from the page, report.html.

>>> section = Section("Scores", (Paragraph("Of one run."), Table("All", ("split",), (("test",),))))
>>> read(plain(section), {}) == section
True
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lora_jax.report.document import Block, Figure, Note, Panel, Paragraph, Section, Table


def plain(section: Section) -> dict[str, Any]:
    """Return a section as JSON values."""
    return {"title": section.title, "blocks": [_plain(block) for block in section.blocks]}


def read(found: Any, drawings: Mapping[str, str]) -> Section:
    """Return the section of the JSON values that `plain` returned."""
    return Section(found["title"], tuple(_block(block, drawings) for block in found["blocks"]))


def _plain(block: Block) -> dict[str, Any]:
    if isinstance(block, Figure):
        panels = [{"name": p.name, "alternative": p.alternative} for p in block.panels]
        return {"kind": "Figure", "caption": block.caption, "panels": panels}
    return {"kind": type(block).__name__, **dataclasses.asdict(block)}


def _block(found: Any, drawings: Mapping[str, str]) -> Block:
    fields = {name: value for name, value in found.items() if name != "kind"}
    match found["kind"]:
        case "Paragraph":
            return Paragraph(**fields)
        case "Note":
            return Note(**fields)
        case "Table":
            rows = tuple(map(tuple, fields.pop("rows")))
            columns, texts = tuple(fields.pop("columns")), tuple(fields.pop("texts"))
            return Table(**fields, columns=columns, rows=rows, texts=texts)
        case "Figure":
            panels = tuple(
                Panel(**panel, drawing=drawings[panel["name"]]) for panel in fields["panels"]
            )
            return Figure(fields["caption"], panels)
        case kind:
            raise ValueError(f"there is no block of the kind {kind!r}")
