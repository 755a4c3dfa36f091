"""What is asked for: which parameters are adapted, at which rank and scale."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from lora_jax.errors import LoraError

ALL_LINEAR = "all-linear"


@dataclasses.dataclass(frozen=True)
class Rule:
    """One target pattern with its own rank and alpha (`None`: those of the spec).

    `pattern` is in the language of `lora_jax.paths`, or `"all-linear"`: every parameter that
    some product (`dot_general`, convolution, `ragged_dot`) consumes, but the output head, the
    parameter whose product every way to an output passes last.
    """

    pattern: str
    rank: int | None = None
    alpha: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str) or not self.pattern:
            raise LoraError(f"a target pattern must be a non-empty string, got {self.pattern!r}")
        if self.rank is not None:
            check_rank(self.rank, self.pattern)
        if self.alpha is not None:
            check_alpha(self.alpha, self.pattern)


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

    Raises:
      LoraError: a rank below 1, an alpha that is not finite, a pattern that cannot be read.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str | Rule, ...] | str = ALL_LINEAR
    fold: tuple[str, ...] | str = ()

    def __post_init__(self) -> None:
        check_rank(self.rank, "LoraSpec")
        check_alpha(self.alpha, "LoraSpec")
        object.__setattr__(self, "targets", _tuple_of(self.targets))
        object.__setattr__(self, "fold", _tuple_of(self.fold))

    @property
    def folded(self) -> tuple[str, ...]:
        """The patterns of `fold` as a tuple."""
        return _tuple_of(self.fold)

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The targets as rules, in order, each with its rank and alpha filled in."""
        rules = (t if isinstance(t, Rule) else Rule(t) for t in _tuple_of(self.targets))
        return tuple(
            dataclasses.replace(
                rule,
                rank=self.rank if rule.rank is None else rule.rank,
                alpha=self.alpha if rule.alpha is None else rule.alpha,
            )
            for rule in rules
        )


def _tuple_of(one_or_many: Any) -> tuple[Any, ...]:
    return (one_or_many,) if isinstance(one_or_many, str | Rule) else tuple(one_or_many)


def check_rank(rank: int, where: str) -> None:
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise LoraError(f"{where}: rank must be an integer of at least 1, got {rank!r}")


def check_alpha(alpha: float, where: str) -> None:
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise LoraError(f"{where}: alpha must be a finite number, got {alpha!r}")
