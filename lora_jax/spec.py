"""The spec, which says what to adapt, at which rank and scale; and a target, one that was found."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from lora_jax.errors import LoraError

ALL_LINEAR = "all-linear"
SCALINGS = ("alpha/r", "alpha/sqrt(r)")


@dataclasses.dataclass(frozen=True)
class Rule:
    """One target pattern with its own settings. A setting that is None is taken from the spec.

    Attributes:
      pattern: a pattern in the language of `lora_jax.paths`, or `"all-linear"`. That is every
        parameter that a product (`dot_general`, convolution, `ragged_dot`) consumes, except the
        output head: the parameter of the last product on every path to an output.
      rank, alpha, kind, scaling: as in `LoraSpec`.
      parts: `((start, size), ...)`. Only these slices of an output axis are adapted, and each has
        factors of its own: for example q and v of a fused qkv kernel. See `lora_jax.updates.lora`.
        With kind="tokens", the rows of an embedding that are trained.
      part_axis: the output axis that `parts` slices, as an index into the output axes. It has no
        effect without `parts`.
      inputs, outputs, stack: the roles of the axes of W. State them for a weight that passes an
        operation through which the trace cannot follow its axes. `inputs` and `outputs` are stated
        together. Without `stack`, every axis that is in neither is a stack axis.

    Raises:
      LoraError: an empty pattern, a rank, alpha or scaling that no update can have, or only one of
        `inputs` and `outputs`.
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
      targets: patterns or `Rule`s, in order. The first one that matches a parameter decides. A
        single string or `Rule` stands for a tuple of one, and `()` adapts nothing.
      fold: patterns of targets. For these, `W + scale * a @ b` may be formed in an operation that
        has no low-rank rule (a `custom_vjp` or a Pallas kernel that takes the weight). That costs
        the memory of W and the FLOPs of full fine-tuning there, so you have to ask for it.
      kind: the kind of update: "lora", "alora", "dora", "vera", "loha", "lokr", "miss", "ia3",
        "oft", "tokens", "bias", another of `lora_jax.updates`, or one of your own.
      scaling: "alpha/r", or "alpha/sqrt(r)", which is rsLoRA (arXiv 2312.03732) and stays stable
        at large ranks.

    Raises:
      LoraError: a rank below 1, an alpha that is not finite, or an unknown scaling.

    >>> spec = LoraSpec(rank=4, targets=("**/query/kernel", Rule("**/value/kernel", rank=8)))
    >>> [(rule.pattern, rule.rank, rule.alpha) for rule in spec.rules]
    [('**/query/kernel', 4, 16.0), ('**/value/kernel', 8, 16.0)]
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
        """The targets as rules, in order. The spec fills in each setting that a rule leaves out."""

        def whole(rule: Rule) -> Rule:
            names = ("rank", "alpha", "kind", "scaling")
            missing = {n: getattr(self, n) for n in names if getattr(rule, n) is None}
            return dataclasses.replace(rule, **missing)

        return tuple(whole(t if isinstance(t, Rule) else Rule(t)) for t in self.targets)


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


def _tuple_of(one_or_many: Any) -> tuple[Any, ...]:
    return (one_or_many,) if isinstance(one_or_many, str | Rule) else tuple(one_or_many)


def check_rank(rank: int, where: str) -> None:
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise LoraError(f"{where}: rank must be an integer of at least 1, got {rank!r}")


def check_settings(where: str, rank: Any = 1, alpha: Any = 1.0, scaling: Any = SCALINGS[0]) -> None:
    """Raise `LoraError` unless an update can have this rank, alpha and scaling."""
    check_rank(rank, where)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise LoraError(f"{where}: alpha must be a finite number, got {alpha!r}")
    if scaling not in SCALINGS:
        raise LoraError(f"{where}: scaling must be one of {SCALINGS}, got {scaling!r}")
