"""From a spec to a layout: an abstract trace finds the targets and the roles of their axes."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Container, Mapping
from typing import Any, NamedTuple

from lora_jax import paths
from lora_jax.errors import LoraError, listed, near_paths
from lora_jax.layout import Layout, Remark
from lora_jax.primitives import jaxprs
from lora_jax.primitives.adapted_weight import Use
from lora_jax.primitives.analysis import Findings, analyse
from lora_jax.spec import ALL_LINEAR, LoraSpec, Rule, Target
from lora_jax.updates.kind import kind_named


def resolve(
    spec: LoraSpec, f: Callable[..., Any], params: Any, *args: Any, **kwargs: Any
) -> Layout:
    """Find the spec's targets in `f`, and the roles of their axes, by an abstract trace.

    Nothing is computed: `params`, `args` and `kwargs` may hold `jax.ShapeDtypeStruct`s.
    Arguments that are not arrays (`train=True`, `mutable=[...]`) are passed to `f` as they are.

    Args:
      spec: the parameters to adapt, with rank, scale and kind.
      f: a pure function whose first argument is the parameter tree.
      params: that tree. Patterns match the paths in it: for `model.apply` they begin with
        `params/`.
      *args, **kwargs: an example of the other arguments. Only their shapes and dtypes matter.

    Returns:
      The layout, with its targets in the order of the parameter tree.

    Raises:
      LoraError: a pattern that matches nothing; a rule that earlier ones hide; a matched parameter
        that no product consumes or that an operation without a low-rank rule consumes; a rank
        above min(in, out).

    >>> import jax.numpy as jnp, lora_jax
    >>> f = lambda params, x: jnp.einsum("bd,dhk->bhk", x, params["q"])
    >>> spec = LoraSpec(rank=2, alpha=4.0, targets="q")
    >>> print(resolve(spec, f, {"q": jnp.ones((8, 2, 4))}, jnp.ones((3, 8))))
    path   shape  stack  in  out  rank  scale  parameters
    q      8x2x4  -      0   1,2     2      2          32
    total                                              32
    """
    return trace(f, params, *args, **kwargs).layout(spec)


def trace(f: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> Trace:
    """Trace `f`, to resolve several specs or to look at the roles that its parameters have.

    Args:
      f, params, *args, **kwargs: as `resolve` takes them.

    Raises:
      LoraError: as `resolve`, where it is not about a spec.
    """
    traced = jaxprs.trace(f, params, args, kwargs)
    avals = dict(zip(traced.param_paths, traced.avals, strict=False))
    return Trace(avals, analyse(traced))


class Trace(NamedTuple):
    """The results of a trace: the parameters by path, and what was found about them."""

    avals: dict[str, Any]
    facts: Findings

    def layout(self, spec: LoraSpec) -> Layout:
        """Find the spec's targets and the roles of their axes; see `resolve`."""
        chosen: dict[str, Rule] = {}
        for rule in spec.rules:  # the first match decides, but every rule must match something
            matched = _matching_rule(rule, self)
            _check_not_hidden(rule, matched, chosen)
            chosen = {**dict.fromkeys(matched, rule), **chosen}
        fold = {path for pattern in spec.fold for path in _matching(pattern, self.facts.uses)}
        targets = [_target(p, self, chosen[p], p in fold) for p in self.avals if p in chosen]
        unsaid = [t for t in targets if chosen[t.path].inputs is None]
        return Layout(
            tuple(targets),
            _left_out(spec, chosen, self),
            tuple(_whole(p, self.avals[p], where) for p, where in self.facts.dequantised.items()),
            tuple(Remark(t.path, t.shape, why) for t in unsaid if (why := _ambiguous(t))),
        )

    def use(self, path: str) -> Use | None:
        """Return the use that gives each axis of a parameter its role; None where there is none."""
        use = _canonical(self.avals[path].shape, self.facts.uses[path])
        if use is None:
            return None
        members = tuple(i for i in use.outputs if (path, i) in self.facts.members)
        rest = tuple(i for i in use.outputs if i not in members)
        stack = tuple(sorted((*use.stack, *members)))
        return dataclasses.replace(use, stack=stack, outputs=rest) if rest else use

    def kernels(self) -> list[str]:
        """Return the weights of all products and the embeddings, in the order of the tree."""
        known = {*self.facts.kernels, *self.facts.tables}
        return [path for path, aval in self.avals.items() if aval.ndim > 1 and path in known]

    def obstacle(self, path: str, taken: Container[str] = ()) -> str | None:
        """Return why "all-linear" leaves a kernel out, given the kernels already taken, or None."""
        known, aval, uses = self.facts, self.avals[path], self.facts.uses[path]
        if path in known.heads:
            return "the output head: no other product follows it; name it to adapt it"
        if path not in known.kernels:
            return f"an embedding: {known.tables[path]} looks up its rows; name it to adapt it"
        if not jaxprs.is_float(aval.dtype):
            return _not_float(aval.dtype)
        lost = next((u for u in uses if u.barrier), None)
        other = next((p for p in sorted(known.partners.get(path, ())) if p in taken), None)
        if lost is not None:
            why = f"`{lost.barrier}` at {lost.where} takes it and has no low-rank rule"
        elif other is not None:
            why = f"it is multiplied with {other!r}, which is adapted"
        elif any(u.is_product and u.covers(aval.shape) for u in uses):
            return None
        else:
            why = f"{known.kernels[path]} uses it along axes that are not input, output or stack"
        axes = f", say its axes with Rule({path!r}, inputs=, outputs=)"
        known_axes = any(u.has_axes and u.covers(aval.shape) for u in uses)
        return f"{why}; to adapt it, name it{'' if known_axes else axes}, and add it to fold"


