"""The protocol of a kind of update: its arrays, their first values, and the update they mean."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lora_jax.base import Array, Parameters, W, dense, wide_dtype
from lora_jax.errors import LoraError, listed
from lora_jax.spec import Target
from lora_jax.updates.factors import Factors, Gains, in_w_order, named, rotated
from lora_jax.updates.lowrank import Gained, LowRank
from lora_jax.updates.named import BLOCK, COLUMN, ROW, Named, Names
from lora_jax.updates.rotated import Rotated
from lora_jax.updates.update import Update

Initializer = Callable[[jax.Array, Target, Any], jax.Array]


class Kind(abc.ABC):
    """A kind of update. It has no state: one object stands for the kind.

    A new kind is one class in one file, and `register(MyKind())`. No other code has to know it:
    `lora_jax.adapt` runs `factors` and the gains, `lora_jax.merge` runs `merged`, and a test
    compares the two. In the adapter tree a target has one NamedTuple of arrays, of the type
    `fields`; the methods call it `parameters`. In a stack of adapters an array is padded with
    zeros along its rank, and must mean the same update then.

    Attributes:
      name: the name that `Target.kind` and `Rule.kind` give.
      fields: the NamedTuple type for the arrays of one target.
      has_parts: whether it adapts slices of an axis (`Target.parts`).
      zero_at_first: the array that is zero at the start, so that the update is; "" if none is.
      pads: whether padding with zeros along the rank keeps the update. If not, adapters of one
        stack have one rank.
      activated: whether its updates are on for some tokens only (`lora_jax.multi.activated`).
    """

    name: ClassVar[str]
    fields: ClassVar[Any]
    has_parts: ClassVar[bool] = False
    zero_at_first: ClassVar[str] = "b"
    pads: ClassVar[bool] = True
    activated: ClassVar[bool] = False

    def roles(
        self, shape: tuple[int, ...], stack: tuple[int, ...]
    ) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Return the input axes and the output axes of a weight, if the kind decides them.

        A kind for biases and other vectors does. None, the default: the products that read the
        weight decide.

        Args:
          shape: the shape of the weight.
          stack: its stack axes.
        """
        return None

    @abc.abstractmethod
    def axes(self, target: Target) -> Any:
        """Return the axis of W that each axis of each array corresponds to.

        Sharding uses it to place the arrays like W.

        Args:
          target: from the layout.

        Returns:
          `fields` of tuples with an axis of W, or None for an axis that W does not have, such as
          the rank.
        """

    def shapes(self, target: Target) -> Any:
        """Return the shape of each array. By default, an axis that W does not have is the rank.

        Args:
          target: from the layout.

        Returns:
          `fields` of shapes.
        """

        def sizes(axes: tuple[int | None, ...]) -> tuple[int, ...]:
            return tuple(target.rank if i is None else target.shape[i] for i in axes)

        return self.fields(*map(sizes, self.axes(target)))

    @abc.abstractmethod
    def init(
        self, key: Array, target: Target, dtype: DTypeLike, a_init: Initializer, w: W | None = None
    ) -> Parameters:
        """Return arrays whose update is exactly zero.

        Args:
          key: a PRNG key for this target alone.
          target: from the layout.
          dtype: of the arrays.
          a_init: `a_init(key, target, dtype)` draws an array of `target.a_shape`.
          w: W itself, an array or a `Base`; None if the caller gave no parameters.

        Returns:
          `fields` of arrays.

        Raises:
          LoraError: the first values depend on W, and `w` is None.
        """

    def from_factors(self, target: Target, factors: Factors, w: W) -> Parameters:
        """Return arrays whose update gives `W + scale * a @ b` with the given factors.

        For methods that move a part of W into the factors; `w` is the rest.

        Args:
          target: from the layout.
          factors: a [*stack, *inputs, rank] and b [*stack, rank, *outputs].
          w: the rest of W, an array or a `Base`.

        Returns:
          `fields` of arrays.

        Raises:
          LoraError: arrays of this kind cannot express that. This is the default.
        """
        parts = " with parts" if target.parts else ""
        raise LoraError(
            f"{target.path!r}: an update of the kind {self.name!r}{parts} cannot begin with the "
            "factors of a matrix; use lora_jax.init for it, or kind='lora' or 'dora'"
        )

    @abc.abstractmethod
    def factors(self, target: Target, parameters: Parameters) -> Factors | None:
        """Return the exact factors of the update, which is `scale(target) * a @ b`.

        Their rank may differ from `target.rank`. They must not depend on W.

        Args:
          target: from the layout.
          parameters: the arrays of the target.

        Returns:
          a [*stack, *inputs, k] and b [*stack, k, *outputs]. None if the update has no low rank;
          the program then reads `merged` in place of W.
        """

    def scale(self, target: Target) -> float:
        """Return the number that multiplies the product of the factors.

        Args:
          target: from the layout.
        """
        return target.scale

    @property
    def is_plain(self) -> bool:
        """Whether its arrays are the factors of `scale * a @ b`, which is the whole update."""
        return self.fields is Factors and not self.rescales

    @property
    def rescales(self) -> bool:
        """Whether the kind has gains: its factors alone are not the update, which depends on W."""
        return type(self).gains is not Kind.gains

    def gains(
        self,
        target: Target,
        parameters: Parameters,
        w: W,
        scale: Array | float | None = None,
    ) -> Gains:
        """Return what multiplies `W + scale * a @ b`, on the side of the outputs or the inputs.

        Args:
          target: from the layout.
          parameters: the arrays of the target.
          w: Weight, an array or a `Base`.
          scale: the scale to use, which may be traced; None for the target's own.

        Returns:
          `Gains(outputs [*stack, *outputs], inputs [*stack, *inputs], rotation [*stack, blocks,
          size, size])` in float32 (float64 if W is). None is 1.
        """
        return Gains()

    def update(
        self, target: Target, parameters: Parameters, w: W, names: Names
    ) -> Update | jax.Array:
        """Return the update on its way through a program, or W' itself if it has no low rank.

        Args:
          target: from the layout.
          parameters: the arrays of the target.
          w: Weight, an array or a `Base`.
          names: the names of W's axes.
        """
        factors = self.factors(target, parameters)
        if factors is None:
            return self.merged(target, parameters, w)
        update = LowRank(*named(target, factors, names), self.scale(target))
        return gained(update, target, gains_of(target, parameters, w), names)

    def merged(self, target: Target, parameters: Parameters, w: W) -> Array:
        """Return W with its update, in W's dtype: the definition that the fast path must equal.

        The sum is formed in float32, or in W's dtype if it is wider, and rounded once.

        Args:
          target: from the layout.
          parameters: the arrays of the target.
          w: Weight, an array or a `Base`.
        """
        w = jnp.asarray(dense(w))
        wide = wide_dtype(w.dtype)
        whole = w.astype(wide) + self.delta(target, parameters, wide)
        gains = self.gains(target, parameters, w)
        if gains.rotation is not None:
            whole = rotated(target, whole, gains.rotation)
        for gain, side in gains.sides(target):
            whole = whole * in_w_order(target, gain, side)
        return whole.astype(w.dtype)

    def delta(
        self, target: Target, parameters: Parameters, dtype: DTypeLike = jnp.float32
    ) -> Array:
        """Return `scale * a @ b` with its axes in W's order.

        `a` [*stack, *inputs, rank] and `b` [*stack, rank, *outputs] are contracted over the rank,
        for each slice of the stack. Then the axes [*stack, *inputs, *outputs] are put into W's
        order.

        Args:
          target: from the layout.
          parameters: the arrays of the target.
          dtype: of the result.
        """
        factors = self.factors(target, parameters)
        assert factors is not None  # a kind without factors has a `delta` or `merged` of its own
        rank_axis = len(target.shape)  # a label that is not an axis of W
        return self.scale(target) * jnp.einsum(
            jnp.asarray(factors.a, dtype),
            (*target.stack, *target.inputs, rank_axis),
            jnp.asarray(factors.b, dtype),
            (*target.stack, rank_axis, *target.outputs),
            tuple(range(len(target.shape))),
            precision="highest",
        )

    def rank_limit(self, target: Target) -> tuple[int, str] | None:
        """Return the largest useful rank and what it is in words; None: there is none.

        Args:
          target: from the layout.
        """
        least = min(target.fan_in, target.fan_out)
        name = f"min(in, out) = min({target.fan_in}, {target.fan_out})"
        return (least, name) if target.inputs else None

    def check(self, target: Target) -> None:
        """Raise `LoraError` if the target has a rank or axes that this kind does not allow.

        Args:
          target: from the layout.
        """
        if target.parts and not self.has_parts:
            raise LoraError(
                f"{target.path!r}: the kind {self.name!r} has no parts; only kind='lora' takes "
                "slices of an output axis, and kind='tokens' rows"
            )
        limit = self.rank_limit(target)
        if limit is not None and target.rank > limit[0]:
            raise LoraError(
                f"{target.path!r}: rank {target.rank} is above {limit[1]} = {limit[0]}; lower the "
                f"rank, or give this target its own: Rule({target.path!r}, rank={limit[0]})"
            )

    def check_parameters(self, target: Target, parameters: Parameters) -> None:
        """Raise `LoraError` unless `parameters` are `fields` of arrays in the target's shapes.

        Args:
          target: from the layout.
          parameters: the arrays of the target.
        """
        names = self.fields._fields
        if not isinstance(parameters, self.fields):
            raise LoraError(
                f"{target.path!r}: expected {self.fields.__name__}({', '.join(names)}), got "
                f"{type(parameters).__name__}; lora_jax.restore and jax.tree.map keep the type"
            )
        wanted = self.shapes(target)
        got = tuple(tuple(jnp.shape(x)) for x in parameters)
        if got != tuple(wanted):
            rows = zip(names, got, wanted, strict=True)
            lines = [f"  {name}: got {x}, the layout has {y}" for name, x, y in rows]
            raise LoraError(
                f"{target.path!r}: the arrays do not fit the layout.\n" + "\n".join(lines) + "\n"
                f"The layout has kind {target.kind!r} and rank {target.rank}; were the adapters "
                "made with another spec?"
            )


