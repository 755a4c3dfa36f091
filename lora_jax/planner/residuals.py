"""Find the residuals of a compiled program, which the forward pass keeps for the backward pass."""

from __future__ import annotations

import re
from collections.abc import Iterator

from lora_jax.planner.hlo import VIEWS, Computation, Instruction, Module

_INDEX = re.compile(r"index=(\d+)")


def residual_bytes(module: Module) -> int:
    """Return the bytes of the arrays that the forward pass makes and the backward pass reads.

    JAX names operations of the forward pass `jvp(...)`, and of the backward pass
    `transpose(jvp(...))`. Arguments and views of them do not count. If a batch is split into parts,
    only one part counts.
    """
    return _residual_bytes(module, module.entry)


def _residual_bytes(module: Module, name: str) -> int:
    computation = module.computations[name]
    buffers: dict[tuple[str, int], int] = {}
    inner = 0
    for i in computation.values():
        if i.kind == "while" and "jvp(" not in i.origin:
            inner = max(inner, _residual_bytes(module, dict(i.called)["body"]))
        if "transpose(" in i.origin:
            for operand in i.operands:
                buffers.update(_sources(module, computation, operand))
    return sum(buffers.values()) + inner


def _sources(
    module: Module, computation: Computation, operand: str
) -> Iterator[tuple[tuple[str, int], int]]:
    """Yield the buffers of the forward pass that an operand refers to, with their bytes."""
    i = computation.get(operand)
    if i is None or i.kind in ("parameter", "constant", "iota"):
        return
    if i.kind == "tuple":
        for part in i.operands:
            yield from _sources(module, computation, part)
    elif i.kind == "get-tuple-element":
        yield from _element(module, computation, i)
    elif i.kind in VIEWS:
        yield from _sources(module, computation, i.operands[0])
    elif _is_forward(i):
        yield (i.name, 0), i.bytes


def _is_forward(i: Instruction) -> bool:
    return "jvp(" in i.origin and "transpose(" not in i.origin


def _element(
    module: Module, computation: Computation, i: Instruction
) -> Iterator[tuple[tuple[str, int], int]]:
    found = _INDEX.search(i.attributes)
    index = int(found[1]) if found else 0
    source = computation[i.operands[0]]
    if source.kind == "while" and _passes(module, source, index):
        start = computation[source.operands[0]]
        if start.kind == "tuple":
            yield from _sources(module, computation, start.operands[index])
    elif _is_forward(source):
        yield (source.name, index), i.bytes


def _passes(module: Module, loop: Instruction, index: int) -> bool:
    """Return whether a loop passes an element on unchanged."""
    body = module.computations[dict(loop.called)["body"]]
    root = next(x for x in body.values() if x.root)
    i = body.get(root.operands[index]) if root.kind == "tuple" else None
    if i is None or i.kind != "get-tuple-element" or body[i.operands[0]].kind != "parameter":
        return False
    found = _INDEX.search(i.attributes)
    return found is not None and int(found[1]) == index
