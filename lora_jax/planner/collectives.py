"""Find the collectives of a compiled program: the data that devices exchange, and the reason."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from lora_jax.errors import LoraError
from lora_jax.planner.hlo import LORA, VIEWS, Computation, Instruction, Module, Shape, closing

Cause = Literal["base", "adapters", "update"]

_MOVES = ("all-gather", "all-to-all", "collective-broadcast", "collective-permute")
COLLECTIVES = (*_MOVES, "all-reduce", "ragged-all-to-all", "reduce-scatter")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One array in a collective, which runs `times` times in a step.

    kind: the name of the operation, such as "all-gather".
    operand, result: the array that goes in, and the one that comes out.
    origin: the name of the operation or argument that it comes from.
    asynchronous: whether the program computes something else until it is done.
    """

    kind: str
    operand: Shape
    result: Shape
    group: tuple[int, ...]
    origin: str
    times: int
    asynchronous: bool = False

    @property
    def of(self) -> Cause:
        """The cause of the collective; see `Traffic`."""
        return cause(self.origin)


def cause(origin: str) -> Cause:
    """Return the cause of a collective from the name of the operation or argument it comes from.

    >>> cause("jit(step)/jvp(f)/q/jit(_add)/lora/dot_general"), cause("jit(step)/reduce_sum")
    ('adapters', 'update')
    """
    if LORA in origin or ".trained['adapters']" in origin.replace("\\'", "'"):
        return "adapters"
    of_update = origin.startswith("jit(") or ".optimizer" in origin
    return "update" if of_update and "jvp(" not in origin else "base"


def collectives(module: Module) -> list[Collective]:
    """Return every collective; one of several arrays has an entry for each of them.

    libtpu divides an asynchronous collective over several fusions, which form a chain. Each of them
    repeats the instruction, with the same channel; it counts once.
    """
    found, chains = [], set[tuple[str, ...]]()
    for name, computation in module.computations.items():
        for i in computation.values():
            kind = i.kind.removesuffix("-start")
            if kind in COLLECTIVES and module.times[name]:
                if chain := _CHAIN.search(i.attributes):
                    if chain.groups() in chains:
                        continue
                    chains.add(chain.groups())
                found += list(_arrays(module, kind, i, computation, module.times[name]))
    return found


_CHAIN = re.compile(r'channel_id=(\d+),.*chain_id="(\d+)"')
_CHAINED = re.compile(r"chain_id=|async_collective_name=")  # libtpu's asynchronous ones


def _arrays(
    module: Module, kind: str, i: Instruction, computation: Computation, times: int
) -> Iterator[Collective]:
    group = first_group(i.attributes, module.devices)
    started = i.kind.endswith("-start") and '"is_sync":true' not in i.attributes
    apart = started or bool(_CHAINED.search(i.attributes))
    origins = _origins(i, computation)
    if kind in _MOVES and LORA not in origins[0]:
        users = list(_users(computation, i.name))
        if users and all(LORA in origin for origin in users):
            origins = [users[0] for _ in origins]
    shapes = [computation[o].results[0] for o in i.operands]
    if kind == "all-to-all" and len(shapes) > 1:  # one array, passed in pieces
        whole = Shape(shapes[0].dtype, (len(shapes), *shapes[0].dims))
        yield Collective(kind, whole, whole, group, origins[0], times, apart)
        return
    results = i.results[-len(shapes) :]  # an asynchronous one returns its operands first
    for shape, result, origin in zip(shapes, results, origins, strict=True):
        yield Collective(kind, shape, result, group, origin, times, apart)


def _users(computation: Computation, name: str) -> Iterator[str]:
    """Yield the origins of the operations that use an array, looking through views and moves."""
    for i in computation.values():
        if name in i.operands:
            moved = i.kind.removesuffix("-start") in _MOVES and LORA not in i.origin
            if moved or i.kind in (*VIEWS, "get-tuple-element"):
                yield from _users(computation, i.name)
            else:
                yield i.origin


