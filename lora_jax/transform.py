"""`adapt`: the fast path. The user's program is interpreted with (W, a, b) in W's place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from lora_jax import paths
from lora_jax.adapters import Adapters, check
from lora_jax.errors import LoraError
from lora_jax.layout import Layout
from lora_jax.multi import per_example
from lora_jax.multi.blend import Blend, Choosing
from lora_jax.multi.stack import Scaled
from lora_jax.primitives import jaxprs
from lora_jax.primitives.adapted_weight import AdaptedWeight
from lora_jax.primitives.table import RULES
from lora_jax.target import Target


def adapt(
    layout: Layout, f: Callable[..., Any], *, in_axes: Any = 0, out_axes: Any = 0
) -> Callable[..., Any]:
    """`g(params, adapters, *args, **kwargs)`, equal to `f` on the merged parameters.

    `g(params, adapters, x) == f(merge(layout, params, adapters), x)` in outputs and in gradients
    (up to rounding), but `a @ b` is never formed, and nothing of W's shape but W itself: where
    `f` computes `x W`, `g` computes `x W + scale * (x a) b`. Differentiate with respect to
    `adapters` alone: then no gradient of W exists either.

    `g` traces `f` to a jaxpr at each call and runs it equation by equation, so it composes with
    `jit`, `grad`, `vmap`, `scan`, `checkpoint`, ... like any function; put `jax.jit` around what
    you build with it.

    In the place of `adapters` it also takes what `lora_jax.multi.select` gives: one adapter of a
    stack, by a number that may be traced, or a mixed batch, **each example with its own adapter**.
    Then `f` is run on each example as a batch of one (a `jax.vmap`), so that
    `g(params, select(stacked, ids), x)[i] == f(merge(layout_i, params, adapters_i), x[i:i+1])[0]`
    holds for any `f`; the products with W have no example axis and stay one product for all.

    Args:
      layout: from `lora_jax.resolve` (on `f`, or on a function that uses the same weights alike),
        `lora_jax.restore` or `lora_jax.multi.stack`.
      f: a pure function whose first argument is the parameter tree.
      in_axes: mixed batches: the axis of the examples in the arguments after the adapters, as in
        `jax.vmap`: one for all array arguments (those of rank 0 are shared, but a scalar PRNG key
        is folded with the example's number), or a tuple with an entry for each, None for shared.
      out_axes: mixed batches: the axis of the examples in the outputs. A scalar becomes [B].

    Raises (when `g` is called):
      LoraError: the layout does not fit the parameters, the adapters do not fit the layout, an
        operation that takes an adapted weight has no low-rank rule, an adapter is never read, or
        in a mixed batch an argument has not as many examples as there are ids.

    >>> import jax.numpy as jnp, lora_jax
    >>> f = lambda params, x: jnp.tanh(x @ params["w"])
    >>> params, x = {"w": jnp.ones((8, 4))}, jnp.ones((2, 8))
    >>> layout = lora_jax.resolve(lora_jax.LoraSpec(rank=2, targets="w"), f, params, x)
    >>> adapters = lora_jax.init(jax.random.key(0), layout)
    >>> g = adapt(layout, f)
    >>> bool((g(params, adapters, x) == f(params, x)).all())  # b = 0: the first step is the base
    True
    >>> jax.tree.map(jnp.shape, jax.grad(lambda ad: g(params, ad, x).sum())(adapters))
    {'w': Factors(a=(8, 2), b=(2, 4))}
    """

    def one(params: Any, update: Blend, *args: Any, **kwargs: Any) -> Any:
        layout.check_params(paths.flatten(params))
        traced = jaxprs.trace(f, params, args, kwargs)
        interpreter = _Interpreter()
        ins = list(traced.inputs)
        position = {path: i for i, path in enumerate(traced.param_paths)}
        for t in layout.targets:
            gain, gate = update.gains.get(t.path), update.gates.get(t.path)
            w, factors = ins[position[t.path]], update.factors[t.path]
            ins[position[t.path]] = AdaptedWeight.start(t, w, factors, gain, gate, update.choice)
        outs = interpreter.evaluate(traced.jaxpr, traced.consts, ins)
        outs = [interpreter.returned(out) for out in outs]
        interpreter.check_all_read(layout)
        return jax.tree.unflatten(traced.out_tree, outs)

    def adapted(
        params: Any, adapters: Adapters | Scaled | Choosing, *args: Any, **kwargs: Any
    ) -> Any:
        if not isinstance(adapters, Choosing):
            update = adapters.blend() if isinstance(adapters, Scaled) else Blend(adapters)
            check(layout, update.factors)
            return one(params, update, *args, **kwargs)

        def call(choice: Any, *args: Any, **kwargs: Any) -> Any:
            return one(params, adapters.blend(layout, choice), *args, **kwargs)

        choice = adapters.choice(layout)
        if not adapters.per_example:
            return call(choice, *args, **kwargs)
        return per_example.each(call, choice, args, kwargs, in_axes, out_axes)

    return adapted


class _Interpreter:
    """Evaluates a jaxpr whose inputs may be adapted weights.

    Runs of equations that touch none are handed to JAX as they stand; the others go to their
    rule. Which is which is known as the values are, so the rules decide how far a weight lives.
    """

    def __init__(self) -> None:
        self._read: set[str] = set()

    def read(self, target: Target) -> None:
        """Note that a rule used the target's factors."""
        self._read.add(target.path)

    def check_all_read(self, layout: Layout) -> None:
        idle = [t.path for t in layout.targets if t.path not in self._read]
        if idle:
            raise LoraError(
                f"the function never reads the adapter of {idle[0]!r} ({len(idle)} in all), so it "
                "would have no effect; adapt with the part of the layout that this function "
                "uses: layout.subset(patterns)"
            )

    def evaluate(self, jaxpr: Any, consts: Sequence[Any], ins: Sequence[Any]) -> list[Any]:
        env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=False))
        env.update(zip(jaxpr.invars, ins, strict=True))
        last_use = _last_uses(jaxpr)
        adapted = {v for v, x in env.items() if isinstance(x, AdaptedWeight)}
        start = 0
        for i, eqn in enumerate(jaxpr.eqns):
            if not any(v in adapted for v in eqn.invars if not jaxprs.is_literal(v)):
                continue
            self._run_plain(jaxpr, start, i, env, last_use)
            start = i + 1
            ins = [_read(env, v) for v in eqn.invars]
            for v, out in zip(eqn.outvars, self._apply(eqn, ins), strict=True):
                env[v] = out
                if isinstance(out, AdaptedWeight):
                    adapted.add(v)
        self._run_plain(jaxpr, start, len(jaxpr.eqns), env, last_use)
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

    def _apply(self, eqn: Any, ins: list[Any]) -> Sequence[Any]:
        rule = RULES.get(eqn.primitive.name)
        with jaxprs.origin(eqn):
            outs = None if rule is None else rule(self, eqn, ins)
            if outs is None:
                outs = jaxprs.run_one(eqn, [self.plain(eqn, v) for v in ins])
        return outs

    def plain(self, eqn: Any, value: Any) -> Any:
        """A value where only an array will do: a weight is folded if allowed, else refused."""
        if not isinstance(value, AdaptedWeight):
            return value
        target = value.target
        if not target.fold:
            raise LoraError(
                f"{target.path!r}: {jaxprs.operand_name(eqn)} takes this adapted weight and has "
                "no low-rank rule. Leave it out of the targets, or allow W + scale * a @ b to be "
                f"formed there: LoraSpec(..., fold=({target.path!r},))"
            )
        self.read(target)
        return value.folded()

    def returned(self, value: Any) -> Any:
        """The function returns a parameter: the merged weight is asked for by name."""
        if not isinstance(value, AdaptedWeight):
            return value
        if not value.target.fold:
            raise LoraError(
                f"the function returns the adapted weight {value.target.path!r} itself; use "
                "lora_jax.merge for that, or leave it out of the targets"
            )
        self.read(value.target)
        return value.folded()


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
