"""Group paths that differ in a few segments, and write each group as one pattern."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Mapping, Sequence

_Segments = tuple[tuple[str, ...], ...]  # of a group of paths: the names at each place
_NUMBERED = re.compile(r"(?P<before>.*?)(?P<number>0|[1-9][0-9]*)(?P<after>[^0-9]*)")
_SIGNS = set("*?[]{},")  # a segment with one of them would be read as a pattern


def group(alike: Mapping[str, Hashable]) -> dict[str, list[str]]:
    """Return pattern -> its paths, which have equal values, in the order of their first paths.

    The pattern (`lora_jax.paths`) matches these and no other path of `alike`, unless a segment of a
    path holds a sign of the pattern language.

    >>> group({f"layer_{i}/{name}/kernel": 8 for i in range(3) for name in "qv"})
    {'layer_{0..2}/{q,v}/kernel': ['layer_0/q/kernel', 'layer_0/v/kernel', ...]}
    >>> list(group({"layer_0/q": 8, "layer_1/q": 4, "layer_2/q": 4}))
    ['layer_0/q', 'layer_{1,2}/q']
    """
    found: list[tuple[_Segments, list[str]]]
    found = [(tuple((name,) for name in path.split("/")), [path]) for path in alike]
    for place in reversed(range(max((len(segments) for segments, _ in found), default=0))):
        together: dict[Hashable, list[tuple[_Segments, list[str]]]] = {}
        for segments, members in found:
            own = segments[place : place + 1]  # empty where the path is shorter
            fixed = own if not own or _SIGNS & set(own[0][0]) else ()
            rest = (len(segments), segments[:place], segments[place + 1 :], fixed)
            together.setdefault((rest, alike[members[0]]), []).append((segments, members))
        found = [_joined(parts, place) for parts in together.values()]
    return {"/".join(map(segment, segments)): members for segments, members in found}


def _joined(
    parts: Sequence[tuple[_Segments, list[str]]], place: int
) -> tuple[_Segments, list[str]]:
    """Groups that differ in the segment at `place` alone, as one."""
    segments = parts[0][0]
    if len(parts) == 1:
        return segments, parts[0][1]
    names = tuple(dict.fromkeys(name for other, _ in parts for name in other[place]))
    members = [path for _, paths in parts for path in paths]
    return (*segments[:place], names, *segments[place + 1 :]), members


def segment(names: Sequence[str]) -> str:
    """Write several names as one segment of a pattern.

    >>> segment(["h0", "h1", "h2", "h4", "h5"]), segment(["q", "v"]), segment(["q"])
    ('h{0..2,4,5}', '{q,v}', 'q')
    """
    if len(names) == 1:
        return names[0]
    found = [_NUMBERED.fullmatch(name) for name in names]
    ends = {(x["before"], x["after"]) if x else None for x in found}
    if len(ends) == 1 and None not in ends:
        numbers = sorted(int(x["number"]) for x in found if x)
        ((before, after),) = (x for x in ends if x)
        return f"{before}{{{','.join(_ranges(numbers))}}}{after}"
    return f"{{{','.join(names)}}}"


def _ranges(numbers: Iterable[int]) -> list[str]:
    """Numbers in ascending order as `first..last` where they follow each other."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    found: list[str] = []
    for first, last in runs:
        several = [f"{first}..{last}"] if last > first + 1 else map(str, range(first, last + 1))
        found += several
    return found
