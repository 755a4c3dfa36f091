"""From the updates of modules to an Adapter: a trace of the model finds the axes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import paths
from lora_jax.adapters import Adapter
from lora_jax.base import dense
from lora_jax.errors import LoraError
from lora_jax.exchange import kind_arrays
from lora_jax.exchange.axes import a_from_module, rows_of, rows_there
from lora_jax.exchange.module_update import Modules, ModuleUpdate, fuse, twin_of
from lora_jax.exchange.names import NameTable, TensorPlace
from lora_jax.exchange.whole_parameters import into_parameters, is_shared, places_of
from lora_jax.layout import Layout
from lora_jax.models.hf_module import HfModule
from lora_jax.primitives import jaxprs
from lora_jax.primitives.analysis import analyse
from lora_jax.resolve import resolve
from lora_jax.spec import LoraSpec, Rule, Target
from lora_jax.updates import Rows, Shift, kind_of, row_parts


class _Piece(NamedTuple):
    """The update of (a slice of) one parameter, with its rows in our order."""

    entry: HfModule
    at: tuple[int, ...]
    update: ModuleUpdate
    module: str


def into_adapter(
    modules: Modules, table: NameTable, f: Callable[..., Any], params: Any, args: tuple[Any, ...]
) -> Adapter:
    """Return the adapter of the model `f` that the modules' updates amount to."""
    leaves = paths.flatten(params)
    pieces, heads = _pieces(modules, table)
    shifts = _shifts(modules, table)
    used = analyse(jaxprs.trace(f, params, args)).uses
    _check_ties(pieces, heads, used, modules.ties)
    rows = _rows(modules, table)
    rules = [*(Rule(p) for p in pieces), *(Rule(p, kind="bias") for p in shifts)]
    rules += [Rule(p, kind="tokens", parts=row_parts(numbers)) for p, (numbers, _) in rows.items()]
    if both := pieces.keys() & rows:
        raise LoraError(
            f"the file has factors and trained rows of {both.pop()!r}; merge one of them"
        )
    spec = LoraSpec(1, 1.0, tuple(rules))
    layout = resolve(spec, f, params, *args) if rules else Layout()
    whole = into_parameters(modules, table, leaves, used, layout)
    targets, parameters = [], {}
    for target in layout.targets:
        arrays: Any
        if target.path in shifts:
            arrays = _shift(target, shifts[target.path], leaves[target.path])
        elif target.path in rows:
            w = whole.get(target.path, leaves[target.path])
            arrays = _differences(target, *rows[target.path], w)
        else:
            target, arrays = _filled(target, pieces[target.path], leaves[target.path])
        targets.append(target)
        parameters[target.path] = arrays
    layout = Layout(tuple(targets))
    return Adapter(layout, parameters, whole)


def _rows(modules: Modules, table: NameTable) -> dict[str, tuple[list[int], np.ndarray]]:
    """Return the numbers of trained rows, ascending, and their values; a tied head is left out."""
    found = {}
    for name, (numbers, values) in modules.rows.items():
        if len({*numbers}) != len(values) or len(numbers) != len(values):
            raise LoraError(
                f"{name!r}: {len(values)} trained rows for the numbers {numbers[:5]}..."
            )
        order = np.argsort(numbers)
        for place in places_of(table, name):
            if not place.tied:
                found[place.path] = [numbers[i] for i in order], values[order]
    return found


def _differences(target: Target, numbers: list[int], values: np.ndarray, w: Any) -> Rows:
    if values.shape[1:] != target.shape[1:] or target.inputs != (0,):
        raise LoraError(
            f"the file has trained rows of shape {values.shape}, and {target.path!r} has the shape "
            f"{target.shape}"
        )
    return Rows(jnp.asarray(values - np.asarray(dense(w), np.float32)[numbers]))


def _pieces(
    modules: Modules, table: NameTable
) -> tuple[dict[str, list[_Piece]], dict[str, ModuleUpdate]]:
    """Return the pieces of each path, and the updates of heads that share a path's table."""
    pieces: dict[str, list[_Piece]] = {}
    heads: dict[str, ModuleUpdate] = {}
    for name, update in modules.updates.items():
        for place in places_of(table, f"{name}.weight"):
            if place.tied:
                heads[place.path] = update
                continue
            pieces.setdefault(place.path, []).append(_piece(place, update, name))
    for path, found in pieces.items():
        seen: dict[Any, str] = {}
        for piece in found:
            other = seen.setdefault((piece.at, piece.entry.part), piece.module)
            if other != piece.module:
                raise LoraError(f"{other!r} and {piece.module!r} are both {path!r}")
    return pieces, heads


