"""`adapt`: the fast path. It runs the user's program with (W, a, b) in the place of W."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any

import jax

from lora_jax import paths
from lora_jax.adapters import Adapters, check
from lora_jax.bases.weight import Weight
from lora_jax.errors import LoraError
from lora_jax.layout import Layout
from lora_jax.primitives import jaxprs, table
from lora_jax.primitives.adapted_weight import AdaptedWeight
from lora_jax.primitives.evaluator import Evaluator
from lora_jax.spec import Target
from lora_jax.updates.activated import CURE, OnTokens
from lora_jax.updates.kind import kind_of
from lora_jax.updates.named import Names
from lora_jax.updates.update import Update, layers


def adapt(
    layout: Layout, f: Callable[..., Any], *, in_axes: Any = 0, out_axes: Any = 0
) -> Callable[..., Any]:
    """Return `g(params, adapters, *args, **kwargs)`, equal to `f` on the merged parameters.

    `g(params, adapters, x) == f(merge(layout, params, adapters), x)` in outputs and in gradients
    (up to rounding). But `g` never forms `a @ b`, and W is the only array of W's shape: where
    `f` computes `x W`, `g` computes `x W + scale * (x a) b`. Differentiate with respect to
    `adapters` alone; then no gradient of W exists either.

    `g` traces `f` to a jaxpr at each call and runs it equation by equation. So it composes with
    `jit`, `grad`, `vmap`, `scan` and the like, as any function does. Put `jax.jit` around the
    function that you build from it.

    Instead of an adapter tree, `g` also takes `lora_jax.dropout(adapters, key, rate)` and the
    result of `lora_jax.multi.select`: one adapter of a stack, whose number may be traced, or a
    mixed batch in which **each example has its own adapter**. For a mixed batch `g` runs `f` on
    each example as a batch of one (with `jax.vmap`), so that for any `f`
    `g(params, select(stacked, ids), x)[i] == f(merge(layout_i, params, adapters_i), x[i:i+1])[0]`.
    The products with W have no example axis and stay one product for the whole batch.

    Args:
      layout: from `lora_jax.resolve`, `lora_jax.restore` or `lora_jax.multi.stack`. It may come
        from another function than `f`, if that one uses the same weights in the same way.
      f: a pure function whose first argument is the parameter tree.
      in_axes: for mixed batches, the example axis of the arguments after the adapters, as in
        `jax.vmap`. One number serves all array arguments; an argument of rank 0 is shared, except
        that a scalar PRNG key is folded with the example's number. A tuple has one entry for each
        argument, None for a shared one.
      out_axes: for mixed batches, the example axis of the outputs. A scalar output becomes [B].

    Returns:
      The function `g`. Its outputs have the shapes and dtypes of `f`'s.

    Raises:
      LoraError: when `g` is called, if the layout does not fit the parameters, the adapters do not
        fit the layout, an operation on an adapted weight has no low-rank rule, an adapter is never
        read, or an argument of a mixed batch does not have as many examples as there are ids.

    Source:
      Equation 3 of arXiv 2106.09685: `h = W0 x + B A x`.

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

    def adapted(params: Any, adapters: Adapters | Several, *args: Any, **kwargs: Any) -> Any:
        def run(update_of: UpdateOf, per_example: bool, *args: Any, **kwargs: Any) -> Any:
            def weight(evaluator: Evaluator, target: Target, w: Any) -> Any:
                names = evaluator.fresh(len(target.shape))
                update = update_of(target, w, names)
                _check_activated(target, update)
                if isinstance(update, Update):
                    return AdaptedWeight(Weight.of(w), update, names, target.path, target.fold)
                evaluator.paths_read.add(target.path)
                return update  # the merged weight, of a kind without factors

            evaluator = Evaluator(table.PRIMITIVES, per_example)
            return interpret(evaluator, layout, f, weight, params, *args, **kwargs)

        if isinstance(adapters, Several):
            return adapters.run(layout, run, args, kwargs, (in_axes, out_axes))
        return run(single(layout, adapters), False, *args, **kwargs)

    return adapted


UpdateOf = Callable[[Target, Any, Names], Update | jax.Array]
"""From a target, W and the names of its axes to its update, or to the merged weight."""


def _check_activated(target: Target, update: Update | jax.Array) -> None:
    found = layers(update) if isinstance(update, Update) else ()
    if kind_of(target).activated and not any(isinstance(one, OnTokens) for one in found):
        raise LoraError(
            f"{target.path!r}: an update of the kind {target.kind!r} is on for some tokens only; "
            f"{CURE}"
        )


class Several(abc.ABC):
    """Many adapters, or one that is changed, as `adapt` takes them in the place of one."""

    @abc.abstractmethod
    def run(
        self, layout: Layout, run: Callable[..., Any], args: Any, kwargs: Any, axes: tuple[Any, Any]
    ) -> Any:
        """Return `run(update_of, per_example, *args, **kwargs)`, or that for each example.

        axes: `in_axes` and `out_axes` of `adapt`.
        """


def single(layout: Layout, adapters: Adapters) -> UpdateOf:
    """Return the updates of one adapter, after checking that it fits the layout."""
    check(layout, adapters)
    return lambda target, w, names: kind_of(target).update(target, adapters[target.path], w, names)


def interpret(
    evaluator: Evaluator,
    layout: Layout,
    f: Callable[..., Any],
    weight: Callable[[Evaluator, Target, Any], Any],
    params: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Run `f(params, *args, **kwargs)` with `weight(evaluator, target, w)` for each target."""
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
