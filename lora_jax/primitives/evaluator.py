"""The evaluator of a traced program in which some inputs are adapted weights."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax import lax

from lora_jax.base import Base
from lora_jax.bases.weight import Weight
from lora_jax.errors import LoraError
from lora_jax.primitives import jaxprs
from lora_jax.primitives.adapted_weight import AdaptedWeight, Ins, Outs, Value
from lora_jax.primitives.jaxprs import Eqn, Program
from lora_jax.updates.named import Named, Names
from lora_jax.updates.update import Update, Zero

PrimitiveRule = Callable[["Evaluator", Eqn, Ins], Outs]


@dataclasses.dataclass(frozen=True)
class Primitive:
    """All that is known of one primitive.

    rule: what it does to an adapted weight. None: it takes only arrays.
    operands: the number of operands that a product multiplies; any of them may be the weight. 0: it
      is not a product.
    general: whether the product takes a weight in any form (its transpose, a part), so that other
      uses of the weight tell its axes better.
    lookup: whether it picks parts of its first operand by the others.
    view: whether it rearranges its only operand, so that a row of a weight may still be a weight.
    body: whether it is control flow, whose rule evaluates the program inside of it.
    residual: whether it is a sum, which joins two paths through the program.
    picks: whether its first operand only chooses among the others.
    each: whether each output is the operand at the same place.
    scales: whether it multiplies or divides element by element.
    joins: whether it puts its operands side by side.
    """

    rule: PrimitiveRule | None = None
    operands: int = 0
    general: bool = False
    lookup: bool = False
    view: bool = False
    body: bool = False
    residual: bool = False
    picks: bool = False
    each: bool = False
    scales: bool = False
    joins: bool = False


Primitives = Mapping[str, Primitive]  # by the primitive's name, and by "custom_vjp_call NAME"
UNKNOWN = Primitive()
EVERY = sys.maxsize  # an operation that may multiply any of its operands


class Evaluator:
    """An evaluator that runs a jaxpr equation by equation.

    Sequences of equations that touch no adapted weight go to JAX unchanged; every other equation
    goes to its rule. Which is which is decided as the values become known, so the rules decide for
    how long a weight stays a weight.

    per_example: whether it runs for one example, under a `vmap` over all examples of a mixed batch.
    """

    enters = False  # whether it evaluates the body of control flow that takes no weight too

    def __init__(self, table: Primitives, per_example: bool = False) -> None:
        self.table = table
        self.per_example = per_example
        self.paths_read: set[str] = set()
        self._names = itertools.count()
        self._uses: collections.Counter[str] = collections.Counter()
        self._use: int | None = None
        self._programs: list[Program] = []  # the programs under evaluation, the innermost last

    def primitive(self, eqn: Eqn) -> Primitive:
        """Return what is known of an equation's primitive, or of the function that it calls."""
        name = eqn.primitive.name
        own = self.table.get(f"{name} {jaxprs.function_name(eqn)}") if "vjp" in name else None
        return own or self.table.get(name, UNKNOWN)

    def fresh(self, n: int) -> Names:
        """Return `n` axis names that are new in this trace."""
        return tuple(next(self._names) for _ in range(n))

    def consume(
        self, eqn: Eqn, v: AdaptedWeight, stack: Names, inputs: Names, outputs: Names
    ) -> int:
        """Note the roles that the axes of a weight have in a product, and return its number.

        The number is 0 for the first use of this weight, and so on.
        """
        self.paths_read.add(v.path)
        return self.next_use(v.path)

    def lost(self, v: AdaptedWeight, names: Names, how: str, into: Names = ()) -> AdaptedWeight:
        """Note that W has lost axes: `how` is "taken" (a slice was chosen) or "summed"."""
        return v

    def renamed(self, update: Update, new: dict[int, int]) -> Update:
        """Return the same update for a weight whose axes have other names."""
        return update.map(lambda n: n.renamed(new))

    def regrouped(
        self, update: Update, old: Names, units: Names, new: dict[int, int]
    ) -> Update | None:
        """Return the update with the axes `old`, in this order, reshaped into axes `new`, or None.

        `new` maps names to sizes. `units` are axes of size 1, which are dropped. The old axes must
        all have the same role.
        """

        def one(n: Named) -> Named:
            n = n.reduced(units, lax.squeeze)
            if not any(x in n.names for x in old):
                return n
            n = n.to_front(old)
            rest = n.array.shape[len(old) :]
            return Named(n.array.reshape((*new.values(), *rest)), (*new, *n.names[len(old) :]))

        return update.map(one) if len({update.role(n) for n in old}) <= 1 else None

    def dequantise(self, eqn: Eqn | None, v: AdaptedWeight) -> None:
        """Note that an operation needs the weight as one array although W is stored as codes."""

    def next_use(self, path: str) -> int:
        if self._use is not None:
            return self._use
        self._uses[path] += 1
        return self._uses[path] - 1

    @contextlib.contextmanager
    def one_use(self, number: int) -> Iterator[None]:
        """Give all uses inside the block this number, even if equations are evaluated again."""
        before, self._use = self._use, number
        yield
        self._use = before

    def frozen(self, path: str, w: jax.Array | Base) -> Value:
        """Return a parameter without an adapter; a base is still dequantised where it is used."""
        if not isinstance(w, Base):
            return w
        return AdaptedWeight(Weight.of(w), Zero(), self.fresh(w.ndim), path, True)

    def run(
        self, traced: jaxprs.TracedCall, ins: Sequence[Any], weight: Callable[[str, Any], Any]
    ) -> list[Any]:
        """Return the outputs of a call, with `weight(path, w)` in place of each parameter."""
        values = [*map(weight, traced.param_paths, ins), *ins[len(traced.param_paths) :]]
        return [self.leave(None, out) for out in self.evaluate(traced, values)]

    def evaluate(self, closed: Program, ins: Sequence[Value]) -> list[Value]:
        """Return the outputs of a jaxpr with its constants, each an array or an adapted weight."""
        jaxpr, consts, reads, last_use = jaxprs.prepared(closed)
        env: dict[Any, Value] = dict(zip(jaxpr.constvars, consts, strict=False))
        env.update(zip(jaxpr.invars, ins, strict=True))

        primitives = [self.primitive(eqn) for eqn in jaxpr.eqns]

        def run_plain(start: int, stop: int) -> None:
            """Run the untouched equations `start:stop` and drop the values no longer read."""
            if start < stop:
                eqns = jaxpr.eqns[start:stop]
                made = {v: None for e in eqns for v in e.outvars}
                read = dict.fromkeys(itertools.chain.from_iterable(reads[start:stop]))
                needed = [v for v in read if v not in made]
                kept = [v for v in made if last_use.get(v, -1) >= stop]
                ins = [env[v] for v in needed]
                outs = self.run_plain(eqns, primitives[start:stop], needed, kept, ins)
                env.update(zip(kept, outs, strict=True))
            for v in [v for v in env if last_use.get(v, -1) < stop]:
                del env[v]

        start = 0
        self._programs.append(jaxpr)
        for i, (eqn, known) in enumerate(zip(jaxpr.eqns, primitives, strict=True)):
            if not self._needs_rule(eqn, known, [env.get(v) for v in reads[i]]):
                continue
            run_plain(start, i)
            start = i + 1
            with jaxprs.origin(eqn):
                outs = self.apply(eqn, known, jaxprs.read(env, eqn.invars))
            env.update(zip(eqn.outvars, outs, strict=True))
        run_plain(start, len(jaxpr.eqns))
        self._programs.pop()
        return jaxprs.read(env, jaxpr.outvars)

    def _needs_rule(self, eqn: Eqn, known: Primitive, reads: Sequence[Value | None]) -> bool:
        """Return whether an equation goes to its rule: if it takes a weight, or must be entered."""
        if any(isinstance(v, AdaptedWeight) for v in reads) or (self.enters and known.body):
            return True
        return self.per_example and jaxprs.contains(eqn, "ragged_dot_general")

    def run_plain(
        self, eqns: Sequence[Eqn], known: Sequence[Primitive], needed: Any, kept: Any, ins: Ins
    ) -> list[Value]:
        """Return the variables `kept` that some equations make out of the variables `needed`."""
        return jaxprs.run(eqns, needed, kept, ins)

    def apply(self, eqn: Eqn, known: Primitive, ins: Ins) -> Sequence[Value]:
        """Run one equation with an adapted weight among its inputs: by its rule, or on arrays."""
        outs = None if known.rule is None else known.rule(self, eqn, ins)
        return self.opaque(eqn, ins) if outs is None else outs

    def opaque(self, eqn: Eqn, ins: Ins) -> Sequence[Value]:
        """Run an equation that takes no adapted weight on plain arrays."""
        return jaxprs.run_one(eqn, [self.plain(eqn, v) for v in ins])

    def through(self, fn: Callable[..., Any], eqn: Eqn, ins: Ins) -> Outs:
        """Run an equation by the rules for the equations of `fn`, which computes the same."""
        return self.evaluate(jax.make_jaxpr(fn)(*(v.aval for v in eqn.invars)), ins)

    # The loops and branches of JAX, with weights inside; an analysis runs them in another way.

    def scan(self, body: Callable[..., Any], carry: Any, xs: Any, **how: Any) -> tuple[Any, Any]:
        return lax.scan(body, carry, xs, **how)

    def while_loop(self, test: Callable[..., Any], body: Callable[..., Any], carry: Any) -> Any:
        return lax.while_loop(test, body, carry)

    def branch(self, choose: Callable[..., Any], branches: Sequence[Any], ins: Ins) -> Any:
        return choose(branches, ins)

    def leave(self, eqn: Eqn | None, value: Value) -> Value:
        """Return a value as it leaves a body, or the program: as an array."""
        return self.plain(eqn, value)

    def compact(self, eqn: Eqn, operand: int, value: jax.Array) -> jax.Array:
        """Return a plain operand that was just broadcast, with size 1 along the new axes again."""
        every = self._programs[-1].eqns
        made = next((e for e in every if any(v is eqn.invars[operand] for v in e.outvars)), None)
        if made is None or "broadcast_dimensions" not in made.params:
            return value
        size = dict(
            zip(made.params["broadcast_dimensions"], made.invars[0].aval.shape, strict=True)
        )
        shape = [n if size.get(i, 1) > 1 else 1 for i, n in enumerate(value.shape)]
        return lax.slice(value, [0] * len(shape), shape)

    def plain(self, eqn: Eqn | None, value: Value) -> jax.Array:
        """Return the value as an array: a weight is folded if that is allowed, and else refused.

        eqn: the operation that takes it. None: the function returns it.
        """
        if not isinstance(value, AdaptedWeight):
            return value
        path = value.path
        if not value.fold and eqn is None:
            raise LoraError(
                f"the function returns the adapted weight {path!r} itself; use lora_jax.merge for "
                "that, or leave it out of the targets"
            )
        if not value.fold:
            where, kind = jaxprs.operand_name(eqn), eqn.primitive.name if eqn else ""
            raise LoraError(f"{path!r}: {where} takes this weight and {jaxprs.cures(path, kind)}")
        self.paths_read.add(value.path)
        return value.merged()
