"""One adapted parameter and the roles of its axes. A layout is a tuple of them."""

from __future__ import annotations

import dataclasses
import math

from lora_jax.errors import LoraError
from lora_jax.spec import check_settings


@dataclasses.dataclass(frozen=True)
class Target:
    """One adapted parameter W and the roles of its axes.

    Attributes:
      path: of W in the parameter tree.
      shape: of W.
      stack: axes of W along which every slice has its own factors (scanned layers, experts).
      inputs: axes that a product contracts (or a lookup indexes).
      outputs: axes that the product leaves.
      rank, alpha: the update is `scale * a @ b`, with `scale` from these two.
      fold: whether `W + scale * a @ b` may be formed where an operation has no low-rank rule.
      kind: the kind of update, a name that `lora_jax.updates` knows.
      scaling: what `scale` is: `"alpha/r"`, or `"alpha/sqrt(r)"` (rsLoRA, arXiv 2312.03732).
      parts: `((start, size), ...)`, slices of one output axis that have factors of their own
        (the q and the v of a fused qkv kernel); the rest has no update. `()`: all of W is one.
      part_axis: which of `outputs` the parts are slices of, as an index into it.
    """

    path: str
    shape: tuple[int, ...]
    stack: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    rank: int
    alpha: float
    fold: bool = False
    kind: str = "lora"
    scaling: str = "alpha/r"
    parts: tuple[tuple[int, int], ...] = ()
    part_axis: int = -1

    def __post_init__(self) -> None:
        check_settings(self.path, self.rank, self.alpha, self.scaling)
        if sorted((*self.stack, *self.inputs, *self.outputs)) != list(range(len(self.shape))):
            raise LoraError(
                f"{self.path!r}: every axis of the shape {self.shape} needs one role, got "
                f"stack={self.stack}, inputs={self.inputs}, outputs={self.outputs}"
            )

    @property
    def scale(self) -> float:
        """`alpha / rank` (arXiv 2106.09685, section 4.1), or `alpha / sqrt(rank)`."""
        return self.alpha / (self.rank if self.scaling == "alpha/r" else math.sqrt(self.rank))

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
        """[*stack, *inputs, rank]: the factor `a` of a plain low-rank update."""
        return (*self.sizes(self.stack), *self.sizes(self.inputs), self.rank)

    @property
    def b_shape(self) -> tuple[int, ...]:
        """[*stack, rank, *outputs]: the factor `b` of a plain low-rank update."""
        return (*self.sizes(self.stack), self.rank, *self.sizes(self.outputs))

    def plain(self, rank: int) -> Target:
        """Return the same parameter with a plain low-rank update of this rank and scale 1."""
        return dataclasses.replace(
            self, rank=rank, alpha=float(rank), kind="lora", scaling="alpha/r", parts=()
        )
