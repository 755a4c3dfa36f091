"""`adapt`: the fast path. The user's program is interpreted with (W, a, b) in W's place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from lora_jax import paths
from lora_jax.adapters import Adapters
from lora_jax.bases.held import held
from lora_jax.errors import LoraError
from lora_jax.layout import Layout
from lora_jax.multi import per_example
from lora_jax.multi.blend import Blend, Choosing
from lora_jax.multi.stack import Scaled, blended
from lora_jax.primitives import jaxprs
from lora_jax.primitives.adapted_weight import AdaptedWeight
from lora_jax.primitives.evaluator import Evaluator
from lora_jax.target import Target
from lora_jax.updates.kind import kind_of


def adapt(
    layout: Layout, f: Callable[..., Any], *, in_axes: Any = 0, out_axes: Any = 0
) -> Callable[..., Any]:
    """`g(params, adapters, *args, **kwargs)`, equal to `f` on the merged parameters.

    `g(params, adapters, x) == f(merge(layout, params, adapters), x)` in outputs and in gradients
    (up to rounding), but `a @ b` is never formed, and nothing of W's shape but W itself: where
    `f` computes `x W`, `g` computes `x W + scale * (x a) b`. Differentiate with respect to
    `adapters` alone: then no gradient of W exists either.

    `g` traces `f` to a jaxpr at each call and runs it equation by equation, so it composes with
    `jit`, `grad`, `vmap`, `scan`, ... like any function; put `jax.jit` around what you build of it.

    In the place of `adapters` it also takes `lora_jax.dropout(adapters, key, rate)`, and what
    `lora_jax.multi.select` gives: one adapter of a stack, by a number that may be traced, or a
    mixed batch, **each example with its own adapter**. Then `f` is run on each example as a batch
    of one (a `jax.vmap`), so that for any `f`
    `g(params, select(stacked, ids), x)[i] == f(merge(layout_i, params, adapters_i), x[i:i+1])[0]`;
    the products with W have no example axis and stay one product for all.

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

    def one(many: bool, params: Any, update: Blend, *args: Any, **kwargs: Any) -> Any:
        def weight(evaluator: Evaluator, target: Target, w: Any) -> Any:
            names = evaluator.fresh(len(target.shape))
            running = update.of(target, w, names)
            if running is not None:
                return AdaptedWeight(held(w), running, names, target.path, target.fold)
            evaluator.paths_read.add(target.path)
            return kind_of(target).merged(target, update.factors[target.path], w)

        return interpret(Evaluator(many), layout, f, weight, params, *args, **kwargs)

    def adapted(
        params: Any, adapters: Adapters | Scaled | Choosing, *args: Any, **kwargs: Any
    ) -> Any:
        if not isinstance(adapters, Choosing):
            return one(False, params, blended(layout, adapters), *args, **kwargs)

        def call(choice: Any, *args: Any, **kwargs: Any) -> Any:
            blend = adapters.blend(layout, choice)
            return one(adapters.per_example, params, blend, *args, **kwargs)

        choice = adapters.choice(layout)
        if not adapters.per_example:
            return call(choice, *args, **kwargs)
        return per_example.each(call, choice, args, kwargs, in_axes, out_axes)

    return adapted


def interpret(
    evaluator: Evaluator,
    layout: Layout,
    f: Callable[..., Any],
    weight: Callable[[Evaluator, Target, Any], Any],
    params: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """`f(params, *args, **kwargs)`, with `weight(evaluator, target, w)` in each target's place."""
    layout.check_params(paths.flatten(params))
    traced = jaxprs.trace(f, params, args, kwargs)
    targets = {t.path: t for t in layout.targets}

    def of(path: str, w: Any) -> Any:
        return weight(evaluator, targets[path], w) if path in targets else evaluator.frozen(path, w)

    outs = evaluator.run(traced, traced.inputs, of)
    idle = [t.path for t in layout.targets if t.path not in evaluator.paths_read]
    if idle:
        raise LoraError(
            f"the function never reads the adapter of {idle[0]!r} ({len(idle)} in all), so it "
            "would have no effect; adapt with the part of the layout that this function "
            "uses: layout.subset(patterns)"
        )
    return jax.tree.unflatten(traced.out_tree, outs)