def _piece(place: TensorPlace, update: ModuleUpdate, name: str) -> _Piece:
    if update.own is not None:
        return _Piece(place.entry, place.at, update, name)
    rows = rows_there(place.entry, len(update.b), name)
    return _Piece(place.entry, place.at, update.of_rows(rows), name)


def _check_ties(
    pieces: Mapping[str, list[_Piece]], heads: dict[str, ModuleUpdate], used: Any, ties: bool
) -> None:
    """Check updates of a table that is also the output head: we change both, PEFT only one."""
    for path, found in pieces.items():
        own = (found[0].update if path not in heads else heads[path]).own
        if own is not None and (path in heads or is_shared(used[path])):
            raise LoraError(
                f"{path!r} is the embedding and the output head, and the file adapts it by the "
                f"kind {own.kind!r}; give the model a head of its own (untie it)"
            )
        head = heads.pop(path, None)
        if not is_shared(used[path]) or (head is None and ties):
            continue
        twin = twin_of(found[0].update)
        same = head is not None and head.scale == twin.scale
        if not same or not all(map(np.array_equal, head[:2], twin[:2])):  # type: ignore[index]
            raise LoraError(
                f"{path!r} is the embedding and the output head, and the file adapts one of "
                f"them ({found[0].module!r}), or both in different ways; here they are one "
                "array. Give the model a head of its own (untie it), or train with "
                "ensure_weight_tying=True"
            )
    if heads:
        path = next(iter(heads))
        raise LoraError(
            f"the file adapts the output head, which is the embedding {path!r} here, and not the "
            "embedding. Give the model a head of its own (untie it)"
        )


def _filled(target: Target, pieces: list[_Piece], w: Any) -> tuple[Target, Any]:
    """Return the target with the rank, scale and kind of its pieces, and its arrays.

    Layers that are missing in the file stay zero, with the lengths of W for DoRA.
    """
    placed = [(p.entry, p.at, p.update.own) for p in pieces if p.update.own is not None]
    if placed:
        for piece in pieces:
            _check_index(target, piece)
        if found := kind_arrays.into_target(target, placed, w):
            return found
        pieces = [
            _piece(TensorPlace(target.path, e, at), kind_arrays.as_plain(target, e, own), p.module)
            for (e, at, own), p in zip(placed, pieces, strict=True)
        ]
    for piece in pieces:
        want = len(rows_of(target, piece.entry))
        if len(piece.update.b) != want:
            raise LoraError(
                f"{piece.module!r} has {len(piece.update.b)} outputs in the file, and {want} in "
                f"the model ({target.path!r})"
            )
    target, pieces = _divided(target, pieces)
    target, pieces = _one_rank(target, pieces)
    dora = any(p.update.magnitude is not None for p in pieces)
    target = dataclasses.replace(target, kind="dora") if dora else target
    kind, stack, outputs = kind_of(target), target.sizes(target.stack), target.sizes(target.outputs)
    a = np.zeros((*stack, target.fan_in, len(target.parts) or 1, target.rank), np.float32)
    b = np.zeros((*stack, target.rank, target.fan_out), np.float32)
    lengths = _lengths(target, w) if dora else None
    for piece in pieces:
        _check_index(target, piece)
        slot: Any = (*piece.at, slice(None))
        number = target.parts.index(piece.entry.part) if target.parts else 0
        a[(*slot, number)] = _inputs(target, piece)
        b[piece.at][:, rows_of(target, piece.entry)] = piece.update.b.T
        if lengths is not None and piece.update.magnitude is not None:
            lengths[piece.at] = piece.update.magnitude
    if target.parts:  # which `b` holds one after the other, without the rest
        kept = np.concatenate([np.arange(start, start + size) for start, size in target.parts])
        axis = len(stack) + 1 + target.part_axis % len(outputs)
        b = b.reshape(*stack, target.rank, *outputs).take(kept, axis)
    shapes = kind.shapes(target)
    arrays = {"a": a.reshape(shapes.a), "b": b.reshape(shapes.b)}
    arrays |= {} if lengths is None else {"magnitude": lengths.reshape(shapes.magnitude)}
    return target, kind.fields(**jax.tree.map(jnp.asarray, arrays))


def _inputs(target: Target, piece: _Piece) -> np.ndarray:
    try:
        return a_from_module(target, piece.update.layer, piece.update.a)
    except LoraError as error:
        raise LoraError(f"{piece.module!r}: {error}") from error


