"""The parts of a report before it is HTML or Markdown: sections, paragraphs, tables, figures.

All text is plain text: a name that contains `<`, `&`, `*` or `|` is shown unchanged in every
format. Numbers are formatted before they get here, so that every format shows the same digits.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

from lora_jax.errors import LoraError


@dataclasses.dataclass(frozen=True)
class Fact:
    """One of the main numbers, which a report shows at the top.

    note: a few words that explain the number.
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
    """A paragraph that says what is missing and how to get it."""

    text: str


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of text cells under a caption.

    Attributes:
      caption: the text above it.
      columns: their headings.
      rows: the cells, as many in each row as there are columns.
      texts: the columns that hold text; all other columns are aligned to the right.
      marked: the index of the row that is highlighted.
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

    name: the name of its files, made of letters, digits, `-` and `_`.
    alternative: the alternative text for people who do not see the picture.
    drawing: a matplotlib Figure, made inside `lora_jax.report.svg.style()`.
    """

    name: str
    alternative: str
    drawing: Any


@dataclasses.dataclass(frozen=True)
class Figure:
    """Panels under one caption, in a row if there is room and in a column if there is not.

    Attributes:
      caption: the text below them.
      panels: the pictures.
    """

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
    """A section.

    Attributes:
      title: its heading.
      blocks: what follows it: texts, tables and figures.
    """

    title: str
    blocks: tuple[Block, ...]


@dataclasses.dataclass(frozen=True)
class Report:
    """A whole report.

    Attributes:
      kind: the kind of report in a word or two, shown above the title.
      title: the title of the page.
      lead: a sentence or two below the title.
      facts: the main numbers.
      sections: all the rest.
      notes: what the reader must know before the rest.
      verdict: the result in a sentence or two, above the lead.
      command: what the verdict says to do next.
    """

    kind: str
    title: str
    lead: str
    facts: tuple[Fact, ...]
    sections: tuple[Section, ...]
    notes: tuple[Note, ...] = ()
    verdict: str = ""
    command: str = ""

    def __post_init__(self) -> None:
        names = [panel.name for panel in self.panels]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise LoraError(
                f"report {self.title!r}: more than one picture is named {', '.join(twice)}, and "
                "each needs files of its own"
            )

    @property
    def panels(self) -> tuple[Panel, ...]:
        figures = (b for s in self.sections for b in s.blocks if isinstance(b, Figure))
        return tuple(panel for figure in figures for panel in figure.panels)

    @property
    def terms(self) -> tuple[Term, ...]:
        glossaries = (b for s in self.sections for b in s.blocks if isinstance(b, Glossary))
        return tuple(term for glossary in glossaries for term in glossary.terms)
