"""The table that `print(layout)` shows: lines of at most `WIDTH` characters."""

from __future__ import annotations

import itertools
import re
import textwrap
from collections.abc import Collection, Sequence

from lora_jax.system import path_groups

WIDTH = 100
Cells = tuple[str, ...]
_LEAST = 16  # characters of a wrapped column


def table(heading: Cells, rows: Sequence[tuple[str, Cells, int]], words: int, total: int) -> str:
    """Return the adapted parameters as a table, equal ones in one line.

    Args:
      heading: the names of the columns between "path" and "parameters".
      rows: of each parameter its path, its cells, and the numbers that its adapter holds.
      words: how many of these columns hold text. They are aligned to the left, the others, which
        hold numbers, to the right.
      total: the last line's number.
    """
    groups = path_groups.group({path: (cells, size) for path, cells, size in rows})
    known = {path: (cells, size) for path, cells, size in rows}
    lines: list[Cells] = [("path", "weights", *heading, "parameters")]
    for pattern, paths in groups.items():
        cells, size = known[paths[0]]
        lines.append((pattern, str(len(paths)), *cells, f"{size * len(paths):,}"))
    lines.append(("total", str(len(rows)), *[""] * len(heading), f"{total:,}"))
    if len(groups) == len(rows):  # one weight in each line
        lines = [(line[0], *line[2:]) for line in lines]
        left = set(range(words + 1))
    else:
        left = {0, *range(2, words + 2)}
    return "\n".join(_fitted(lines, left))


def remarks(title: str, rows: Sequence[tuple[str, str, str]], width: int = WIDTH) -> list[str]:
    """Return a title and (path, shape, reason) below it, equal ones together; no line for none."""
    if not rows:
        return []
    # A reason may name its own parameter: then it names the pattern of the group.
    alike = {path: (shape, reason.replace(repr(path), "\0")) for path, shape, reason in rows}
    lines = [title]
    for pattern, paths in path_groups.group(alike).items():
        shape, reason = alike[paths[0]]
        number = f"{len(paths)} of " if len(paths) > 1 else ""
        reason = reason.replace("\0", repr(pattern))
        line = f"  {pattern}  {number}{shape}  {reason}"
        if len(line) > width:
            where = wrapped(pattern, width - 4)
            lines += [f"  {part}" for part in where]
            line = f"    {number}{shape}  {reason}"
        lines += textwrap.wrap(line, width, subsequent_indent="    ", break_on_hyphens=False)
    return lines


def wrapped(text: str, width: int) -> list[str]:
    """Break a path or a list behind `/` and `,` into lines of at most `width`.

    >>> wrapped("encoder/layers_{0..5}/{query,value}/kernel", 24)
    ['encoder/layers_{0..5}/', '  {query,value}/kernel']
    """
    if len(text) <= width:
        return [text]
    lines = [""]
    for part in re.findall(r"[^/,]*[/,]?", text):
        if lines[-1].strip() and len(lines[-1]) + len(part) > width:
            lines.append("  ")
        lines[-1] += part
        while len(lines[-1]) > width:  # one name that is longer than a line
            lines[-1:] = [lines[-1][:width], f"  {lines[-1][width:]}"]
    return lines


def _fitted(lines: Sequence[Cells], left: set[int]) -> list[str]:
    """Align the columns; where they are too wide, break the texts in the widest ones."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    while sum(widths) + 2 * (len(widths) - 1) > WIDTH:
        widest = max(left, key=lambda i: widths[i])
        if widths[widest] <= _LEAST:
            break
        widths[widest] = max(_LEAST, widths[widest] - (sum(widths) + 2 * len(widths) - 2 - WIDTH))
    found: list[Cells] = []
    for line in lines:
        both = enumerate(zip(line, widths, strict=True))
        cells = [wrapped(c, w) if i in left else [c] for i, (c, w) in both]
        found += itertools.zip_longest(*cells, fillvalue="")
    return aligned(found, left, widths)


def aligned(
    rows: Sequence[Sequence[str]], left: Collection[int] = (0,), widths: Sequence[int] | None = None
) -> list[str]:
    """Return rows of cells as lines whose columns are aligned.

    Args:
      rows: the rows, which have equally many cells.
      left: the indices of the columns that are aligned to the left, and not to the right.
      widths: the widths of the columns. None: as wide as the longest cells.
    """
    widths = widths or [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        both = enumerate(zip(row, widths, strict=True))
        parts = (cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in both)
        lines.append("  ".join(parts).rstrip())
    return lines
