"""An adapted weight on its way through a program: W beside its two factors, never their sum.

Every axis carries an integer name. An axis of W is

    stack    its name is in `w`, `a` and `b`      a slice has its own factors
    input    its name is in `w` and `a`
    output   its name is in `w` and `b`
    free     its name is in `w` alone             the update is constant along it (size 1, mostly)

so what an operation does to an axis of W, it does to each array that has the name. `a` and `b`
share the name RANK; `gain`, where there is one, has it too, or stack axes, or no axis at all.
Where the adapter is yet to be chosen among several, the three also share the axis MEMBER.
A router per token (`gate`) has its columns in `a`, after those of the rank.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.errors import LoraError
from lora_jax.primitives.gating import Gate, counted, gates
from lora_jax.target import Target
from lora_jax.updates.kind import Factors, wide_dtype

RANK, ROWS, MEMBER, TALLY = -1, -2, -3, -4  # names that are the same in all weights
_fresh = itertools.count()

Names = tuple[int, ...]
Ins = list[Any]  # of one equation, adapted weights among them
Outs = list[Any] | None  # None: the rule does not apply


def fresh(n: int) -> Names:
    """`n` axis names that nothing else has."""
    return tuple(next(_fresh) for _ in range(n))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Named:
    """An array and the name of each of its axes."""

    array: Any
    names: Names = dataclasses.field(metadata={"static": True})

    def size(self, name: int) -> int:
        return int(self.array.shape[self.names.index(name)])

    def moved(self, names: Names) -> Named:
        """The same array with its axes in the order of `names`."""
        if names == self.names:
            return self
        return Named(jnp.transpose(self.array, [self.names.index(n) for n in names]), names)

    def to_front(self, names: Names) -> Named:
        return self.moved((*names, *(n for n in self.names if n not in names)))

    def among(self, names: Names) -> Any:
        """The array with axes `names`, of size 1 where it has none, to be broadcast."""
        moved = self.moved(tuple(n for n in names if n in self.names))
        return jnp.expand_dims(moved.array, [i for i, n in enumerate(names) if n not in self.names])

    def renamed(self, new: dict[int, int]) -> Named:
        return Named(self.array, tuple(new[n] for n in self.names))

    def astype(self, dtype: Any) -> Named:
        return Named(jnp.asarray(self.array, dtype), self.names)


def einsum(left: Named, right: Named, out: Names, precision: Any = None) -> Any:
    """The product of two named arrays with axes `out`; names in neither `out` are summed."""
    letters = {n: i for i, n in enumerate(dict.fromkeys((*left.names, *right.names)))}
    lists = ([letters[n] for n in names] for names in (left.names, right.names, out))
    left_list, right_list, out_list = lists
    return jnp.einsum(left.array, left_list, right.array, right_list, out_list, precision=precision)


def scaled(h: Named, scale: float, gain: Named | None, gate: Gate | None = None) -> Named:
    """`scale * gain * gates * h` in h's dtype; h has every axis that gain has."""
    if gate is not None:
        h = _gated(h, gate)
    array = h.array * scale
    if gain is not None:
        array = array * gain.astype(array.dtype).among(h.names)
    return Named(array, h.names)


