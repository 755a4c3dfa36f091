"""The arrays of a kind, between the layout of a parameter and the order of a module."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters import init
from lora_jax.errors import LoraError
from lora_jax.exchange.axes import input_order, layer_of, module_rows, rows_of, rows_there
from lora_jax.exchange.module_update import KindArrays, ModuleUpdate
from lora_jax.layout import Layout
from lora_jax.models.hf_module import HfModule
from lora_jax.spec import Target
from lora_jax.updates import kind_of

Placed = list[tuple[HfModule, tuple[int, ...], KindArrays]]  # with the index along the stack
RANKS = 64  # the largest rank of plain factors that are written out, in units of min(in, out)


def of_kind(target: Target, own: KindArrays) -> Target:
    """Return the target with the kind, rank and alpha of a module's arrays."""
    return dataclasses.replace(
        target, kind=own.kind, rank=own.rank, alpha=own.alpha, scaling="alpha/r", parts=()
    )


def into_target(target: Target, placed: Placed, w: Any) -> tuple[Target, Any] | None:
    """Return the target with the kind of its modules, and its arrays; None if they do not fit.

    Slices of a stack that are missing begin as `init` begins them, which changes nothing.
    """
    one = of_kind(target, placed[0][2])
    kind, n = kind_of(one), len(target.stack)
    if kind.is_plain or len({(own.kind, own.rank, own.alpha) for *_, own in placed}) > 1:
        return None
    try:
        layout = Layout((one,))
    except LoraError:  # a rank that the kind does not have
        return None
    start = init(jax.random.key(0), layout, params={one.path: w})[one.path]
    arrays = {field: np.array(x) for field, x in start._asdict().items()}
    axes = {field: {*x[n:]} for field, x in kind.axes(one)._asdict().items()}
    by_row = {field: bool(x & {*one.outputs}) for field, x in axes.items()}
    for entry, at, own in placed:
        moved = entry.part is not None or entry.rows is not None or entry.rotary
        follows = all(by_row.values()) or (kind.rescales and entry.part is None)
        turned = layer_of(one, entry) == "conv" and any(x & {*one.inputs} for x in axes.values())
        if turned or (moved and not follows):
            return None
        for field, x in own.arrays.items():
            rows = rows_of(one, entry) if by_row[field] else np.arange(1)
            x = x[rows_there(entry, len(x), entry.name)] if by_row[field] else x
            lines = arrays[field][at].reshape(-1, one.fan_out if by_row[field] else 1)
            if x.size != len(lines) * len(rows):
                return None
            lines[:, rows] = x.T.reshape(len(lines), len(rows))
    return one, kind.fields(**jax.tree.map(jnp.asarray, arrays))


def out_of_target(
    target: Target, entry: HfModule, parameters: Any, index: tuple[int, ...]
) -> KindArrays:
    """Return the arrays of one module: a slice of the stack, and of a fused one its rows."""
    kind, n = kind_of(target), len(target.stack)
    rows = rows_of(target, entry)
    rows = rows[np.argsort(module_rows(entry, len(rows)))]
    arrays, outputs = {}, 0
    for field, axes in kind.axes(target)._asdict().items():
        x = np.asarray(getattr(parameters, field))[index]
        side = {*axes[n:]} & {*target.outputs}, {*axes[n:]} & {*target.inputs}
        middle = x.shape[len(side[1]) : x.ndim - len(side[0])]
        x = x.reshape(*[target.fan_in] * bool(side[1]), *middle, *[target.fan_out] * bool(side[0]))
        if side[1] and layer_of(target, entry) == "conv":
            raise LoraError(
                f"{target.path!r}: a convolution by the kind {target.kind!r} has no file"
            )
        outputs = len(rows) if side[0] else outputs
        arrays[field] = (x[..., rows] if side[0] else x).T
    return KindArrays(target.kind, target.rank, target.alpha, outputs, arrays)


def as_plain(target: Target, entry: HfModule, own: KindArrays) -> ModuleUpdate:
    """Return the arrays of a module as the plain factors that they are equal to."""
    sizes = (target.fan_in, own.outputs)
    one = dataclasses.replace(
        of_kind(target, own), shape=sizes, stack=(), inputs=(0,), outputs=(1,)
    )
    kind = kind_of(one)
    axes = kind.axes(one)._asdict()
    parameters = kind.fields(
        **{f: (x[..., : sizes[0]] if 0 in axes[f] else x).T for f, x in own.arrays.items()}
    )
    wrong = LoraError(
        f"{entry.name!r}: the arrays of an update of the kind {own.kind!r} and the rank {own.rank} "
        f"do not fit {target.path!r}, which has {target.fan_in} inputs and {target.fan_out} "
        "outputs. A kind that rescales W needs a parameter that is a whole module"
    )
    try:
        shapes: Any = jax.eval_shape(lambda p: kind.factors(one, p), parameters)
    except TypeError as error:
        raise wrong from error
    rank = shapes.a.shape[-1]
    fits = shapes.a.shape == (sizes[0], rank) and shapes.b.shape == (rank, sizes[1])
    if kind.rescales or not fits or rank > RANKS * min(sizes):
        raise wrong
    factors: Any = kind.factors(one, parameters)
    a, b = np.asarray(factors.a).T, np.asarray(factors.b).T
    layer = layer_of(target, entry) or "linear"
    if layer == "conv":  # whose inputs are flattened with the channels first
        a = a.reshape(rank, *target.sizes(input_order(target, layer)))
    return ModuleUpdate(a, b, kind.scale(one) * rank, layer=layer)
