"""Find the layer of each adapted matrix, and a short name for it within the layer."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence

import numpy as np

from lora_jax.layout import Layout

_NUMBERED = re.compile(r"[A-Za-z_]*?_?(\d+)")


@dataclasses.dataclass(frozen=True)
class Place:
    """One matrix.

    path, at: of the target in the layout, and the index along its stacked axes.
    layer: its number; None where the model has no layers that are told apart by a number.
    matrix: what it is within the layer.
    """

    path: str
    at: tuple[int, ...]
    layer: int | None
    matrix: str


def places(layout: Layout) -> tuple[Place, ...]:
    """Every matrix of the layout, the layers in order.

    A number in the path is the layer (`layer_3`, `blocks/3`); where there is none, the first
    stacked axis is. Of a matrix' name as much is kept as tells it from the others.
    """
    found = []
    for target in layout.targets:
        layer, name = _split(target.path)
        for at in np.ndindex(target.sizes(target.stack)):
            rest = at
            own = layer
            if layer is None and at:
                own, rest = at[0], at[1:]
            found.append(Place(target.path, at, own, name + "".join(f"[{i}]" for i in rest)))
    short = _shortened(dict.fromkeys(place.matrix for place in found))
    ordered = sorted(found, key=lambda place: -1 if place.layer is None else place.layer)
    return tuple(dataclasses.replace(place, matrix=short[place.matrix]) for place in ordered)


def label(layer: int | None) -> str:
    """What a layer is called."""
    return "-" if layer is None else str(layer)


def layers(found: Iterable[Place]) -> list[int | None]:
    """The layers there are, in order."""
    return list(dict.fromkeys(place.layer for place in found))


def matrices(found: Iterable[Place]) -> list[str]:
    """The matrices there are."""
    return list(dict.fromkeys(place.matrix for place in found))


def middle(found: Sequence[Place]) -> int | None:
    """The layer in the middle: of 0 to 5 it is 3."""
    there = layers(found)
    return there[len(there) // 2]


def _split(path: str) -> tuple[int | None, str]:
    """The layer, and the path without it.

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


def _shortened(names: Iterable[str]) -> dict[str, str]:
    """The last segments of each name, as many as no other name ends with.

    >>> _shortened(["attention/query", "mlp/up", "other/up"])
    {'attention/query': 'query', 'mlp/up': 'mlp/up', 'other/up': 'other/up'}
    """
    known, short = list(names), {}
    for name in known:
        parts = name.split("/")
        ends = ["/".join(parts[i:]) for i in range(len(parts) - 1, -1, -1)]
        others = [f"/{other}" for other in known if other != name]
        free = (e for e in ends if not any(other.endswith(f"/{e}") for other in others))
        short[name] = next(free, name)
    return short
