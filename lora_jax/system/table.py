"""Tables of text: columns are aligned, and texts that are too long break behind `/` and `,`.

Every table that the package prints is made here. rich has tables and trees, too, but
`print(layout)` works without rich, which would also break a path at any letter.
"""

from __future__ import annotations

import itertools
import re
import textwrap
from collections.abc import Collection, Sequence

from lora_jax.system import path_groups

WIDTH = 100
_LEAST = 16  # characters of a column whose texts break

Cells = Sequence[str]


def aligned(
    rows: Sequence[Cells], texts: Collection[int] = (0,), width: int | None = None
) -> list[str]:
    """Return the lines of a table (see `blocks`)."""
    return list(itertools.chain.from_iterable(blocks(rows, texts, width)))


def blocks(
    rows: Sequence[Cells],
    texts: Collection[int] = (0,),
    width: int | None = None,
    indents: Sequence[str] = (),
) -> list[list[str]]:
    """Return the lines of each row of a table. A column without any text is left out.

    `texts` are the columns that hold text: they are aligned to the left, and the widest of them
    break where the table is wider than `width`. The others hold numbers, and are aligned to the
    right. `indents` has for each row what precedes its first cell where that goes on in a new line.
    """
    indents = indents or [""] * len(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    least = {i: _LEAST + (0 if i else max(map(len, indents))) for i in texts}
    while width and (over := sum(w + 2 for w in widths if w) - 2 - width) > 0:
        breaking = [i for i in texts if widths[i] > least[i]]
        if not breaking:
            break
        widest = max(breaking, key=lambda i: widths[i])
        widths[widest] = max(least[widest], widths[widest] - over)
    found = []
    for row, indent in zip(rows, indents, strict=True):
        both = enumerate(zip(row, widths, strict=True))
        cells = [wrapped(c, w, "" if i else indent) if i in texts else [c] for i, (c, w) in both]
        cells[0] += [indent] * (max(map(len, cells)) - len(cells[0]))
        lines = padded([*itertools.zip_longest(*cells, fillvalue="")], texts, widths)
        found.append(["  ".join(line).rstrip() for line in lines])
    return found


def padded(
    rows: Sequence[Cells], texts: Collection[int], widths: Sequence[int] | None = None
) -> list[list[str]]:
    """Fill the cells with spaces, so that columns are aligned; leave out columns of width 0."""
    widths = widths or [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        [
            cell.ljust(width) if i in texts else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            if width
        ]
        for row in rows
    ]


def wrapped(text: str, width: int, indent: str = "") -> list[str]:
    """Break a path, a list or a shape behind `/` and `,` and before ` x `.

    >>> wrapped("encoder/layers_{0..5}/{query,value}/kernel", 24)
    ['encoder/layers_{0..5}/', '  {query,value}/kernel']
    """
    if len(text) <= width:
        return [text]
    lines = [""]
    for part in re.split(r"(?<=[/,])|(?= x )", text):
        if lines[-1].strip() and len(lines[-1]) + len(part) > width:
            lines.append(f"{indent}  ")
            part = part.lstrip()
        lines[-1] += part
        while len(lines[-1]) > width:  # one name that is longer than a line
            lines[-1:] = [lines[-1][:width], f"{indent}  {lines[-1][width:]}"]
    return lines


def of_paths(
    heading: Cells, rows: Sequence[tuple[str, tuple[str, ...], int]], words: int, total: int
) -> str:
    """Return parameters as a table, equal ones in one line, and `total` in the last.

    Each row has the path of a parameter, its cells below `heading`, and the numbers that its
    adapter holds. The first `words` cells hold text.
    """
    known = {path: (cells, size) for path, cells, size in rows}
    groups = path_groups.group(known)
    lines: list[Cells] = [("path", "weights", *heading, "parameters")]
    for pattern, paths in groups.items():
        cells, size = known[paths[0]]
        lines.append((pattern, str(len(paths)), *cells, f"{size * len(paths):,}"))
    lines.append(("total", str(len(rows)), *[""] * len(heading), f"{total:,}"))
    if len(groups) == len(rows):  # one weight in each line
        lines = [(path, "", *others) for path, _, *others in lines]
    return "\n".join(aligned(lines, (0, *range(2, words + 2)), WIDTH))


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
            lines += [f"  {part}" for part in wrapped(pattern, width - 4)]
            line = f"    {number}{shape}  {reason}"
        lines += textwrap.wrap(line, width, subsequent_indent="    ", break_on_hyphens=False)
    return lines
