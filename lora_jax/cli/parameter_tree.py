"""Parameters as a tree in which equal branches are one, and its lines on a terminal."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from lora_jax.system.console import Console, say_table
from lora_jax.system.path_groups import segment


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A parameter as it is shown; equal ones are shown once.

    axes: its axes with their roles.
    note: a word on how it is used; may be empty.
    """

    axes: str
    dtype: str
    size: int
    note: str = ""
    adapted: bool = False


@dataclasses.dataclass(frozen=True)
class Branch:
    """A segment of paths, or several with equal trees below them, and the tree below.

    rest: segments that every path below has in common, each with a `/` before it.
    """

    names: tuple[str, ...]
    below: tuple[Branch, ...] | Leaf
    rest: str = ""

    @property
    def name(self) -> str:
        return segment(self.names) + self.rest

    @property
    def size(self) -> int:
        if isinstance(self.below, Leaf):
            return self.below.size
        return sum(len(branch.names) * branch.size for branch in self.below)


def tree(leaves: Mapping[str, Leaf]) -> tuple[Branch, ...]:
    """Return the branches at the root, given path -> parameter.

    >>> weight = Leaf("8 in x 8 out", "float32", 64)
    >>> made = tree({f"layers/{i}/{x}/kernel": weight for i in range(3) for x in "qv"})
    >>> made[0].names, made[0].size, made[0].below[0].name, made[0].below[0].below[0].name
    (('layers',), 384, '{0..2}', '{q,v}/kernel')
    """
    return _branches([(path.split("/"), leaf) for path, leaf in leaves.items()])


def _branches(rows: Sequence[tuple[list[str], Leaf]]) -> tuple[Branch, ...]:
    children: dict[str, list[tuple[list[str], Leaf]]] = {}
    for (first, *rest), leaf in rows:
        children.setdefault(first, []).append((rest, leaf))
    equal: dict[tuple[Branch, ...] | Leaf, list[str]] = {}
    for name, inner in children.items():
        path, leaf = inner[0]
        equal.setdefault(leaf if not path else _branches(inner), []).append(name)
    return tuple(_joined(Branch(tuple(names), below)) for below, names in equal.items())


def _joined(branch: Branch) -> Branch:
    """Join a branch with the only name below it."""
    if isinstance(branch.below, Leaf) or len(branch.below) > 1:
        return branch
    (one,) = branch.below
    if len(one.names) > 1:
        return branch
    return Branch(branch.names, one.below, f"/{one.name}")


class Signs(NamedTuple):
    """The characters that the lines of a tree are made of."""

    mark: str  # before a parameter that is adapted
    fork: str  # before a branch
    last: str  # before the last branch
    bar: str  # before what is below a branch that is not the last


BLOCKS = Signs("●", "├─ ", "└─ ", "│  ")
ASCII = Signs("*", "|- ", "`- ", "|  ")


class _Line(NamedTuple):
    lead: str  # what precedes the name
    indent: str  # what precedes the rest of a name that does not fit
    cells: tuple[str, str, str, str, str]  # name, axes, dtype, numbers and note
    adapted: bool


def draw(branches: Sequence[Branch], console: Console) -> Signs:
    """Print a tree, and return the signs that the terminal can show."""
    signs = ASCII if console.options.ascii_only else BLOCKS
    lines = [line for branch in branches for line in _lines(branch, "", "", signs)]
    blank = " " * len(signs.mark)
    rows = [
        (f"{signs.mark if adapted else blank} {lead}{name}", *others)
        for lead, _, (name, *others), adapted in lines
    ]
    indents = [f"{blank} {line.indent}" for line in lines]
    styles = {number: "green" for number, line in enumerate(lines) if line.adapted}
    say_table(console, rows, (0, 1, 2, 4), styles=styles, indents=indents)
    return signs


def _lines(branch: Branch, lead: str, indent: str, signs: Signs) -> Iterator[_Line]:
    count, leaf = len(branch.names), branch.below
    size = f"{f'{count} x ' if count > 1 else ''}{branch.size:,}"
    if isinstance(leaf, Leaf):
        cells = (branch.name, leaf.axes, leaf.dtype, size, leaf.note)
        yield _Line(lead, indent, cells, leaf.adapted)
        return
    equal = f"{count} equal" if count > 1 else ""
    yield _Line(lead, indent + signs.bar, (branch.name, equal, "", size, ""), False)
    for one in leaf:
        last = one is leaf[-1]
        below = indent + (" " * len(signs.bar) if last else signs.bar)
        yield from _lines(one, indent + (signs.last if last else signs.fork), below, signs)