def _gated(h: Named, gate: Gate) -> Named:
    """`x a` for all experts, each weighted by the gate that the router's columns of it give."""
    h = h.moved((*(n for n in h.names if n != RANK), RANK))
    rank = h.array.shape[-1] - gate.n
    weights = gates(h.array[..., rank:], gate.top)
    if gate.probe is not None:
        weights = _counted(Named(weights, (*h.names[:-1], MEMBER)), gate)
    parts = h.array[..., :rank].reshape(*weights.shape, rank // gate.n)
    weighted = parts * weights[..., None].astype(parts.dtype)
    return Named(weighted.reshape(*h.array.shape[:-1], rank), h.names)


def _counted(weights: Named, gate: Gate) -> Any:
    """The gates again, counted slice by slice of the stack that the probe still has."""
    front = weights.to_front(tuple(n for n in gate.probe.names if n in weights.names[:-1]))
    stack = front.array.shape[: len(gate.probe.names) - 2]
    rows = front.array.reshape(*stack, -1, gate.n)
    array = counted(rows, gate.probe.array, gate.top).reshape(front.array.shape)
    return Named(array, front.names).moved(weights.names).array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdaptedWeight:
    """W, a and b with named axes; the value that stands for `w + scale * a @ b`.

    gain: what else the update is multiplied with, where that is data and not part of the layout:
      the scale of an adapter that was chosen among several, or a factor for each rank. With one
      the value is `w + scale * (a * gain) @ b`.
    gate: a router per token (`lora_jax.moe.router`). Then there is no such value, and the weight is
      good for products with all of an input alone.
    choice: which of the adapters along the axis MEMBER it is; None: there is no such axis.
    """

    w: Named
    a: Named
    b: Named
    scale: float = dataclasses.field(metadata={"static": True})
    target: Target = dataclasses.field(metadata={"static": True})
    gain: Named | None = None
    gate: Gate | None = None
    choice: Any = None

    @staticmethod
    def start(
        target: Target,
        w: Any,
        factors: Factors,
        gain: Any = None,
        gate: Gate | None = None,
        choice: Any = None,
    ) -> AdaptedWeight:
        """The weight as a program gets it; `gain`: [] or [rank], or None.

        With a choice the factors and the gain, [n], have a leading axis of adapters.
        """
        names = fresh(len(target.shape))
        pick = lambda which: tuple(names[i] for i in which)  # noqa: E731
        stack = pick(target.stack)
        several = () if choice is None else (MEMBER,)
        if gate is not None and gate.probe is not None:
            probe = Named(gate.probe, (*stack, TALLY, MEMBER))
            gate = dataclasses.replace(gate, probe=probe)
        return AdaptedWeight(
            Named(w, names),
            Named(factors.a, (*several, *stack, *pick(target.inputs), RANK)),
            Named(factors.b, (*several, *stack, RANK, *pick(target.outputs))),
            target.scale,
            target,
            None if gain is None else Named(gain, several or (RANK,) * jnp.ndim(gain)),
            gate,
            choice,
        )

    def map(self, fn: Callable[[Named], Named]) -> AdaptedWeight:
        """`fn` of each of the arrays."""
        gain, gate = None if self.gain is None else fn(self.gain), self.gate
        if gate is not None and gate.probe is not None:
            gate = dataclasses.replace(gate, probe=fn(gate.probe))
        w, a, b = fn(self.w), fn(self.a), fn(self.b)
        return dataclasses.replace(self, w=w, a=a, b=b, gain=gain, gate=gate)

    def chosen(self) -> AdaptedWeight:
        """The weight with the one adapter that was chosen for it."""
        if self.choice is None:
            return self
        index = self.choice.index

        def take(n: Named) -> Named:
            if MEMBER not in n.names:
                return n
            axis = n.names.index(MEMBER)
            array = jnp.take(n.array, index, axis=axis, mode="fill", fill_value=jnp.nan)
            return Named(array, (*n.names[:axis], *n.names[axis + 1 :]))

        return dataclasses.replace(self.map(take), choice=None)

    def scaled(self, h: Named) -> Named:
        """See `scaled`."""
        return scaled(h, self.scale, self.gain, self.gate)

    def check_linear(self, where: str) -> None:
        """Raise `LoraError` if a router per token makes the update depend on the input."""
        if self.gate is not None:
            raise LoraError(
                f"{self.target.path!r}: {where}, where a router per token has no whole input to "
                "route by. Leave it out of the targets, or use weights per example: moe.mix"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.w.array.shape)

    def names_at(self, dims: Any) -> Names:
        return tuple(self.w.names[i] for i in dims)

    def is_stack(self, name: int) -> bool:
        return name in self.a.names and name in self.b.names and name != RANK

    def is_input(self, name: int) -> bool:
        return name in self.a.names and name not in self.b.names

    def is_output(self, name: int) -> bool:
        return name in self.b.names and name not in self.a.names

    def is_free(self, name: int) -> bool:
        return name not in self.a.names and name not in self.b.names

    def with_w(self, array: Any) -> AdaptedWeight:
        return dataclasses.replace(self, w=Named(array, self.w.names))

    def update(self) -> Any:
        """`scale * a @ b` in W's present shape and in float32; only `folded` and rows need it."""
        if self.choice is not None:
            return self.chosen().update()
        self.check_linear("W + scale * a @ b itself is asked for")
        wide = wide_dtype(self.w.array.dtype)
        present = tuple(n for n in self.w.names if not self.is_free(n))
        a = self.scaled(self.a.astype(wide))
        delta = einsum(a, self.b.astype(wide), present, precision="highest")
        absent = [i for i, n in enumerate(self.w.names) if self.is_free(n)]
        return jnp.broadcast_to(jnp.expand_dims(delta, absent), self.shape)

    def folded(self) -> Any:
        """`w + scale * a @ b` as a plain array in W's dtype."""
        w = self.w.array
        delta = self.update()
        return (w.astype(delta.dtype) + delta).astype(w.dtype)
