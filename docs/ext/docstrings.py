"""Prepare docstrings for Sphinx: the package writes them as plain text with code in backticks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from sphinx.application import Sphinx

_KEPT = re.compile(r"(`[^`]+`|\*\*[^\s*][^*]*\*\*)")  # code and bold text
_SPECIAL = re.compile(r"\*|\||(?<=\w)_(?=\W|$)")
_SECTION = re.compile(r"[A-Z][a-z]+:")
_ALIAS = "Alias for field number"


def prepare(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Turn plain text into reStructuredText, in place: code blocks, lists, stars and bars.

    Napoleon takes "text: more" for "type: text" in the first line of an attribute's docstring. An
    empty comment before it prevents that.
    """
    if what == "data" and lines and (type(obj).__doc__ or "").startswith(lines[0]):
        lines[:] = [f"``{obj!r}``"]  # the docstring is of the type, and Python's own
        return
    text = [line for part in _parts(lines) for line in part]
    lines[:] = [*(["..", ""] if what in ("attribute", "data", "property") else []), *text, ""]


def _parts(lines: list[str]) -> Iterator[list[str]]:
    """Give the paragraphs of a docstring: sections, code, lists, and text."""
    section = False
    for part in _paragraphs(lines):
        first = part[0]
        indents = [len(line) - len(line.lstrip()) for line in part]
        if indents[0] == 0:
            section = _SECTION.fullmatch(first) is not None
        if first.lstrip().startswith(">>>"):
            yield [*part, ""]
        elif indents[0] >= 4 and not section:
            yield ["::", "", *part, ""]
        elif indents[0] == 0 and max(indents) > 0 and not section and not _is_list(first):
            bullets = ("  " if indent else "* " for indent in indents)
            texts = map(str.strip, _escaped(part))
            yield [*map("".join, zip(bullets, texts, strict=True)), ""]
        elif section:
            yield [*_nested(_escaped(part)), ""]
        else:
            yield [*_escaped(part), ""]


def _nested(part: list[str]) -> list[str]:
    """Make a list of the alternatives in an argument's entry, which are one a line.

    An entry is indented by 2 and its text by 4. A line that is indented by more belongs to the line
    before it.
    """
    found: list[str] = []
    for entry in _entries(part):
        if not any(line.startswith("      ") for line in entry):
            found += entry
            continue
        found += [entry[0], ""]
        found += [("      " if x.startswith("      ") else "    * ") + x.strip() for x in entry[1:]]
        found.append("")
    return found


def _entries(part: list[str]) -> Iterator[list[str]]:
    entry: list[str] = []
    for line in part:
        if entry and not line.startswith("    "):
            yield entry
            entry = []
        entry.append(line)
    yield entry


def _paragraphs(lines: list[str]) -> Iterator[list[str]]:
    part: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            part.append(line)
        elif part:
            yield part
            part = []


def _is_list(line: str) -> bool:
    return re.match(r"([-*]|\d+\.) ", line) is not None


def _escaped(lines: list[str]) -> list[str]:
    """Turn code in single backticks into code in double ones, and escape the rest."""
    parts = _KEPT.split("\n".join(lines))
    for i, part in enumerate(parts):
        if i % 2 == 0:
            parts[i] = _SPECIAL.sub(r"\\\g<0>", part)
        elif part.startswith("`"):
            glued = parts[i + 1][:1].isalnum()  # `Array`s needs a mark after the code
            parts[i] = f"`{part}`" + ("\\ " if glued else "")
    return "".join(parts).split("\n")


def skip(app: Sphinx, what: str, name: str, obj: Any, skipped: bool, options: Any) -> bool | None:
    """Leave out the fields of a NamedTuple that have no docstring of their own."""
    return True if (getattr(obj, "__doc__", None) or "").startswith(_ALIAS) else None


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect the functions before napoleon, which reads the sections."""
    app.connect("autodoc-process-docstring", prepare, priority=100)
    app.connect("autodoc-skip-member", skip)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
