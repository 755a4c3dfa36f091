"""From a spec to a layout: a trace finds the targets and the roles of their axes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from lora_jax import paths
from lora_jax.errors import LoraError, listed, nearest
from lora_jax.layout import Layout, LeftOut
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
    found = _Found(traced.param_shapes, roles.uses(traced), dependence(traced))
    chosen = _choose(spec, found)
    fold = {path for pattern in spec.folded for path in _matching(pattern, found.uses)}
    return Layout(
        tuple(
            _target(path, found, chosen[path], path in fold)
            for path in traced.param_paths
            if path in chosen
        ),
        _left_out(spec, chosen, found),
    )


class _Found(NamedTuple):
    """What a trace tells: how each parameter is used, and what depends on what."""

    shapes: dict[str, tuple[int, ...]]
    uses: dict[str, tuple[roles.Use, ...]]
    dependence: Dependence

    def kernels(self) -> list[str]:
        """The weights of all products, in the order of the tree."""
        return [
            path
            for path, shape in self.shapes.items()
            if len(shape) > 1 and path in self.dependence.kernels
        ]

    def obstacle(self, path: str) -> str | None:
        """Why "all-linear" does not take a kernel; None: it does."""
        if path in self.dependence.heads:
            return "the output head: no other product follows it; name it to adapt it"
        uses = self.uses[path]
        if any(u.is_product and _covers(u, self.shapes[path]) for u in uses):
            return None
        lost = next((u for u in uses if u.barrier), None)
        if lost is None:
            where = self.dependence.kernels[path]
            return f"{where} uses it along axes that are not all input, output or stack"
        return (
            f"`{lost.kind}` at {lost.where} takes it and has no low-rank rule; to adapt it, name "
            f"it, say its axes with Rule({path!r}, inputs=, outputs=), and add it to fold"
        )


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
    kept = [path for path in found.kernels() if found.obstacle(path) is None]
    if not kept:
        why = listed([f"{path}: {found.obstacle(path)}" for path in found.kernels()])
        raise LoraError(
            f"{ALL_LINEAR!r} matches nothing; of the parameters that a product uses it leaves "
            f"out:\n{why or '  (no product uses any)'}\nName the targets by their paths."
        )
    return kept


def _left_out(spec: LoraSpec, chosen: Mapping[str, Rule], found: _Found) -> tuple[LeftOut, ...]:
    """The kernels that "all-linear" did not take and no other rule named, each with the reason."""
    if all(rule.pattern != ALL_LINEAR for rule in spec.rules):
        return ()
    rows = ((path, found.obstacle(path)) for path in found.kernels() if path not in chosen)
    return tuple(LeftOut(path, found.shapes[path], why) for path, why in rows if why)


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


def _target(path: str, found: _Found, rule: Rule, fold: bool) -> Target:
    shape, uses = found.shapes[path], found.uses[path]
    if not fold:
        _refuse_barriers(path, uses)
    if rule.inputs is not None:
        stack, inputs, outputs = _stated(path, shape, rule)
    elif rule.kind == "bias":
        stack = max((u.stack for u in uses), key=len, default=())
        inputs, outputs = (), tuple(i for i in range(len(shape)) if i not in stack)
    else:
        use = _canonical(path, shape, uses)
        stack, inputs, outputs = use.stack, use.inputs, use.outputs
    assert rule.rank is not None and rule.alpha is not None  # filled in by spec.rules
    assert rule.kind is not None and rule.scaling is not None
    return Target(
        path, shape, stack, inputs, outputs, rule.rank, float(rule.alpha), fold,
        rule.kind, rule.scaling, rule.parts or (), rule.part_axis,
    )  # fmt: skip


def _stated(path: str, shape: tuple[int, ...], rule: Rule) -> tuple[Any, Any, Any]:
    """The roles that a rule states; axes that it does not name are the stack."""
    ndim = len(shape)
    named = [*(rule.inputs or ()), *(rule.outputs or ()), *(rule.stack or ())]
    if any(not -ndim <= i < ndim for i in named):
        raise LoraError(f"{path!r} of shape {shape} has no axes {named}, which its rule names")
    inputs, outputs = (
        tuple(i % ndim for i in which or ()) for which in (rule.inputs, rule.outputs)
    )
    rest = tuple(i for i in range(ndim) if i not in (*inputs, *outputs))
    stack = rest if rule.stack is None else tuple(i % ndim for i in rule.stack)
    return stack, inputs, outputs


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
            "Narrow the pattern to weights of products, convolutions and embeddings, or say the "
            f"axes, if it does enter a product: Rule({path!r}, inputs=..., outputs=...)"
        )
    order = ("conv_general_dilated", "ragged_dot_general", "gather")
    return min(complete, key=lambda u: order.index(u.kind) if u.kind in order else len(order))


def _covers(use: roles.Use, shape: tuple[int, ...]) -> bool:
    return sorted((*use.stack, *use.inputs, *use.outputs)) == list(range(len(shape)))
