"""The update of one module, with PyTorch's axes: the noun that all formats share."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lora_jax.errors import LoraError, listed


class KindArrays(NamedTuple):
    """The arrays of a kind other than LoRA for one module, each transposed to PyTorch's order.

    An array of `Kind.axes` (*inputs, None, *outputs) is [outputs, None, inputs] here.

    kind, rank, alpha: as in `lora_jax.Target`.
    outputs: the module's outputs, if the arrays tell their number.
    arrays: `{field: array}`. An input axis may be longer than the module's, which has its first
      elements.
    """

    kind: str
    rank: int
    alpha: float
    outputs: int
    arrays: Mapping[str, np.ndarray]


class ModuleUpdate(NamedTuple):
    """`W' = W + scale * b @ a` for a weight [out, in]; all arrays are NumPy's.

    a: [rank, in]; of a convolution [rank, in, *window]; of an embedding `in` is the vocabulary.
    b: [out, rank].
    alpha, scaling: the scale, as in `lora_jax.Target`.
    magnitude: [out], the lengths of DoRA; None: not DoRA.
    bias: [out]; `scale * bias` is added to the module's output. None: no bias.
    layer: "linear", "embedding", "conv", or "experts": one expert of a parameter that holds all.
    stored_in_out: whether the module stores its weight as [in, out], as GPT-2's do. It is known
      when an adapter is written.
    own: the arrays of another kind, with which `a` and `b` are None.
    bias_gain: [out]; the module's own bias is multiplied by it. None: it stays as it is.
    """

    a: Any
    b: Any
    alpha: float = 1.0
    scaling: str = "alpha/r"
    magnitude: Any = None
    bias: Any = None
    layer: str = "linear"
    stored_in_out: bool = False
    own: KindArrays | None = None
    bias_gain: Any = None

    @property
    def rank(self) -> int:
        return 1 if self.a is None else int(self.a.shape[0])

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank if self.scaling == "alpha/r" else math.sqrt(self.rank))

    @property
    def fan_in(self) -> int:
        return math.prod(self.a.shape[1:])

    def folded(self, rank: int) -> ModuleUpdate:
        """Return the same update with scale 1, at a rank that is not below its own."""
        scale = self.scale
        b = (self.b.astype(np.float64) * scale).astype(np.float32) if scale != 1 else self.b
        bias = None if self.bias is None else self.bias * np.float32(scale)
        more = rank - self.rank
        return self._replace(
            a=np.pad(self.a, ((0, more), *((0, 0) for _ in self.a.shape[1:]))),
            b=np.pad(b, ((0, 0), (0, more))),
            bias=bias,
            alpha=float(rank),
            scaling="alpha/r",
        )

    def within(self, limit: int) -> ModuleUpdate:
        """Return the same update at a rank of at most `limit`, which is min(in, out) or more."""
        if self.rank <= limit:
            return self
        whole = self.folded(self.rank)
        a = whole.a.reshape(self.rank, -1)
        product = (whole.b.astype(np.float64) @ a.astype(np.float64)).astype(np.float32)
        out, fan_in = product.shape
        if fan_in <= out:
            a, b = np.eye(fan_in, dtype=np.float32), product
        else:
            a, b = product, np.eye(out, dtype=np.float32)
        a = a.reshape(len(a), *self.a.shape[1:])
        return whole._replace(a=a, b=b, alpha=float(len(a)))

    def of_rows(self, rows: Any) -> ModuleUpdate:
        """Return the update of some output rows, given as a slice or as indices."""
        return self._replace(
            b=self.b[rows],
            magnitude=None if self.magnitude is None else self.magnitude[rows],
            bias=None if self.bias is None else self.bias[rows],
        )


class Modules(NamedTuple):
    """The contents of a file of any format, for one model.

    updates: updates of modules, by name ("model.layers.0.self_attn.q_proj").
    values: whole tensors that replace the base's, by name ("classifier.weight").
    base: the same for tensors that stay shared wherever the base shares them.
    rows: (indices, values) of single rows that replace rows of tensors, by name.
    ties: whether an update of an embedding also applies to the output head that shares it.
    """

    updates: Mapping[str, ModuleUpdate]
    values: Mapping[str, np.ndarray] = {}
    base: Mapping[str, np.ndarray] = {}
    rows: Mapping[str, tuple[Any, np.ndarray]] = {}
    ties: bool = False


def by_module(keys: Iterable[str], endings: Sequence[str]) -> dict[str, dict[str, str]]:
    """Return {module: {ending: key}} of keys `<module>.<ending>`; a module has all endings."""
    found: dict[str, dict[str, str]] = {}
    for key in keys:
        module, _, ending = key.rpartition(".")
        if ending not in endings:
            expected = " or ".join(f"<module>.{ending}" for ending in endings)
            raise LoraError(f"{key}: not the name of a factor; expected {expected}")
        found.setdefault(module, {})[ending] = key
    for module, own in found.items():
        if missing := [ending for ending in endings if ending not in own]:
            raise LoraError(
                f"{next(iter(own.values()))} is there, and {module}.{missing[0]} is not"
            )
    return found


def twin_of(update: ModuleUpdate) -> ModuleUpdate:
    """Return the update of the output head that shares the table of an embedding."""
    return ModuleUpdate(update.b.T, update.a.T, update.alpha, update.scaling)


def fuse(pieces: Sequence[tuple[np.ndarray, ModuleUpdate]], total: int) -> ModuleUpdate:
    """Return the update of a fused module of `total` output rows, from updates of some rows.

    A piece is (rows, update). Pieces with the same `a` and scale share it. Otherwise the
    ranks add up, and each piece has rows of `a` of its own. Rows in no piece are not changed.
    """
    updates = [update for _, update in pieces]
    first = updates[0]
    shared = all(u.scale == first.scale and np.array_equal(u.a, first.a) for u in updates)
    rank = first.rank if shared else sum(u.rank for u in updates)
    b = np.zeros((total, rank), np.float32)
    column = 0
    for rows, update in pieces:
        factor = 1.0 if shared else update.scale
        b[rows, column : column + update.rank] = update.b * np.float32(factor)
        column += 0 if shared else update.rank
    a = first.a if shared else np.concatenate([u.a for u in updates])
    alpha, scaling = (first.alpha, first.scaling) if shared else (float(rank), "alpha/r")
    fused = first._replace(a=a, b=b, alpha=alpha, scaling=scaling)
    return fused._replace(
        magnitude=_joined(pieces, "magnitude", total, 1.0),
        bias=_joined(pieces, "bias", total, None if shared else "scale"),
    )


def _joined(pieces: Any, field: str, total: int, factor: Any) -> Any:
    """Return a vector of the fused module: a missing bias is zero, a missing magnitude an error."""
    values = [(place, getattr(update, field), update.scale) for place, update in pieces]
    if all(x is None for _, x, _ in values):
        return None
    covered = sum(len(rows) for rows, x, _ in values if x is not None)
    if field == "magnitude" and covered != total:
        raise LoraError(
            f"a fused module of {total} rows has the lengths of DoRA for {covered} of them; adapt "
            "all of its parts by DoRA, or none"
        )
    out = np.zeros(total, np.float32)
    for rows, x, scale in values:
        if x is not None:
            out[rows] = x * np.float32(scale if factor == "scale" else 1.0)
    return out


def check_plain(
    modules: Modules,
    format: str,
    layers: Collection[str],
    dora: bool = False,
    more: Iterable[str] = (),
) -> None:
    """Raise unless a format that knows little but factors, of these layers, can hold the modules.

    `dora` says whether it has the lengths of DoRA too, for linear layers; `more` cannot be held.
    """
    wrong = [*(f"{name}: trained as a whole" for name in modules.values), *more]
    wrong += [f"{name}: trained rows" for name in modules.rows]
    for name, u in modules.updates.items():
        if u.own is not None:
            wrong.append(f"{name}: the kind {u.own.kind!r}")
        elif u.layer not in layers:
            wrong.append(f"{name}: {u.layer}")
        if u.magnitude is not None and not (dora and u.layer == "linear"):
            wrong.append(f"{name}: DoRA")
        if u.bias is not None:
            wrong.append(f"{name}: a bias")
    if wrong or not modules.updates:
        raise LoraError(
            f"{format} cannot carry these:\n{listed(wrong or ['an adapter without factors'])}\n"
            "Save it as PEFT, or merge the adapter and ship the model. What was trained as a whole "
            "can be left out: adapter._replace(trainable={})"
        )


def at_one_rank(updates: Mapping[str, ModuleUpdate]) -> dict[str, ModuleUpdate]:
    """Return the same updates with one rank and one scale; a scale is folded into `b` if needed."""
    rank = max(u.rank for u in updates.values())
    if len({u.scale for u in updates.values()}) > 1:
        return {name: u.folded(rank) for name, u in updates.items()}
    same = {}
    for name, u in updates.items():
        alpha = u.alpha if u.rank == rank and u.scaling == "alpha/r" else u.scale * rank
        padded = u._replace(alpha=float(u.rank), scaling="alpha/r").folded(rank)
        same[name] = padded._replace(alpha=alpha)
    return same
