"""The pages of docs/ as programs: blocks of Python, the output they print, and commands."""

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
MADE = ("api/generated", "paper", "sequel")  # written by programs
_FENCE = re.compile(r"^(?P<fence>```+)(?P<language>.*?)\n(?P<code>.*?)^(?P=fence)$", re.M | re.S)
_CHECKER, _LOOSE = doctest.OutputChecker(), doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
_HEADING = re.compile(r"^## (.*)$", re.M)


class Block(NamedTuple):
    """One fenced block of a page."""

    language: str
    code: str
    line: int  # number of its first line of code, from 1
    section: str  # the heading of level two above it; "" before the first


def names() -> list[str]:
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
    """The text with blanks in place of code, in which `## ` starts a comment and not a heading."""
    return _FENCE.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), text)


def sections(name: str) -> list[str]:
    """The headings above Python blocks, in order."""
    return list(dict.fromkeys(b.section for b in blocks(name) if b.language == "python"))


def run(
    name: str, some: Iterable[str] | None = None, instead: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Run a page's Python blocks in order and return the names that they define.

    Args:
      name: the page.
      some: the sections to run; all of them for None.
      instead: values that replace names of the blocks before the first heading.

    Raises:
      AssertionError: a block of the language `output` differs from the text printed before it.
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
            except ValueError:  # the quotation continues in the next line
                line += " "
                continue
            line = ""
            while "&&" in words:
                cut = words.index("&&")
                found.append(words[:cut])
                words = words[cut + 1 :]
            found.append(words)
    return [words for words in found if words]
