"""What is asked for: which parameters are adapted, at which rank and scale."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from lora_jax.errors import LoraError

ALL_LINEAR = "all-linear"
SCALINGS = ("alpha/r", "alpha/sqrt(r)")


@dataclasses.dataclass(frozen=True)
class Rule:
    """One target pattern with its own settings (`None`: those of the spec).

    Attributes:
      pattern: in the language of `lora_jax.paths`, or `"all-linear"`: every parameter that some
        product (`dot_general`, convolution, `ragged_dot`) consumes, but the output head, the
        parameter whose product every way to an output passes last.
      rank, alpha, kind, scaling: as in `LoraSpec`.
      parts: `((start, size), ...)`: only these slices of an output axis are adapted, each with
        factors of its own, such as q and v of a fused qkv kernel. (`lora_jax.updates.lora`)
      part_axis: which output axis that is, as an index into the output axes. Only with parts.
      inputs, outputs, stack: the roles of the axes of W, for a weight that meets an operation
        through which the trace cannot follow them. State `inputs` and `outputs` together; the
        axes that are named nowhere are the stack, unless `stack` says so too.
    """

    pattern: str
    rank: int | None = None
    alpha: float | None = None
    kind: str | None = None
    scaling: str | None = None
    parts: tuple[tuple[int, int], ...] | None = None
    part_axis: int = -1
    inputs: tuple[int, ...] | None = None
    outputs: tuple[int, ...] | None = None
    stack: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str) or not self.pattern:
            raise LoraError(f"a target pattern must be a non-empty string, got {self.pattern!r}")
        known = ("rank", "alpha", "scaling")
        given = {name: value for name in known if (value := getattr(self, name)) is not None}
        check_settings(self.pattern, **given)
        if self.parts is not None:
            object.__setattr__(self, "parts", tuple(map(tuple, self.parts)))
        for name in ("inputs", "outputs", "stack"):
            axes = getattr(self, name)
            if axes is not None:
                object.__setattr__(self, name, (axes,) if isinstance(axes, int) else tuple(axes))
        if (self.inputs is None) != (self.outputs is None) or (
            self.stack is not None and self.inputs is None
        ):
            raise LoraError(
                f"{self.pattern!r}: a rule that states the roles of the axes states both inputs "
                f"and outputs, got inputs={self.inputs}, outputs={self.outputs}, stack={self.stack}"
            )


@dataclasses.dataclass(frozen=True)
class LoraSpec:
    """Low-rank adaptation of the targets: `h = W0 x + (alpha / rank) B A x` (arXiv 2106.09685).

    Attributes:
      rank: r, the inner dimension of the update; 1 <= r <= min(in, out) of each target.
      alpha: the update is scaled by `alpha / rank`.
      targets: patterns or `Rule`s, in order: the first that matches a parameter wins. A bare
        string stands for a tuple of one. `()` adapts nothing.
      fold: patterns of targets for which `W + scale * a @ b` may be formed where an operation
        has no low-rank rule (a `custom_vjp` or a Pallas kernel that takes the weight). This
        costs the memory of W and the FLOPs of full fine-tuning there, so it is never done
        unasked.
      kind: the kind of update: "lora", "dora", "vera", "loha", "lokr", "bias", or one of your own
        (`lora_jax.updates`).
      scaling: "alpha/r", or "alpha/sqrt(r)": rsLoRA (arXiv 2312.03732), stable at large ranks.

    Raises:
      LoraError: a rank below 1, an alpha that is not finite, a scaling that is neither of the two.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str | Rule, ...] | str = ALL_LINEAR
    fold: tuple[str, ...] | str = ()
    kind: str = "lora"
    scaling: str = "alpha/r"

    def __post_init__(self) -> None:
        check_settings("LoraSpec", self.rank, self.alpha, self.scaling)
        object.__setattr__(self, "targets", _tuple_of(self.targets))
        object.__setattr__(self, "fold", _tuple_of(self.fold))

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The targets as rules, in order, each with the spec's settings where it has none."""

        def whole(rule: Rule) -> Rule:
            names = ("rank", "alpha", "kind", "scaling")
            missing = {n: getattr(self, n) for n in names if getattr(rule, n) is None}
            return dataclasses.replace(rule, **missing)

        return tuple(whole(t if isinstance(t, Rule) else Rule(t)) for t in self.targets)


def _tuple_of(one_or_many: Any) -> tuple[Any, ...]:
    return (one_or_many,) if isinstance(one_or_many, str | Rule) else tuple(one_or_many)


def check_rank(rank: int, where: str) -> None:
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise LoraError(f"{where}: rank must be an integer of at least 1, got {rank!r}")


def check_settings(where: str, rank: Any = 1, alpha: Any = 1.0, scaling: Any = SCALINGS[0]) -> None:
    """Raise `LoraError` for a rank, an alpha or a scaling that no update can have."""
    check_rank(rank, where)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise LoraError(f"{where}: alpha must be a finite number, got {alpha!r}")
    if scaling not in SCALINGS:
        raise LoraError(f"{where}: scaling must be one of {SCALINGS}, got {scaling!r}")