def _not_float(dtype: Any) -> str:
    return (
        f"its dtype is {dtype}, and only a float array can have a low-rank update; for codes of a "
        "quantised weight, make it a base (lora_jax.quantize)"
    )


def _matching_rule(rule: Rule, found: Trace) -> list[str]:
    if rule.pattern != ALL_LINEAR:
        return _matching(rule.pattern, found.facts.uses)
    kept: list[str] = []
    for path in found.kernels():
        if found.obstacle(path, kept) is None:
            kept.append(path)
    if not kept:
        why = listed([f"{path!r}: {found.obstacle(path)}" for path in found.kernels()])
        raise LoraError(
            f"{ALL_LINEAR!r} matches nothing; of the parameters that a product uses it leaves "
            f"out:\n{why or '  (no product uses any)'}\nName the targets by their paths."
        )
    return kept


def _check_not_hidden(rule: Rule, matched: list[str], chosen: Mapping[str, Rule]) -> None:
    """Raise if earlier rules decide all parameters of a rule, and say something else of them."""
    earlier = [chosen[path] for path in matched if path in chosen]
    other = [one for one in earlier if dataclasses.replace(one, pattern=rule.pattern) != rule]
    if other and len(earlier) == len(matched):
        raise LoraError(
            f"the rule for {rule.pattern!r} changes nothing: the rule for {other[0].pattern!r} "
            f"comes before it and matches the same parameters:\n{listed(matched)}\n"
            f"The first rule that matches decides. Put {rule.pattern!r} first, or leave it out."
        )


def _left_out(spec: LoraSpec, chosen: Mapping[str, Rule], found: Trace) -> tuple[Remark, ...]:
    """Return the kernels that "all-linear" left out and no other rule named, with the reasons."""
    if all(rule.pattern != ALL_LINEAR for rule in spec.rules):
        return ()
    rows = ((path, found.obstacle(path, chosen)) for path in found.kernels() if path not in chosen)
    return tuple(Remark(path, found.avals[path].shape, why) for path, why in rows if why)


def _ambiguous(t: Target) -> str | None:
    """Return what was chosen for output axes before an input axis, with other outputs after it."""
    first = tuple(i for i in t.outputs if t.inputs and i < min(t.inputs))
    rest = tuple(i for i in t.outputs if i not in first)
    if not first or not rest:
        return None
    axes = f"stack={(*t.stack, *first)}, inputs={t.inputs}, outputs={rest}"
    return (
        f"its axes {first} are outputs: all slices along them share one `a`. If they are members "
        f"or relations, each with its own, say so: Rule({t.path!r}, {axes})"
    )


def _whole(path: str, aval: Any, where: str) -> Remark:
    megabytes = aval.size * aval.dtype.itemsize / 1e6
    return Remark(path, aval.shape, f"{where} takes it as {aval.dtype}, {megabytes:.1f} MB")


def _matching(pattern: str, known: Mapping[str, Any]) -> list[str]:
    hits = paths.matching(pattern, known)
    if not hits:
        products = sorted(known, key=lambda path: not any(use.is_product for use in known[path]))
        raise LoraError(
            f"the pattern {pattern!r} matches no parameter{near_paths(pattern, products)}\n"
            "A pattern must match the whole path: '*' stays inside one segment, '**' spans "
            "several ('**/query/kernel')."
        )
    return hits