def _lengths(target: Target, w: Any) -> np.ndarray:
    """Return the lengths of W that DoRA begins with, [*stack, out]."""
    zeros = lambda key, target, dtype: jnp.zeros(target.a_shape, dtype)  # noqa: E731
    fresh = kind_of(target).init(jax.random.key(0), target, jnp.float32, zeros, w)
    return np.array(fresh.magnitude).reshape(*target.sizes(target.stack), target.fan_out)


def _one_rank(target: Target, pieces: list[_Piece]) -> tuple[Target, list[_Piece]]:
    """Return the pieces at one rank and scale; scales that differ are folded into `b`."""
    settings = {(p.update.rank, p.update.alpha, p.update.scaling) for p in pieces}
    if len(settings) > 1:
        rank = max(p.update.rank for p in pieces)
        pieces = [p._replace(update=p.update.folded(rank)) for p in pieces]
        settings = {(rank, float(rank), "alpha/r")}
    ((rank, alpha, scaling),) = settings
    return dataclasses.replace(target, rank=rank, alpha=alpha, scaling=scaling), pieces


def _divided(target: Target, pieces: list[_Piece]) -> tuple[Target, list[_Piece]]:
    """Return a target with the parts that have factors, or pieces that are whole parameters.

    A fused parameter is written whole if DoRA or the ranks need it: the ranks of its parts add up.
    """
    entries = sorted({p.entry for p in pieces}, key=lambda e: e.part or (0, 0))
    limit = min(target.fan_in, *(len(rows_of(target, e)) for e in entries))
    alone = all(p.update.magnitude is None and p.update.rank <= limit for p in pieces)
    if any(e.part is not None for e in entries):
        if alone:
            parts = tuple(e.part for e in entries if e.part is not None)
            return dataclasses.replace(target, parts=parts, part_axis=entries[0].axis), pieces
        pieces = _whole(target, pieces)
    limit = min(target.fan_in, target.fan_out)
    return target, [p._replace(update=p.update.within(limit)) for p in pieces]


def _whole(target: Target, pieces: list[_Piece]) -> list[_Piece]:
    """Return the parts of each slice as one update of the whole parameter."""
    grouped: dict[tuple[int, ...], list[_Piece]] = {}
    for piece in pieces:
        grouped.setdefault(piece.at, []).append(piece)
    found = []
    for index, parts in grouped.items():
        joined = fuse([(rows_of(target, p.entry), p.update) for p in parts], target.fan_out)
        entry = HfModule(parts[0].entry.name)
        found.append(_Piece(entry, index, joined, parts[0].module))
    return found


def _check_index(target: Target, piece: _Piece) -> None:
    stack = target.sizes(target.stack)
    inside = all(i < n for i, n in zip(piece.at, stack, strict=False))
    if len(piece.at) != len(stack) or not inside:
        raise LoraError(
            f"{piece.module!r} is number {piece.at} along the stack of {target.path!r}, whose "
            f"sizes are {stack}"
        )


def _shifts(modules: Modules, table: NameTable) -> dict[str, list[_Piece]]:
    """Return the updates that change the biases of modules."""
    found: dict[str, list[_Piece]] = {}
    for name, update in modules.updates.items():
        if update.bias_gain is not None:
            for path, entry, at, _ in table.find(f"{name}.bias"):
                rows = rows_there(entry, len(update.bias_gain), name)
                gained = ModuleUpdate(None, None, bias_gain=update.bias_gain[rows])
                found.setdefault(path, []).append(_Piece(entry, at, gained, name))
        if update.bias is None or not np.any(update.bias):
            continue
        places = table.find(f"{name}.bias")
        if not places:
            raise LoraError(
                f"{name!r} adds a bias (lora_bias), and the model has none there by the names "
                f"given; give the layer a bias of zeros, or name it; nearest:\n"
                f"{table.near(f'{name}.bias')}"
            )
        for place in places:
            found.setdefault(place.path, []).append(_piece(place, update, name))
    return found


def _shift(target: Target, pieces: list[_Piece], w: Any) -> Shift:
    delta = np.zeros(target.shape, np.float32)
    flat = delta.reshape(*target.sizes(target.stack), -1)
    for piece in pieces:
        _check_index(target, piece)
        rows, update = rows_of(target, piece.entry), piece.update
        if update.bias is None:
            before = np.asarray(w, np.float32).reshape(flat.shape)[piece.at][rows]
            value = (update.bias_gain - 1) * before
        else:
            value = update.bias * np.float32(update.scale)
        if len(value) != len(rows):
            raise LoraError(
                f"{piece.module!r} has a bias of {len(value)} numbers, {target.path!r} {len(rows)}"
            )
        flat[piece.at][rows] = value
    return Shift(jnp.asarray(delta))
