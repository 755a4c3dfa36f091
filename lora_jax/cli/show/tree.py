"""Parameters as a tree in which equal branches are one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from lora_jax.system.path_groups import segment


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A parameter as it is shown; equal ones are shown once.

    Attributes:
      axes: its axes with their roles.
      dtype: of its numbers.
      size: how many numbers it has.
      note: a word on how it is used; may be empty.
      adapted: whether some target matches it.
    """

    axes: str
    dtype: str
    size: int
    note: str = ""
    adapted: bool = False


@dataclasses.dataclass(frozen=True)
class Branch:
    """A segment of paths, or several with equal trees below them, and the tree below.

    Attributes:
      names: the segments.
      below: the branches, or the parameter.
      rest: segments that every path below has in common, each with a `/` before it.
    """

    names: tuple[str, ...]
    below: tuple[Branch, ...] | Leaf
    rest: str = ""

    @property
    def name(self) -> str:
        """The segments as a pattern has them."""
        return segment(self.names) + self.rest

    @property
    def size(self) -> int:
        """The number of parameters below one of the names."""
        if isinstance(self.below, Leaf):
            return self.below.size
        return sum(len(branch.names) * branch.size for branch in self.below)


def tree(leaves: Mapping[str, Leaf]) -> tuple[Branch, ...]:
    """Make the branches at the root.

    Args:
      leaves: path -> the parameter.

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
