"""The evaluator of a traced program some of whose inputs are adapted weights."""

from __future__ import annotations

import collections
import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.bases.held import Deferred
from lora_jax.errors import LoraError
from lora_jax.named import Ins, Names, Outs
from lora_jax.primitives import jaxprs
from lora_jax.primitives.adapted_weight import AdaptedWeight
from lora_jax.primitives.table import RULES
from lora_jax.updates.update import Zero


class Evaluator:
    """Evaluates a jaxpr equation by equation.

    Runs of equations that touch no adapted weight are handed to JAX as they stand; the others go
    to their rule. Which is which is known as the values are, so the rules decide how far a weight
    lives.

    per_example: whether it runs for one example, under a `vmap` over all of a mixed batch.
    """

    def __init__(self, per_example: bool = False) -> None:
        self.per_example = per_example
        self.paths_read: set[str] = set()
        self.dequantised: dict[str, str] = {}  # path -> the first operation that took it whole
        self._names = itertools.count()
        self._uses: collections.Counter[str] = collections.Counter()
        self._use: int | None = None
        self._jaxprs: list[Any] = []  # those being evaluated, the innermost last

    def fresh(self, n: int) -> Names:
        """`n` axis names that nothing else in this trace has."""
        return tuple(next(self._names) for _ in range(n))

    def read(self, v: AdaptedWeight) -> None:
        """Note that a rule used the weight's update."""
        self.paths_read.add(v.path)

    def consume(
        self, eqn: Any, v: AdaptedWeight, stack: Names, inputs: Names, outputs: Names
    ) -> int:
        """Note that a rule uses the weight, and the roles that its axes have there.

        Returns the number of this use: 0 for the first of this weight, and so on.
        """
        del eqn, stack, inputs, outputs
        self.read(v)
        return self.next_use(v.path)

    def dequantise(self, eqn: Any, v: AdaptedWeight) -> None:
        """Note that an operation takes the weight as one array, also if W is kept as codes."""
        if isinstance(v.held, Deferred):
            where = "the end of the function" if eqn is None else jaxprs.operand_name(eqn)
            self.dequantised.setdefault(v.path, where)

    def next_use(self, path: str) -> int:
        if self._use is not None:
            return self._use
        self._uses[path] += 1
        return self._uses[path] - 1

    @contextlib.contextmanager
    def one_use(self, number: int) -> Iterator[None]:
        """All uses within have this number, however often the same equations are evaluated."""
        before, self._use = self._use, number
        yield
        self._use = before

    def evaluate(self, jaxpr: Any, consts: Sequence[Any], ins: Sequence[Any]) -> list[Any]:
        """The outputs of `jaxpr`, each an array or an adapted weight."""
        env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=False))
        env.update(zip(jaxpr.invars, ins, strict=True))
        last_use = _last_uses(jaxpr)
        adapted = {v for v, x in env.items() if isinstance(x, AdaptedWeight)}
        start = 0
        self._jaxprs.append(jaxpr)
        for i, eqn in enumerate(jaxpr.eqns):
            touched = any(v in adapted for v in eqn.invars if not jaxprs.is_literal(v))
            ragged = self.per_example and jaxprs.contains(eqn, "ragged_dot_general")
            if not (touched or ragged):
                continue
            self._run_plain(jaxpr, start, i, env, last_use)
            start = i + 1
            ins = [_read(env, v) for v in eqn.invars]
            with jaxprs.origin(eqn):
                outs = self.apply(eqn, ins)
            for v, out in zip(eqn.outvars, outs, strict=True):
                env[v] = out
                if isinstance(out, AdaptedWeight):
                    adapted.add(v)
        self._run_plain(jaxpr, start, len(jaxpr.eqns), env, last_use)
        self._jaxprs.pop()
        return [_read(env, v) for v in jaxpr.outvars]

    def _run_plain(
        self, jaxpr: Any, start: int, stop: int, env: dict[Any, Any], last_use: dict[Any, int]
    ) -> None:
        """Run the untouched equations `start:stop`, keep what is used after them, drop the rest."""
        if start < stop:
            eqns = jaxpr.eqns[start:stop]
            made = {v: None for e in eqns for v in e.outvars}
            reads = [v for e in eqns for v in e.invars if not jaxprs.is_literal(v)]
            needed = [v for v in dict.fromkeys(reads) if v not in made]
            kept = [v for v in made if last_use.get(v, -1) >= stop]
            outs = jaxprs.run(eqns, needed, kept, [env[v] for v in needed])
            env.update(zip(kept, outs, strict=True))
        for v in [v for v in env if last_use.get(v, -1) < stop]:
            del env[v]

    def apply(self, eqn: Any, ins: list[Any]) -> Sequence[Any]:
        """One equation that an adapted weight enters: by its rule, or on plain arrays."""
        rule = RULES.get(eqn.primitive.name)
        outs = None if rule is None else rule(self, eqn, ins)
        return self.opaque(eqn, ins) if outs is None else outs

    def opaque(self, eqn: Any, ins: list[Any]) -> Sequence[Any]:
        """An equation that takes no adapted weight, run on plain arrays."""
        return jaxprs.run_one(eqn, [self.plain(eqn, v) for v in ins])

    def with_one_weight(self, eqn: Any, ins: Ins) -> Outs:
        """The operands of a product, of which one is a weight: a second one that nothing adapts, or
        that may be folded, is made an array. None: both are adapted."""
        both = [i for i, v in enumerate(ins) if isinstance(v, AdaptedWeight)]
        spare = [i for i in both if isinstance(ins[i].update, Zero) or ins[i].fold]
        if len(both) == 2 and not spare:
            return None
        if len(both) == 2:
            ins = [self.plain(eqn, v) if i == spare[-1] else v for i, v in enumerate(ins)]
        return ins

    def through(self, fn: Callable[..., Any], eqn: Any, ins: Ins) -> Outs:
        """An equation by the rules for the equations of `fn`, which does the same."""
        traced = jax.make_jaxpr(fn)(*(v.aval for v in eqn.invars))
        return self.evaluate(*jaxprs.opened(traced), ins)

    def joins(self, ins: Ins) -> bool:
        """Whether these make one weight where they are put together."""
        del ins
        return True

    def compact(self, eqn: Any, operand: int, value: Any) -> Any:
        """A plain operand that was broadcast just before, with size 1 along the new axes again."""
        var = eqn.invars[operand]
        if jnp.ndim(value) == 0 or jaxprs.is_literal(var):
            return value
        made = next((e for e in self._jaxprs[-1].eqns if var in e.outvars), None)
        if made is None or made.primitive.name != "broadcast_in_dim":
            return value
        shape, dims = made.invars[0].aval.shape, made.params["broadcast_dimensions"]
        size = dict(zip(dims, shape, strict=True))
        for axis in range(jnp.ndim(value)):
            if size.get(axis, 1) == 1:
                value = lax.slice_in_dim(value, 0, 1, axis=axis)
        return value

    def plain(self, eqn: Any, value: Any) -> Any:
        """A value where only an array will do: a weight is folded if allowed, else refused."""
        if not isinstance(value, AdaptedWeight):
            return value
        if not value.fold:
            raise LoraError(
                f"{value.path!r}: {jaxprs.operand_name(eqn)} takes this adapted weight and has "
                "no low-rank rule. Leave it out of the targets, or allow W + scale * a @ b to be "
                f"formed there: LoraSpec(..., fold=({value.path!r},))"
            )
        self.read(value)
        self.dequantise(eqn, value)
        return value.merged()

    def returned(self, value: Any) -> Any:
        """The function returns a parameter: the merged weight is asked for by name."""
        if not isinstance(value, AdaptedWeight):
            return value
        if not value.fold:
            raise LoraError(
                f"the function returns the adapted weight {value.path!r} itself; use "
                "lora_jax.merge for that, or leave it out of the targets"
            )
        self.read(value)
        self.dequantise(None, value)
        return value.merged()


def _read(env: dict[Any, Any], atom: Any) -> Any:
    return atom.val if jaxprs.is_literal(atom) else env[atom]


def _last_uses(jaxpr: Any) -> dict[Any, int]:
    """Index of the last equation that reads each variable; outputs are read after all."""
    last = {}
    for i, eqn in enumerate(jaxpr.eqns):
        for v in eqn.invars:
            if not jaxprs.is_literal(v):
                last[v] = i
    for v in jaxpr.outvars:
        if not jaxprs.is_literal(v):
            last[v] = len(jaxpr.eqns)
    return last
