"""Draw a tree of parameters as lines for a terminal."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from rich.text import Text

from lora_jax.cli.show.tree import Branch, Leaf
from lora_jax.system.layout_table import wrapped

ADAPTED = "green"  # the style of a line
_NAME, _AXES = 10, 22  # the least that names and axes are wrapped to


@dataclasses.dataclass(frozen=True)
class Signs:
    """The characters that the lines of a tree are made of.

    Attributes:
      mark: before a parameter that is adapted.
      fork, last: before a branch, and before the last one.
      bar: before what is below a branch that is not the last.
    """

    mark: str
    fork: str
    last: str
    bar: str


BLOCKS = Signs("●", "├─ ", "└─ ", "│  ")
ASCII = Signs("*", "|- ", "`- ", "|  ")


@dataclasses.dataclass(frozen=True)
class _Line:
    """A line before it is as wide as the others.

    Attributes:
      lead: what is before the name.
      hang: what is before the rest of a name that does not fit.
      name: of the branch.
      cells: axes, dtype, numbers and note.
      adapted: whether the line is marked.
    """

    lead: str
    hang: str
    name: str
    cells: tuple[str, str, str, str]
    adapted: bool


def draw(branches: Sequence[Branch], width: int, signs: Signs) -> list[Text]:
    """Return the lines of a tree.

    Args:
      branches: those at its root.
      width: the most characters of a line. What does not fit goes on in the next line.
      signs: `BLOCKS`, or `ASCII` for a terminal that has no others.
    """
    lines = [line for branch in branches for line in _lines(branch, "", "", signs)]
    widths = [max(len(line.cells[i]) for line in lines) for i in range(4)]
    name = max(len(line.lead + line.name) for line in lines)
    rest = width - len(signs.mark) - 1 - sum(2 + w for w in widths if w)
    deepest = max(len(line.lead) for line in lines)
    name = min(name, max(rest, deepest + _NAME))
    if rest < name:
        widths[0] = min(widths[0], max(widths[0] - (name - rest), _AXES))
    return [text for line in lines for text in _texts(line, name, widths, signs)]


def _lines(branch: Branch, lead: str, hang: str, signs: Signs) -> Iterator[_Line]:
    count, leaf = len(branch.names), branch.below
    times = f"{count} x " if count > 1 else ""
    size = f"{times}{branch.size:,}"
    if isinstance(leaf, Leaf):
        cells = (leaf.axes, leaf.dtype, size, leaf.note)
        yield _Line(lead, hang, branch.name, cells, leaf.adapted)
        return
    equal = f"{count} equal" if count > 1 else ""
    yield _Line(lead, hang + signs.bar, branch.name, (equal, "", size, ""), False)
    for one in leaf:
        last = one is leaf[-1]
        below = hang + (" " * len(signs.bar) if last else signs.bar)
        yield from _lines(one, hang + (signs.last if last else signs.fork), below, signs)


def _texts(line: _Line, name: int, widths: Sequence[int], signs: Signs) -> Iterator[Text]:
    """The lines of the terminal that one line takes."""
    mark = signs.mark if line.adapted else " " * len(signs.mark)
    axes, *others = line.cells
    names = wrapped(line.name, name - len(line.lead))
    shapes = _wrapped_axes(axes, widths[0])
    for i in range(max(len(names), len(shapes))):
        lead = line.hang if i else line.lead
        lead = lead.ljust(len(line.lead))
        text = names[i] if i < len(names) else ""
        cells = (shapes[i] if i < len(shapes) else "", *([""] * 3 if i else others))
        aligned = [cells[0].ljust(widths[0]), cells[1].ljust(widths[1]), cells[2].rjust(widths[2])]
        shown = "".join(f"  {x}" for x, w in zip((*aligned, cells[3]), widths, strict=True) if w)
        style = ADAPTED if line.adapted else ""
        start = f"{' ' * len(mark) if i else mark} "
        rest = f"{text.ljust(name - len(lead))}{shown}".rstrip()
        yield Text.assemble((start, style), (lead, "dim"), (rest, style))


def _wrapped_axes(axes: str, width: int) -> list[str]:
    """Break `8 layers x 64 in x 32 out` before an `x`.

    >>> _wrapped_axes("8 layers x 64 in x 32 out", 18)
    ['8 layers x 64 in', '  x 32 out']
    """
    first, *rest = axes.split(" x ")
    lines = [first]
    for part in rest:
        if len(lines[-1]) + len(part) + 3 <= width:
            lines[-1] += f" x {part}"
        else:
            lines.append(f"  x {part}")
    return lines