def _target(path: str, found: Trace, rule: Rule, fold: bool) -> Target:
    aval, uses = found.avals[path], found.facts.uses[path]
    if not jaxprs.is_float(aval.dtype):
        raise LoraError(f"{path!r} cannot be adapted: {_not_float(aval.dtype)}")
    lost = next((use for use in uses if use.barrier), None)
    has_axes = rule.inputs is not None or any(use.has_axes for use in uses)
    if lost is not None and not fold and has_axes:
        raise LoraError(
            f"{path!r} cannot be adapted: `{lost.kind}` at {lost.where} takes it, and "
            f"{jaxprs.cures(path, lost.kind)}"
        )
    scanned: tuple[int, ...] = max((u.stack for u in uses), key=len, default=())
    if rule.inputs is not None:
        stack, inputs, outputs = _stated(path, found, rule)
    elif (own := kind_named(rule.kind or "", path).roles(aval.shape, scanned)) is not None:
        stack, (inputs, outputs) = scanned, own
    else:
        use = found.use(path)
        if use is None:
            raise _no_axes(path, aval.shape, uses)
        stack, inputs, outputs = use.stack, use.inputs, use.outputs
    assert rule.rank is not None and rule.alpha is not None  # filled in by spec.rules
    assert rule.kind is not None and rule.scaling is not None
    return Target(
        path, aval.shape, stack, inputs, outputs, rule.rank, float(rule.alpha), fold,
        rule.kind, rule.scaling, rule.parts or (), rule.part_axis,
    )  # fmt: skip


def _stated(path: str, found: Trace, rule: Rule) -> tuple[Any, Any, Any]:
    """Return (stack, inputs, outputs) as the rule states them; unnamed axes are stack axes."""
    shape, axes = found.avals[path].shape, range(len(found.avals[path].shape))
    named = [*(rule.inputs or ()), *(rule.outputs or ()), *(rule.stack or ())]
    if any(not -len(axes) <= i < len(axes) for i in named):
        raise LoraError(f"{path!r} of shape {shape} has no axes {named}, which its rule names")
    inputs, outputs, stack = (
        tuple(axes[i] for i in which or ()) for which in (rule.inputs, rule.outputs, rule.stack)
    )
    if rule.stack is None:
        stack = tuple(i for i in axes if i not in (*inputs, *outputs))
    traced = [u for u in found.facts.uses[path] if u.has_axes and u.covers(shape)]
    # An output axis may be stated as a stack axis: then each slice along it has its own `a`.
    known = [
        u.inputs == inputs and {*u.stack} <= {*stack} and {*stack} <= {*u.stack, *u.outputs}
        for u in traced
    ]
    if known and not any(known) and path not in found.facts.partners:
        use = traced[0]
        raise LoraError(
            f"{path!r}: its rule says stack={stack}, inputs={inputs}, outputs={outputs}, but "
            f"`{use.kind}` at {use.where} uses it with stack={use.stack}, inputs={use.inputs}, "
            f"outputs={use.outputs}; leave the axes out of the rule, the trace knows them"
        )
    return stack, inputs, outputs


def _canonical(shape: tuple[int, ...], uses: tuple[Use, ...]) -> Use | None:
    """Return the use that decides the roles of the axes.

    Convolutions and lookups come before products; among products, the most frequent roles win.
    """
    complete = [u for u in uses if u.has_axes and u.covers(shape)]
    usual = collections.Counter(u.inputs for u in complete)
    return min(complete, key=lambda u: (u.general, -usual[u.inputs]), default=None)


def _no_axes(path: str, shape: tuple[int, ...], uses: tuple[Use, ...]) -> LoraError:
    axes = "stack={0.stack}, inputs={0.inputs}, outputs={0.outputs}"
    how = [f"`{u.kind}` at {u.where} ({axes.format(u)})" for u in uses]
    return LoraError(
        f"the targets match {path!r} (shape {shape}), but nothing uses it so that each of its "
        f"axes is an input, an output or the stack; it is used by:\n"
        f"{listed(how) or '  nothing reads it'}\n"
        "Narrow the pattern to weights of products, convolutions and embeddings, or say the "
        f"axes, if it does enter a product: {_cure(path, uses)}"
    )


def _cure(path: str, uses: tuple[Use, ...]) -> str:
    """Return how a rule states the axes, and that W may be formed, where that is needed too."""
    rule = f"Rule({path!r}, inputs=..., outputs=...)"
    lost = any(use.barrier for use in uses)
    return f"LoraSpec(..., targets={rule}, fold={path!r})" if lost else rule
