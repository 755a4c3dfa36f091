"""The parts of a report before it is HTML or Markdown: sections, paragraphs, tables, figures.

All text is plain text: a name with `<`, `&`, `*` or `|` in it is shown as it is, whatever the
format. Numbers are texts already, so that every format has the same digits.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

from lora_jax.errors import LoraError


@dataclasses.dataclass(frozen=True)
class Fact:
    """One of the numbers that a report begins with.

    note: what makes sense of the number, in a few words.
    """

    label: str
    value: str
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Paragraph:
    """A paragraph."""

    text: str


@dataclasses.dataclass(frozen=True)
class Note:
    """A paragraph on what is missing, and how it is to be had."""

    text: str


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells of text under a caption.

    texts: the columns that are no numbers; all others are aligned to the right.
    marked: the number of a row that stands out.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    texts: tuple[str, ...] = ()
    marked: int | None = None

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise LoraError(
                    f"table {self.caption!r}: the row {row} has {len(row)} cells for the columns "
                    f"{self.columns}"
                )


@dataclasses.dataclass(frozen=True)
class Panel:
    """One picture.

    name: of its files; letters, digits, `-` and `_`.
    alternative: what it shows, in words and numbers, for those who do not see it.
    drawing: a matplotlib Figure, made within `lora_jax.report.svg.style()`.
    """

    name: str
    alternative: str
    drawing: Any


@dataclasses.dataclass(frozen=True)
class Figure:
    """Panels side by side, or below each other where there is no room, under one caption."""

    caption: str
    panels: tuple[Panel, ...]


@dataclasses.dataclass(frozen=True)
class Term:
    """A word that the report explains.

    names: its forms in texts; the first is that of the explanation.
    meaning: the explanation.
    anchor: of the explanation, on the page and on the documentation site.
    link: where the documentation site explains it; None where no address of that is known.
    """

    names: tuple[str, ...]
    meaning: str
    anchor: str
    link: str | None = None

    @functools.cached_property
    def pattern(self) -> re.Pattern[str]:
        """Finds any of the names as a word of its own."""
        longest = sorted(self.names, key=len, reverse=True)
        return re.compile(rf"(?<![\w.‖])(?:{'|'.join(map(re.escape, longest))})(?![\w‖]|\.\w)")


@dataclasses.dataclass(frozen=True)
class Glossary:
    """Terms with their explanations, to which the report's texts link."""

    terms: tuple[Term, ...]


Block = Paragraph | Note | Table | Figure | Glossary


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading and what is below it."""

    title: str
    blocks: tuple[Block, ...]


@dataclasses.dataclass(frozen=True)
class Report:
    """All of it.

    kind: what it is about, in a word or two, above the title.
    lead: a sentence or two below the title.
    facts: the numbers that one came for.
    notes: what has to be known before anything else is read.
    """

    kind: str
    title: str
    lead: str
    facts: tuple[Fact, ...]
    sections: tuple[Section, ...]
    notes: tuple[Note, ...] = ()

    def __post_init__(self) -> None:
        names = [panel.name for panel in self.panels]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise LoraError(
                f"report {self.title!r}: more than one picture is named {', '.join(twice)}, and "
                "each needs files of its own"
            )

    @property
    def panels(self) -> tuple[Panel, ...]:
        """Every picture, in order."""
        figures = (b for s in self.sections for b in s.blocks if isinstance(b, Figure))
        return tuple(panel for figure in figures for panel in figure.panels)

    @property
    def terms(self) -> tuple[Term, ...]:
        """Every term that it explains."""
        glossaries = (b for s in self.sections for b in s.blocks if isinstance(b, Glossary))
        return tuple(term for glossary in glossaries for term in glossary.terms)