def _origins(i: Instruction, computation: Computation) -> list[str]:
    """Return the origin of each operand; for a combined collective XLA writes `prefix/(a:b:c)`."""
    names = i.origin.split(":")
    if len(names) == len(i.operands) > 1:
        # The opening parenthesis that nothing closes is the closing one of the mirrored text.
        mirrored = names[0][::-1].translate(str.maketrans("()", ")("))
        prefix = names[0][: max(len(names[0]) - 1 - closing(mirrored), 0)]
        return [names[0], *(prefix + name for name in names[1:])]
    return [_origin(i, operand, computation) for operand in i.operands]


def _origin(i: Instruction, operand: str, computation: Computation) -> str:
    """Return the origin of a collective, or of what it moves if the partitioner wrote none."""
    if i.origin and len(i.operands) == 1:
        return i.origin
    seen = 0
    while operand in computation and seen < 20:
        source, seen = computation[operand], seen + 1
        if source.origin:
            return source.origin
        operand = source.operands[0] if source.operands else ""
    return i.origin


def first_group(attributes: str, devices: int) -> tuple[int, ...]:
    """Return the devices of the first group of a collective; for a permutation, the first pair.

    >>> first_group("replica_groups={{0,2},{1,3}}", 4)
    (0, 2)
    >>> first_group("replica_groups=[4,2]<=[2,4]T(1,0)", 8)
    (0, 4)
    >>> first_group("replica_groups=mesh['a'=2,'b'=4] {'b'}", 8)
    (0, 1, 2, 3)
    """
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", attributes):
        ends = [tuple(map(int, p.split(","))) for p in re.findall(r"\{(\d+,\d+)", pairs[0] + "}")]
        return next((p for p in ends if p[0] != p[1]), (0,))
    if re.search(r"replica_groups=\{\}", attributes):
        return tuple(range(devices))
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return tuple(map(int, listed[1].split(",")))
    if iota := re.search(
        r"replica_groups=\[(\d+),(\d+)\](<=\[[\d,]+\](?:T\([\d,]+\))?)", attributes
    ):
        return tuple(_iota(iota[3]).reshape(int(iota[1]), int(iota[2]))[0].tolist())
    ids = r"(?:, device_ids=\((.*?\]?(?:T\([\d,]+\))?)\))?"
    if grid := re.search(rf"replica_groups=mesh\[(.*?)\]{ids} \{{(.*?)\}}", attributes):
        return _mesh_group(grid[1], grid[2], grid[3])
    raise LoraError(
        f"cannot read the replica groups of a collective: {attributes[:200]!r}; this version of "
        "JAX writes them in a new way"
    )


def _iota(text: str) -> np.ndarray:
    """Read `<=[2,4]T(1,0)`: the numbers from zero, reshaped and transposed."""
    numbers = [list(map(int, n.split(","))) for n in re.findall(r"[\[(]([\d,]+)[\])]", text)]
    array = np.arange(math.prod(numbers[0])).reshape(numbers[0])
    return array.transpose(numbers[1]) if len(numbers) > 1 else array


def _mesh_group(axes: str, ids: str | None, joined: str) -> tuple[int, ...]:
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    order = _iota(ids).reshape(-1) if ids else np.arange(math.prod(sizes.values()))
    array = order.reshape(list(sizes.values()))
    index: list[Any] = [0] * len(sizes)
    for name, part in re.findall(r"'([^']+)'(?::\((\d+,?\d*)\)\d*)?", joined):
        axis = list(sizes).index(name)
        index[axis] = slice(None)
        if part:  # `'a':(before)size` is a part of the axis
            size = re.search(rf"'{name}':\((\d+)\)(\d+)", joined)
            assert size is not None
            after = sizes[name] // (int(size[1]) * int(size[2]))
            index[axis] = slice(0, int(size[2]) * after, after)
    return tuple(np.asarray(array[tuple(index)]).reshape(-1).tolist())
