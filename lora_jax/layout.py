"""The layout: which parameters are adapted, and the role of each of their axes.

It is static data: hashable, printable, and saved with the adapters. `lora_jax.resolve` makes it.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from lora_jax import paths
from lora_jax.errors import LoraError, listed, nearest
from lora_jax.spec import check_alpha, check_rank

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
