"""Draw named points over a logarithmic axis, with labels that do not overlap."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from lora_jax.report import svg

# In powers of ten of the axis: nearer points share a column of names; points are moved so far
# apart.
_NEAR, _APART = 0.35, 0.07
_ROOM = 0.55  # free space left and right of all points
_LINE = 0.062  # height of a name as a share of the axis' height
_COLOURS = ("#3f78b5", "#c8553d")  # visible on light and dark pages; the second is for `counts`


class NamedPoint(NamedTuple):
    """One point.

    trained: its place along the axis, at least 1.
    spread: the length of its error bar, in the unit of the height.
    """

    name: str
    trained: int
    height: float
    spread: float


class _Placed(NamedTuple):
    point: NamedPoint
    x: float


def draw(points: Sequence[NamedPoint], along: str, up: str, counts: str = "lora") -> Figure:
    """Draw the points, with their spreads as bars."""
    ordered = sorted(points, key=lambda point: point.trained)
    groups = _groups(ordered)
    with svg.drawing(4.6, 3.8) as (figure, axis):
        axis.set_xscale("log")
        low = min(p.height - p.spread for p in points)
        high = max(p.height + p.spread for p in points)
        room = max(high - low, 1.0)
        bottom, top = low - 0.08 * room, high + 0.12 * room
        first, last = (math.log10(p.trained) for p in (ordered[0], ordered[-1]))
        axis.set_ylim(bottom, top)
        axis.set_xlim(10 ** (first - _ROOM), 10 ** (last + _ROOM))
        for number, group in enumerate(groups):
            placed = _apart(group)
            for point, x in placed:
                colour = _COLOURS[point.name == counts]
                axis.errorbar(
                    [x], [point.height], yerr=[point.spread], fmt="o", color=colour,
                    markersize=5, elinewidth=1.3,
                )  # fmt: skip
            if len(group) == 1:
                _above(axis, placed[0])
            else:
                before = _gap(groups, number - 1) if number else _ROOM
                after = _gap(groups, number) if number + 1 < len(groups) else _ROOM
                _column(axis, placed, 1 if after >= before else -1, (bottom, top))
        axis.set(xlabel=along, ylabel=up)
        axis.grid()
    return figure


def _groups(ordered: Sequence[NamedPoint]) -> list[list[NamedPoint]]:
    """Group points that are near each other."""
    groups = [[ordered[0]]]
    for last, point in itertools.pairwise(ordered):
        if math.log10(point.trained / last.trained) < _NEAR:
            groups[-1].append(point)
        else:
            groups.append([point])
    return groups


def _gap(groups: Sequence[Sequence[NamedPoint]], number: int) -> float:
    """Return the distance between a group and the next, in powers of ten."""
    return math.log10(groups[number + 1][0].trained / groups[number][-1].trained)


def _apart(group: Sequence[NamedPoint]) -> list[_Placed]:
    """Move the points of a group apart, as much as is needed to see their bars."""
    places = [math.log10(point.trained) for point in group]
    moved = [places[0]]
    for place in places[1:]:
        moved.append(max(place, moved[-1] + _APART))
    shift = (math.fsum(places) - math.fsum(moved)) / len(group)  # keeps the mean place
    return [_Placed(p, 10 ** (place + shift)) for p, place in zip(group, moved, strict=True)]


def _above(axis: Any, placed: _Placed) -> None:
    point, x = placed
    place = (x, point.height + point.spread)
    axis.annotate(point.name, place, (0, 4), textcoords="offset points", ha="center", size=8.5)


def _column(axis: Any, placed: Sequence[_Placed], side: int, ends: tuple[float, float]) -> None:
    """Write names in a column left or right of the points, with a thin line to each point."""
    ordered = sorted(placed, key=lambda one: one.point.height)
    edge = (max if side > 0 else min)(x for _, x in placed)
    heights = _spaced([point.height for point, _ in ordered], _LINE * (ends[1] - ends[0]), ends)
    for (point, x), height in zip(ordered, heights, strict=True):
        axis.annotate(
            point.name,
            (x, point.height),
            (edge * 10 ** (0.2 * side), height),
            ha="left" if side > 0 else "right",
            va="center",
            size=8.5,
            arrowprops={"arrowstyle": "-", "color": svg.INK, "alpha": 0.4, "linewidth": 0.7,
                        "shrinkA": 1, "shrinkB": 3},
        )  # fmt: skip


def _spaced(heights: Sequence[float], least: float, ends: tuple[float, float]) -> list[float]:
    """Move ascending heights until they are `least` apart, about as little as possible.

    >>> _spaced([0.0, 0.0, 5.0], 1.0, (-10.0, 10.0))
    [-0.5, 0.5, 5.0]
    """
    blocks: list[tuple[float, int]] = []  # groups of touching names: their middle, their number
    for height in heights:
        middle, count = height, 1
        while blocks and middle - blocks[-1][0] < least * (count + blocks[-1][1]) / 2:
            other, more = blocks.pop()
            middle, count = (middle * count + other * more) / (count + more), count + more
        blocks.append((middle, count))
    found = [m + least * (i - (n - 1) / 2) for m, n in blocks for i in range(n)]
    over, under = found[-1] + least / 2 - ends[1], ends[0] + least / 2 - found[0]
    return [height - max(over, 0.0) + max(under, 0.0) for height in found]
