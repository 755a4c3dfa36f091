"""Find the layer of each adapted matrix, and a short name for the matrix within its layer."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from lora_jax.layout import Layout
from lora_jax.sweeps.member_names import shortest

_MOST = 24  # at most this many matrices are drawn
_NUMBERED = re.compile(r"[A-Za-z_]*?_?(\d+)")


@dataclasses.dataclass(frozen=True)
class Place:
    """One matrix of the layout.

    path: the path of its target in the layout.
    at: its index along the target's stacked axes.
    layer: the number of its layer; None if the model's layers have no numbers.
    """

    path: str
    at: tuple[int, ...]
    layer: int | None
    matrix: str


@dataclasses.dataclass(frozen=True)
class ModuleIndex:
    """Every matrix of a layout, ordered by layer.

    The layer is the number in the path (`layer_3`, `blocks/3`), or else the index along the first
    stacked axis. Names are cut to their last segments, as many as make them unique.
    """

    places: tuple[Place, ...]

    @classmethod
    def of(cls, layout: Layout) -> ModuleIndex:
        found = []
        for target in layout.targets:
            layer, name = _split(target.path)
            for at in np.ndindex(target.sizes(target.stack)):
                own, rest = (at[0], at[1:]) if layer is None and at else (layer, at)
                found.append(Place(target.path, at, own, name + "".join(f"[{i}]" for i in rest)))
        known = list(dict.fromkeys(place.matrix for place in found))
        short = {name: shortest(name, known, "/") for name in known}
        found.sort(key=lambda place: -1 if place.layer is None else place.layer)
        return cls(tuple(dataclasses.replace(p, matrix=short[p.matrix]) for p in found))

    @property
    def layers(self) -> list[int | None]:
        return list(dict.fromkeys(place.layer for place in self.places))

    @property
    def labels(self) -> list[str]:
        return list(map(label, self.layers))

    @property
    def middle_layer(self) -> int | None:
        """The middle layer: 3 for the layers 0 to 5."""
        return self.layers[len(self.layers) // 2]

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(place.matrix for place in self.places))

    @property
    def drawn(self) -> list[str]:
        """The names of the matrices that are drawn: with more, their names cannot be read."""
        return self.names[:_MOST]

    @property
    def cut(self) -> str:
        """The sentence that a caption adds if not all matrices are drawn."""
        names = len(self.names)
        more = f" The first {_MOST} of {names} matrices are drawn; the table lists all."
        return more if names > _MOST else ""

    def grid(self, numbers: Iterable[float]) -> NDArray[np.float64]:
        """Arrange a number for each matrix as an array [layer, matrix]; NaN where there is none."""
        layers, names = self.layers, self.names
        found = np.full((len(layers), len(names)), np.nan)
        for place, number in zip(self.places, numbers, strict=True):
            found[layers.index(place.layer), names.index(place.matrix)] = number
        return found


def label(layer: int | None) -> str:
    return "-" if layer is None else str(layer)


def _split(path: str) -> tuple[int | None, str]:
    """Split a path into the number of its layer and the rest.

    >>> _split("bert/encoder/layer_3/attention/query/kernel"), _split("first/kernel")
    ((3, 'bert/encoder/attention/query'), (None, 'first'))
    """
    segments = path.split("/")
    if len(segments) > 1 and segments[-1] in ("kernel", "embedding"):
        segments.pop()
    for number, segment in enumerate(segments[:-1]):
        if match := _NUMBERED.fullmatch(segment):
            return int(match[1]), "/".join([*segments[:number], *segments[number + 1 :]])
    return None, "/".join(segments)