_KINDS: dict[str, Kind] = {}


def register(kind: Kind) -> None:
    """Make a kind known by its name. It replaces a kind of the same name.

    Args:
      kind: an object of the kind's class.
    """
    _KINDS[kind.name] = kind


def kind_of(target: Target) -> Kind:
    """Return the kind of a target.

    Args:
      target: from the layout.

    Raises:
      LoraError: a kind that is not registered.
    """
    return kind_named(target.kind, target.path)


def kind_named(name: str, path: str) -> Kind:
    """Return a kind by its name; the path is for the message."""
    if name not in _KINDS:
        raise LoraError(
            f"{path!r} has the kind of update {name!r}, which is not registered; "
            f"known are:\n{listed(sorted(_KINDS), 20)}\n"
            "A kind of your own is made known by lora_jax.updates.register before it is used."
        )
    return _KINDS[name]


def is_parameters(x: Array) -> bool:
    """Return whether `x` is a NamedTuple of arrays of some registered kind."""
    return isinstance(x, tuple(kind.fields for kind in _KINDS.values()))


def gains_of(
    target: Target, parameters: Parameters, w: W, scale: Array | float | None = None
) -> Gains:
    """Return `Kind.gains` for the target's kind, under a name that the planner knows."""
    # The planner counts the scope "lora" as adapters; JAX writes the outermost scope as
    # `jvp(output_gain)`, so "lora" is the inner one.
    with jax.named_scope("output_gain"), jax.named_scope("lora"):
        return kind_of(target).gains(target, parameters, w, scale)


def gained(
    update: Update, target: Target, gains: Gains, names: Names, several: Names = ()
) -> Update:
    """Return the update with gains, whose leading axes are `several`."""

    def own(side: tuple[int, ...]) -> Names:
        return (*several, *(names[i] for i in (*target.stack, *side)))

    if gains.rotation is not None:
        inputs = tuple(names[i] for i in target.inputs)
        blocks = Named(gains.rotation, (*own(()), BLOCK, ROW, COLUMN))
        update = Rotated(update, blocks, inputs, target.sizes(target.inputs))
    for gain, side in gains.sides(target):
        update = Gained(update, Named(gain, own(side)))
    return update


def uniform(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike, fan_in: int) -> jax.Array:
    """Draw from U(-s, s) with s = 1/sqrt(fan_in), PEFT's usual `kaiming_uniform_(a=sqrt(5))`."""
    bound = fan_in**-0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)
