"""From a spec to a layout: a trace finds the targets and the roles of their axes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from lora_jax import paths
from lora_jax.errors import LoraError, listed, nearest
from lora_jax.layout import Layout
from lora_jax.primitives import jaxprs, roles
from lora_jax.primitives.dependence import Dependence, dependence
from lora_jax.spec import ALL_LINEAR, LoraSpec, Rule
from lora_jax.target import Target


def resolve(
    spec: LoraSpec, f: Callable[..., Any], params: Any, *args: Any, **kwargs: Any
) -> Layout:
    """Find the spec's targets in `f` and the roles of their axes, by an abstract trace.

    Nothing is computed: `params`, `args` and `kwargs` may hold `jax.ShapeDtypeStruct`s.
    Arguments that are not arrays (`train=True`, `mutable=[...]`) are passed to `f` as they are.

    Args:
      spec: what to adapt.
      f: a pure function whose first argument is the parameter tree.
      params: that tree. Paths in patterns are paths in it: for `model.apply` they begin with
        `params/`.
      *args, **kwargs: an example of the other arguments; only shapes and dtypes matter.

    Returns:
      The layout, its targets in the order of the parameter tree.

    Raises:
      LoraError: a pattern that matches nothing, a matched parameter that no product consumes or
        that meets an operation without a low-rank rule, a rank above min(in, out).

    >>> import jax.numpy as jnp, lora_jax
    >>> f = lambda params, x: jnp.einsum("bd,dhk->bhk", x, params["q"])
    >>> spec = LoraSpec(rank=2, alpha=4.0, targets="q")
    >>> print(resolve(spec, f, {"q": jnp.ones((8, 2, 4))}, jnp.ones((3, 8))))
    path   shape  stack  in  out  rank  scale  parameters
    q      8x2x4  -      0   1,2     2      2          32
    total                                              32
    """
    traced = jaxprs.trace(f, params, args, kwargs)
    found = _Found(roles.uses(traced), dependence(traced))
    chosen = _choose(spec, found)
    shapes = traced.param_shapes
    fold = {path for pattern in spec.folded for path in _matching(pattern, found.uses)}
    return Layout(
        tuple(
            _target(path, shapes[path], found.uses[path], chosen[path], path in fold)
            for path in traced.param_paths
            if path in chosen
        )
    )


class _Found(NamedTuple):
    """What a trace tells: how each parameter is used, and what depends on what."""

    uses: dict[str, tuple[roles.Use, ...]]
    dependence: Dependence


def _choose(spec: LoraSpec, found: _Found) -> dict[str, Rule]:
    """The first matching rule of each parameter. Every rule must match something."""
    chosen: dict[str, Rule] = {}
    for rule in spec.rules:
        for path in _matching_rule(rule, found):
            chosen.setdefault(path, rule)
    return chosen


def _matching_rule(rule: Rule, found: _Found) -> list[str]:
    if rule.pattern != ALL_LINEAR:
        return _matching(rule.pattern, found.uses)
    linear = [path for path, uses in found.uses.items() if any(u.is_product for u in uses)]
    kept = [path for path in linear if path not in found.dependence.heads]
    if not kept:
        raise LoraError(
            f"{ALL_LINEAR!r} matches nothing: the products consume {linear or 'no parameter'}, "
            "and the output head is left out; name the targets by their paths"
        )
    return kept


def _matching(pattern: str, known: Mapping[str, Any]) -> list[str]:
    hits = paths.matching(pattern, known)
    if not hits:
        raise LoraError(
            f"the pattern {pattern!r} matches no parameter; the nearest paths are:\n"
            f"{listed(nearest(pattern, known))}\n"
            "A pattern must match the whole path: '*' stays inside one segment, '**' spans "
            "several ('**/query/kernel')."
        )
    return hits


def _target(
    path: str, shape: tuple[int, ...], uses: tuple[roles.Use, ...], rule: Rule, fold: bool
) -> Target:
    if not fold:
        _refuse_barriers(path, uses)
    use = _canonical(path, shape, uses)
    assert rule.rank is not None and rule.alpha is not None  # filled in by spec.rules
    return Target(
        path, shape, use.stack, use.inputs, use.outputs, rule.rank, float(rule.alpha), fold
    )


def _refuse_barriers(path: str, uses: tuple[roles.Use, ...]) -> None:
    for use in uses:
        if use.barrier is not None and _adapted_elsewhere(uses):
            raise LoraError(
                f"{path!r} cannot be adapted: `{use.kind}` at {use.where} takes it, and has no "
                "low-rank rule. Leave it out of the targets, or allow W + scale * a @ b to be "
                f"formed there: LoraSpec(..., fold=({path!r},))"
            )


def _adapted_elsewhere(uses: tuple[roles.Use, ...]) -> bool:
    """A parameter that meets products and barriers; one that meets no product fails later."""
    return any(u.has_axes for u in uses)


def _canonical(path: str, shape: tuple[int, ...], uses: tuple[roles.Use, ...]) -> roles.Use:
    """The use whose axes count: convolutions and lookups before products, then the first."""
    complete = [u for u in uses if u.has_axes and _covers(u, shape)]
    if not complete:
        how = listed([f"`{u.kind}` at {u.where}" for u in uses]) or "  nothing reads it"
        raise LoraError(
            f"the targets match {path!r} (shape {shape}), but no product consumes it with input "
            f"and output axes; it is consumed by:\n{how}\n"
            "Narrow the pattern to weights of products, convolutions and embeddings."
        )
    order = ("conv_general_dilated", "ragged_dot_general", "gather", "dot_general")
    return min(complete, key=lambda u: order.index(u.kind))


def _covers(use: roles.Use, shape: tuple[int, ...]) -> bool:
    return sorted((*use.stack, *use.inputs, *use.outputs)) == list(range(len(shape)))
