"""The pages of docs/, as what runs: blocks of Python, what they print, and commands."""

from __future__ import annotations

import contextlib
import doctest
import io
import pathlib
import re
import shlex
import sys
import types
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
MADE = ("api/generated", "paper")  # made by programs
_FENCE = re.compile(r"^(?P<fence>```+)(?P<language>.*?)\n(?P<code>.*?)^(?P=fence)$", re.M | re.S)
_CHECKER, _LOOSE = doctest.OutputChecker(), doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
_HEADING = re.compile(r"^## (.*)$", re.M)


class Block(NamedTuple):
    """One fenced block of a page."""

    language: str
    code: str
    line: int  # of its first line of code, from 1
    section: str  # the heading of the second level above it, "" before the first


def names() -> list[str]:
    """All pages that people wrote, by their path under docs/ without the suffix."""
    found = (path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
    return sorted(name.removesuffix(".md") for name in found if not name.startswith(MADE))


def blocks(name: str) -> list[Block]:
    text = (DOCS / f"{name}.md").read_text()
    headings = [(m.start(), m[1]) for m in _HEADING.finditer(_without_code(text))]

    def section(position: int) -> str:
        return next((title for at, title in reversed(headings) if at < position), "")

    return [
        Block(m["language"], m["code"], text[: m.start("code")].count("\n") + 1, section(m.start()))
        for m in _FENCE.finditer(text)
    ]


def _without_code(text: str) -> str:
    """The text with blanks for code, where `## ` is a comment and no heading."""
    return _FENCE.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), text)


def sections(name: str) -> list[str]:
    """The headings above Python blocks, in their order."""
    return list(dict.fromkeys(b.section for b in blocks(name) if b.language == "python"))


def run(
    name: str, some: Iterable[str] | None = None, instead: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Run a page's Python blocks in order and return their names.

    Args:
      name: of the page.
      some: the sections to run; all if it is None.
      instead: values that names of the blocks before the first heading get after these.

    Raises:
      AssertionError: a block of the language `output` is not what the block before it printed.
    """
    module = types.ModuleType("page")  # dataclasses look their module up
    before, printed = sys.modules.get("page"), ""
    sys.modules["page"] = module
    try:
        for block in blocks(name):
            if some is not None and block.section not in some:
                continue
            where = f"docs/{name}.md:{block.line}"
            if block.language == "python":
                code = compile("\n" * (block.line - 1) + block.code, f"docs/{name}.md", "exec")
                with contextlib.redirect_stdout(io.StringIO()) as out:
                    exec(code, module.__dict__)
                if not block.section:
                    module.__dict__.update(instead or {})
                printed = out.getvalue()
            elif block.language == "output":
                assert _CHECKER.check_output(block.code, printed, _LOOSE), f"{where}: {printed}"
    finally:
        if before is None:
            del sys.modules["page"]
        else:
            sys.modules["page"] = before
    return module.__dict__


def commands(name: str) -> list[list[str]]:
    """The commands of a page's shell blocks, as words."""
    found = []
    for block in blocks(name):
        if block.language not in ("sh", "console", "bash"):
            continue
        line = ""
        for part in re.sub(r"\\\n\s*", " ", block.code).splitlines():
            line += part.removeprefix("$ ")
            try:
                words = shlex.split(line, comments=True)
            except ValueError:  # a quotation that goes on in the next line
                line += " "
                continue
            line = ""
            while "&&" in words:
                cut = words.index("&&")
                found.append(words[:cut])
                words = words[cut + 1 :]
            found.append(words)
    return [words for words in found if words]
