"""The layout: what the spec asks for, met with what the trace found. Static, printable, saved."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from lora_jax import axes, paths, program
from lora_jax.errors import LoraError, listed, nearest
from lora_jax.spec import ALL_LINEAR, LoraSpec, Rule, check_alpha, check_rank

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Target:
    """One adapted parameter W and the roles of its axes.

    Attributes:
      path: of W in the parameter tree.
      shape: of W.
      stack: axes of W along which every slice has its own factors (scanned layers, experts).
      inputs: axes that a product contracts (or a lookup indexes).
      outputs: axes that the product leaves.
      rank, alpha: the update is `alpha / rank * a @ b`.
      fold: whether `W + scale * a @ b` may be formed where an operation has no low-rank rule.
    """

    path: str
    shape: tuple[int, ...]
    stack: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    rank: int
    alpha: float
    fold: bool = False

    def __post_init__(self) -> None:
        check_rank(self.rank, self.path)
        check_alpha(self.alpha, self.path)
        if sorted((*self.stack, *self.inputs, *self.outputs)) != list(range(len(self.shape))):
            raise LoraError(
                f"{self.path!r}: every axis of the shape {self.shape} needs one role, got "
                f"stack={self.stack}, inputs={self.inputs}, outputs={self.outputs}"
            )
        limit = min(self.fan_in, self.fan_out)
        if self.rank > limit:
            raise LoraError(
                f"{self.path!r}: rank {self.rank} is above min(in, out) = "
                f"min({self.fan_in}, {self.fan_out}) = {limit}; lower the rank, or give this "
                f"target its own: Rule({self.path!r}, rank={limit})"
            )

    @property
    def scale(self) -> float:
        """Alpha / rank (paper section 4.1)."""
        return self.alpha / self.rank

    def sizes(self, which: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(self.shape[i] for i in which)

    @property
    def fan_in(self) -> int:
        return math.prod(self.sizes(self.inputs))

    @property
    def fan_out(self) -> int:
        return math.prod(self.sizes(self.outputs))

    @property
    def form(self) -> tuple[tuple[int, ...], ...]:
        """(shape, stack, inputs, outputs): what adapters of one parameter have in common."""
        return self.shape, self.stack, self.inputs, self.outputs

    @property
    def a_shape(self) -> tuple[int, ...]:
        """[*stack, *inputs, rank]"""
        return (*self.sizes(self.stack), *self.sizes(self.inputs), self.rank)

    @property
    def b_shape(self) -> tuple[int, ...]:
        """[*stack, rank, *outputs]"""
        return (*self.sizes(self.stack), self.rank, *self.sizes(self.outputs))

    @property
    def size(self) -> int:
        """Numbers in the two factors."""
        return math.prod(self.a_shape) + math.prod(self.b_shape)


@dataclasses.dataclass(frozen=True)
class Layout:
    """All targets, in the order of the parameter tree. Hashable; `print(layout)` is a table."""

    targets: tuple[Target, ...] = ()

    def __getitem__(self, path: str) -> Target:
        for target in self.targets:
            if target.path == path:
                return target
        known = [t.path for t in self.targets]
        raise LoraError(
            f"no target {path!r} in the layout; nearest:\n{listed(nearest(path, known))}"
        )

    @property
    def size(self) -> int:
        """Numbers in an adapter tree of this layout."""
        return sum(t.size for t in self.targets)

    def subset(self, *patterns: str) -> Layout:
        """The targets that some pattern matches, for a function that reads only those."""
        known = [t.path for t in self.targets]
        keep = {path for pattern in patterns for path in paths.matching(pattern, known)}
        return Layout(tuple(t for t in self.targets if t.path in keep))

    def to_json(self) -> str:
        """Text that `from_json` reads back to an equal layout."""
        targets = [dataclasses.asdict(t) for t in self.targets]
        return json.dumps({"format": FORMAT, "targets": targets}, indent=1)

    @staticmethod
    def from_json(text: str) -> Layout:
        """Raises LoraError on text that `to_json` does not write."""
        try:
            data = json.loads(text)
            version, rows = data["format"], data["targets"]
        except (ValueError, KeyError, TypeError) as error:
            raise LoraError(f"this is not a layout: {error!r} in {text[:80]!r}") from error
        if version != FORMAT:
            raise LoraError(
                f"the layout has format {version}, this lora_jax reads {FORMAT}; "
                "use the lora_jax that wrote it, or a newer one"
            )
        return Layout(tuple(_target_from(row) for row in rows))

    def check_params(self, leaves: Mapping[str, Any]) -> None:
        """Raise `LoraError` unless each target is among the leaves, with its shape."""
        for target in self.targets:
            if target.path not in leaves:
                raise LoraError(
                    f"the layout does not fit the parameters: they have no {target.path!r}; "
                    f"nearest:\n{listed(nearest(target.path, leaves))}\n"
                    "Pass the same parameter tree (with the same root) as to lora_jax.resolve."
                )
            shape = tuple(jnp.shape(leaves[target.path]))
            if shape != target.shape:
                raise LoraError(
                    f"the layout does not fit the parameters: {target.path!r} has shape {shape}, "
                    f"the layout has {target.shape}; resolve the spec again on this model"
                )

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [
            ("path", "shape", "stack", "in", "out", "rank", "scale", "parameters")
        ]
        rows += [_row(t) for t in self.targets]
        rows += [("total", "", "", "", "", "", "", f"{self.size:,}")]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(c.ljust(w) if i < 5 else c.rjust(w) for i, (c, w) in enumerate(cells))
            for cells in (list(zip(row, widths, strict=True)) for row in rows)
        ]
        return "\n".join(line.rstrip() for line in lines)


def _row(t: Target) -> tuple[str, ...]:
    def text(which: tuple[int, ...]) -> str:
        return ",".join(map(str, which)) or "-"

    shape = "x".join(map(str, t.shape))
    roles = (text(t.stack), text(t.inputs), text(t.outputs))
    return (t.path, shape, *roles, str(t.rank), f"{t.scale:g}", f"{t.size:,}")


def _target_from(row: Any) -> Target:
    fields = {f.name for f in dataclasses.fields(Target)}
    if not isinstance(row, dict) or set(row) != fields:
        raise LoraError(f"this is not a target of a layout: {row!r}; it needs {sorted(fields)}")
    tuples = {k: tuple(v) for k, v in row.items() if isinstance(v, list)}
    return Target(**{**row, **tuples})


def resolve(
    spec: LoraSpec, f: Callable[..., Any], params: Any, *args: Any, **kwargs: Any
) -> Layout:
    """Find the spec's targets in `f` and the roles of their axes, by an abstract trace.

    Nothing is computed: `params`, `args` and `kwargs` may hold `jax.ShapeDtypeStruct`s.
    Arguments that are not arrays (`train=True`, `mutable=[...]`) are passed to `f` as they are.

    Args:
      spec: what to adapt.
      f: a pure function whose first argument is the parameter tree.
      params: that tree. Paths in patterns are paths in it: for `model.apply` they begin with
        `params/`.
      *args, **kwargs: an example of the other arguments; only shapes and dtypes matter.

    Returns:
      The layout, its targets in the order of the parameter tree.

    Raises:
      LoraError: a pattern that matches nothing, a matched parameter that no product consumes or
        that meets an operation without a low-rank rule, a rank above min(in, out).

    >>> import jax.numpy as jnp, lora_jax
    >>> f = lambda params, x: jnp.einsum("bd,dhk->bhk", x, params["q"])
    >>> spec = LoraSpec(rank=2, alpha=4.0, targets="q")
    >>> print(resolve(spec, f, {"q": jnp.ones((8, 2, 4))}, jnp.ones((3, 8))))
    path   shape  stack  in  out  rank  scale  parameters
    q      8x2x4  -      0   1,2     2      2          32
    total                                              32
    """
    traced = program.trace(f, params, args, kwargs)
    found = axes.usage(traced)
    chosen = _choose(spec, found)
    shapes = traced.param_shapes
    fold = {path for pattern in spec.folded for path in _matching(pattern, found.uses)}
    return Layout(
        tuple(
            _target(path, shapes[path], found.uses[path], chosen[path], path in fold)
            for path in traced.param_paths
            if path in chosen
        )
    )


def _choose(spec: LoraSpec, found: axes.Usage) -> dict[str, Rule]:
    """The first matching rule of each parameter. Every rule must match something."""
    chosen: dict[str, Rule] = {}
    for rule in spec.rules:
        for path in _matching_rule(rule, found):
            chosen.setdefault(path, rule)
    return chosen


def _matching_rule(rule: Rule, found: axes.Usage) -> list[str]:
    if rule.pattern != ALL_LINEAR:
        return _matching(rule.pattern, found.uses)
    linear = [path for path, uses in found.uses.items() if any(u.is_product for u in uses)]
    kept = [path for path in linear if path not in found.heads]
    if not kept:
        raise LoraError(
            f"{ALL_LINEAR!r} matches nothing: the products consume {linear or 'no parameter'}, "
            "and the output head is left out; name the targets by their paths"
        )
    return kept


def _matching(pattern: str, known: Mapping[str, Any]) -> list[str]:
    hits = paths.matching(pattern, known)
    if not hits:
        raise LoraError(
            f"the pattern {pattern!r} matches no parameter; the nearest paths are:\n"
            f"{listed(nearest(pattern, known))}\n"
            "A pattern must match the whole path: '*' stays inside one segment, '**' spans "
            "several ('**/query/kernel')."
        )
    return hits


def _target(
    path: str, shape: tuple[int, ...], uses: tuple[axes.Use, ...], rule: Rule, fold: bool
) -> Target:
    if not fold:
        _refuse_barriers(path, uses)
    use = _canonical(path, shape, uses)
    assert rule.rank is not None and rule.alpha is not None  # filled in by spec.rules
    return Target(
        path, shape, use.stack, use.inputs, use.outputs, rule.rank, float(rule.alpha), fold
    )


def _refuse_barriers(path: str, uses: tuple[axes.Use, ...]) -> None:
    for use in uses:
        if use.barrier is not None and _adapted_elsewhere(uses):
            raise LoraError(
                f"{path!r} cannot be adapted: `{use.kind}` at {use.where} takes it, and has no "
                "low-rank rule. Leave it out of the targets, or allow W + scale * a @ b to be "
                f"formed there: LoraSpec(..., fold=({path!r},))"
            )


def _adapted_elsewhere(uses: tuple[axes.Use, ...]) -> bool:
    """A parameter that meets products and barriers; one that meets no product fails later."""
    return any(u.has_axes for u in uses)


def _canonical(path: str, shape: tuple[int, ...], uses: tuple[axes.Use, ...]) -> axes.Use:
    """The use whose axes count: convolutions and lookups before products, then the first."""
    complete = [u for u in uses if u.has_axes and _covers(u, shape)]
    if not complete:
        how = listed([f"`{u.kind}` at {u.where}" for u in uses]) or "  nothing reads it"
        raise LoraError(
            f"the targets match {path!r} (shape {shape}), but no product consumes it with input "
            f"and output axes; it is consumed by:\n{how}\n"
            "Narrow the pattern to weights of products, convolutions and embeddings."
        )
    order = ("conv_general_dilated", "ragged_dot_general", "gather", "dot_general")
    return min(complete, key=lambda u: order.index(u.kind))


def _covers(use: axes.Use, shape: tuple[int, ...]) -> bool:
    return sorted((*use.stack, *use.inputs, *use.outputs)) == list(range(len(shape)))
