"""One adapted parameter and the roles of its axes. A layout is a tuple of targets."""

from __future__ import annotations

import dataclasses
import math

from lora_jax.errors import LoraError
from lora_jax.spec import check_settings


@dataclasses.dataclass(frozen=True)
class Target:
    """One adapted parameter W and the roles of its axes.

    Attributes:
      path: the path of W in the parameter tree.
      shape: the shape of W.
      stack: the axes of W along which every slice has its own factors (scanned layers, experts).
      inputs: the axes that a product contracts, or that a lookup indexes.
      outputs: the axes that a product keeps.
      rank, alpha: the update is `scale * a @ b`; `scale` follows from these two.
      fold: whether `W + scale * a @ b` may be formed in an operation without a low-rank rule.
      kind: the kind of update, a name that `lora_jax.updates` knows.
      scaling: the formula of `scale`: `"alpha/r"`, or `"alpha/sqrt(r)"` (rsLoRA, arXiv 2312.03732).
      parts: `((start, size), ...)`, slices of one output axis that have factors of their own (q and
        v of a fused qkv kernel). The rest of W has no update. `()` adapts the whole of W.
      part_axis: the output axis that the parts slice, as an index into `outputs`.

    Raises:
      LoraError: an axis of the shape without a role or with two, or a rank, alpha or scaling that
        no update can have.
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
        """The factor of `a @ b`: `alpha / rank` (paper, section 4.1), or `alpha / sqrt(rank)`."""
        return self.alpha / (self.rank if self.scaling == "alpha/r" else math.sqrt(self.rank))

    def sizes(self, which: tuple[int, ...]) -> tuple[int, ...]:
        """Return the sizes of some axes of W.

        Args:
          which: numbers of axes, such as `target.inputs`.

        Returns:
          One size for each, in the same order.
        """
        return tuple(self.shape[i] for i in which)

    @property
    def fan_in(self) -> int:
        """The number of inputs: the product of the sizes of the input axes."""
        return math.prod(self.sizes(self.inputs))

    @property
    def fan_out(self) -> int:
        """The number of outputs: the product of the sizes of the output axes."""
        return math.prod(self.sizes(self.outputs))

    @property
    def form(self) -> tuple[tuple[int, ...], ...]:
        """(shape, stack, inputs, outputs): the part that all adapters of this parameter share."""
        return self.shape, self.stack, self.inputs, self.outputs

    @property
    def a_shape(self) -> tuple[int, ...]:
        """The shape [*stack, *inputs, rank] of the factor `a` of a plain low-rank update."""
        return (*self.sizes(self.stack), *self.sizes(self.inputs), self.rank)

    @property
    def b_shape(self) -> tuple[int, ...]:
        """The shape [*stack, rank, *outputs] of the factor `b` of a plain low-rank update."""
        return (*self.sizes(self.stack), self.rank, *self.sizes(self.outputs))

    def plain(self, rank: int) -> Target:
        """Return the same parameter with a plain low-rank update of scale 1.

        Args:
          rank: the rank of that update.

        Returns:
          A target of the kind "lora", without parts.
        """
        return dataclasses.replace(
            self, rank=rank, alpha=float(rank), kind="lora", scaling="alpha/r", parts=()
        )
