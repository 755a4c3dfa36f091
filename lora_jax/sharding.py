"""Which mesh axes shard which axis of each parameter, and of its adapter.

A placement is `{path: PartitionSpec}`. It is read off a table of rules (`specs`), worked out by
one documented rule for a model that has no table (`automatic`), or both with rules of one's own
on top (`place`). The adapters follow the parameters (`partition_specs`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from lora_jax import flax_partitioning, paths
from lora_jax.base import is_base
from lora_jax.bases.matrix import QuantisedMatrix
from lora_jax.bases.placement import placed
from lora_jax.errors import LoraError, listed, nearest
from lora_jax.layout import Layout
from lora_jax.primitives import jaxprs
from lora_jax.primitives.roles import uses
from lora_jax.target import Target
from lora_jax.updates.kind import kind_of
from lora_jax.updates.recorder import Use

ShardingRule = tuple[
    str, PartitionSpec
]  # a pattern in the language of `lora_jax.paths`, and its placement
Specs = dict[str, PartitionSpec]

FSDP, TENSOR = "fsdp", "tensor"
SMALL = 2**16  # numbers beside the stack axes: biases and norms, also those of a wide model
TINY = 2**10  # numbers beside the stack axes that are not worth an error where nothing divides them
SPARE = 0.04  # of a device's share of the bytes, that replicated small parameters may add to it


def specs(rules: Sequence[ShardingRule], params: Any) -> Specs:
    """The placement of each parameter: every one is covered by exactly one rule.

    The order of the rules has no meaning.

    Raises:
      LoraError: a parameter that no rule or more than one covers, a rule that covers nothing, a
        spec with more entries than the parameter has axes.

    >>> import jax.numpy as jnp
    >>> P = PartitionSpec
    >>> params = {"q": {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)}}
    >>> specs([("**/kernel", P("fsdp", "tensor")), ("**/bias", P("tensor"))], params)
    {'q/bias': P('tensor',), 'q/kernel': P('fsdp', 'tensor')}
    """
    covering = _covering(rules, paths.flatten(params))
    for path, hits in covering.items():
        if not hits:
            raise LoraError(
                f"{path!r} is covered by no placement rule; the nearest patterns are:\n"
                f"{listed(nearest(path, [pattern for pattern, _ in rules]))}\n"
                f"Add a rule: ({path!r}, PartitionSpec(...))."
            )
    return {path: hits[0][1] for path, hits in covering.items()}


def _covering(
    rules: Sequence[ShardingRule], leaves: Mapping[str, Any]
) -> dict[str, list[ShardingRule]]:
    """The rule, if any, of each parameter. Two are an error, and so is a rule that covers none."""
    covering: dict[str, list[ShardingRule]] = {path: [] for path in leaves}
    for pattern, spec in rules:
        covered = paths.matching(pattern, leaves)
        if not covered:
            raise LoraError(
                f"the placement rule {_shown((pattern, spec))} covers no parameter; the nearest "
                f"paths are:\n{listed(nearest(pattern, leaves))}\n"
                "A pattern must match the whole path: '*' stays inside one segment, '**' spans "
                "several ('**/query/kernel')."
            )
        for path in covered:
            shape = tuple(leaves[path].shape)
            _check_rank(path, shape, spec, f"the placement rule {_shown((pattern, spec))}")
            covering[path].append((pattern, spec))
    for path, hits in covering.items():
        if len(hits) > 1:
            raise LoraError(
                f"{path!r} is covered by {len(hits)} placement rules, and their order has no "
                f"meaning:\n{listed(map(_shown, hits))}\nNarrow all but one of them."
            )
    return covering


def _shown(rule: ShardingRule) -> str:
    return f"({rule[0]!r}, {rule[1]})"


def check_divides(
    specs: Mapping[str, PartitionSpec], params: Any, sizes: Mapping[str, int]
) -> None:
    """Raise `LoraError` where the mesh axes of a dimension do not divide it.

    Args:
      specs: the placement.
      params: a tree of what has a shape.
      sizes: of the mesh axes by name (`mesh.shape`).
    """
    for path, leaf in paths.flatten(params).items():
        for axis, entry in enumerate(specs[path]):
            names = names_of(entry)
            unknown = [name for name in names if name not in sizes]
            if unknown:
                raise LoraError(
                    f"{path!r}: its placement {specs[path]} names the mesh axis {unknown[0]!r}; "
                    f"the mesh has {', '.join(sizes)}"
                )
            parts = math.prod(sizes[name] for name in names)
            if leaf.shape[axis] % parts:
                raise LoraError(_indivisible(path, tuple(leaf.shape), axis, names, sizes))


def _indivisible(
    path: str, shape: tuple[int, ...], axis: int, names: Sequence[str], sizes: Mapping[str, int]
) -> str:
    given = " x ".join(f"{name}={sizes[name]}" for name in names)
    return (
        f"{path!r} of shape {shape}: its axis {axis} of {shape[axis]} cannot be cut into "
        f"{math.prod(sizes[n] for n in names)} equal parts ({given}). Choose another size of that "
        "mesh axis, or leave the axis whole with a rule of your own: "
        f"({path!r}, PartitionSpec({', '.join(['None'] * len(shape))}))"
    )


def tree_of(specs: Mapping[str, PartitionSpec], params: Any, sizes: Mapping[str, int]) -> Any:
    """Return a tree like `params` of PartitionSpecs; a quantised weight has one for each array.

    Of a base of a kind that the package does not know, an array of W's shape lies as W does, and
    the others are cut along the leading axes that they have in common with W.

    Args:
      specs: the placement, by path.
      params: a tree of arrays or their ShapeDtypeStructs, and of quantised weights of such.
      sizes: of the mesh axes by name (`mesh.shape`).

    Raises:
      LoraError: the placement would cut a block of a quantised weight.
    """

    def of(key_path: Any, leaf: Any) -> Any:
        path = paths.path_of(key_path)
        spec = specs[path]
        if isinstance(leaf, QuantisedMatrix):
            cutting = [e if any(sizes[n] > 1 for n in names_of(e)) else None for e in spec]
            return placed(leaf, PartitionSpec(*cutting), sizes, path)
        if is_base(leaf):
            return jax.tree.map(lambda x: _leading(tuple(leaf.shape), tuple(x.shape), spec), leaf)
        return spec

    return jax.tree_util.tree_map_with_path(of, params, is_leaf=is_base)


def _leading(shape: tuple[int, ...], own: tuple[int, ...], spec: PartitionSpec) -> PartitionSpec:
    """The entries of the leading axes that an array has in common with the weight."""
    same = 0
    while same < min(len(shape), len(own)) and shape[same] == own[same]:
        same += 1
    return PartitionSpec(*spec[:same])


def names_of(entry: Any) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec: None, a name, or a tuple of names."""
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def place(
    params: Any,
    sizes: Mapping[str, int],
    *,
    own: Sequence[ShardingRule] = (),
    table: Sequence[ShardingRule] | None = None,
    named: Mapping[str, PartitionSpec] | None = None,
    call: tuple[Callable[..., Any], tuple[Any, ...]] | None = None,
) -> Specs:
    """The placement of every parameter, checked against the mesh.

    A parameter takes the one of `own` that covers it; the others take their rule of `table`
    where there is a table; where there is none, what their Flax metadata says, if they have any,
    and else what `automatic` finds.

    Args:
      params: a tree of what has a shape and a dtype.
      sizes: of the mesh axes by name (`mesh.shape`).
      own: the user's rules. Each must cover something, no parameter may have two.
      table: of a known model; it must cover every parameter exactly once.
      named: of parameters whose Flax metadata is not in `params` any more (NNX), or is in logical
        names that need rules: `lora_jax.flax_partitioning.named(model, mesh.axis_names, rules)`.
      call: (f, args) such that `f(params, *args)` uses the parameters, for `automatic`.

    Raises:
      LoraError: see `specs`, `automatic` and `check_divides`.
    """
    leaves = paths.flatten(params)
    mine = {path: hits[0][1] for path, hits in _covering(own, leaves).items() if hits}
    if table is not None:
        base = specs(table, params)
    else:
        noted = {**flax_partitioning.named(params, tuple(sizes)), **(named or {})}
        base = noted | automatic(params, sizes, call=call, fixed={**noted, **mine})
        _known(noted, leaves)
    placed = {path: (mine if path in mine else base)[path] for path in leaves}
    check_divides(placed, params, sizes)
    return placed


def _known(named: Mapping[str, PartitionSpec], leaves: Mapping[str, Any]) -> None:
    for path, spec in named.items():
        if path not in leaves:
            raise LoraError(
                f"{path!r} is placed by Flax metadata, but there is no such parameter; the nearest "
                f"paths are:\n{listed(nearest(path, leaves))}"
            )
        _check_rank(path, tuple(leaves[path].shape), spec, f"the Flax metadata {spec}")


def _check_rank(path: str, shape: tuple[int, ...], spec: PartitionSpec, source: str) -> None:
    if len(spec) > len(shape):
        raise LoraError(
            f"{path!r}: {source} has {len(spec)} entries, but the shape {shape} has {len(shape)} "
            "axes; give it at most one entry per axis"
        )


def automatic(
    params: Any,
    sizes: Mapping[str, int],
    *,
    call: tuple[Callable[..., Any], tuple[Any, ...]] | None = None,
    fixed: Mapping[str, PartitionSpec] | None = None,
) -> Specs:
    """A placement for a model that nobody has seen.

    1. Stack axes (scanned layers, experts) are not sharded.
    2. An output axis takes `tensor` and an input axis `fsdp`: of several, the first output and the
       longest input that are divided. Where no such pair is, one axis takes both (an output
       before an input), or else any two axes take one each.
    3. Small parameters (fewer than 65,536 numbers beside the stack axes: biases, norms) are
       replicated, from the smallest up, as long as all of them together add at most 4 % to a
       device's share of the bytes; beyond that they are sharded by 2. Where nothing divides it,
       a small vector, or anything of fewer than 1,024 numbers, is replicated.
    4. Anything else that nothing divides is an error.

    Roles are what a trace of `call` finds. Of a parameter without roles the two longest axes are
    taken, the later one as the output.

    Args:
      params: a tree of what has a shape and a dtype.
      sizes: of the mesh axes; those it has not count as 1.
      call: (f, args) to trace: `f(params, *args)`. Nothing is computed.
      fixed: parameters placed elsewhere, left out here.
    """
    leaves = paths.flatten(params)
    roles = _roles(params, call)
    parts = {name: sizes.get(name, 1) for name in (FSDP, TENSOR)}
    small = {p for p, x in leaves.items() if _slice_size(x.shape, roles[p]) < SMALL}
    whole = _replicated({p: leaves[p] for p in leaves if p in small}, leaves, parts)
    out: Specs = {}
    for path, leaf in leaves.items():
        if path in (fixed or {}):
            continue
        shape = tuple(leaf.shape)
        spec = PartitionSpec() if path in whole else _spread(shape, roles[path], parts)
        if spec is None and path in small and _is_modest(shape, roles[path]):
            spec = PartitionSpec()
        if spec is None:
            raise LoraError(
                f"{path!r} of shape {shape}: no way to shard it over fsdp={parts[FSDP]} and "
                f"tensor={parts[TENSOR]} in equal parts, and it is too large to be replicated "
                "unasked. Choose other sizes of the mesh, or place it by a rule of your own: "
                f"({path!r}, PartitionSpec({', '.join(['None'] * len(shape))})) replicates it"
            )
        out[path] = spec
    return out


def _roles(params: Any, call: tuple[Callable[..., Any], tuple[Any, ...]] | None) -> dict[str, Use]:
    """The use of each parameter whose axes count; without one, its two longest axes."""
    found: Mapping[str, Sequence[Use]] = {}
    if call is not None:
        found = uses(jaxprs.trace(call[0], params, call[1]))
    return {
        path: _role(tuple(leaf.shape), found.get(path, ()))
        for path, leaf in paths.flatten(params).items()
    }


def _role(shape: tuple[int, ...], uses: Sequence[Use]) -> Use:
    complete = [u for u in uses if u.has_axes]
    if complete:
        return min(complete, key=lambda u: u.kind != "gather")  # a tied embedding is a lookup
    stack = max((u.stack for u in uses), key=len, default=())
    free = [i for i in range(len(shape)) if i not in stack]
    longest = sorted(sorted(free, key=lambda i: shape[i])[-2:])
    inputs = tuple(i for i in free if i != longest[-1]) if longest else ()
    return Use("unknown", "", stack, inputs, tuple(longest[-1:]))


def _slice_size(shape: Sequence[int], role: Use) -> int:
    return math.prod(n for i, n in enumerate(shape) if i not in role.stack)


def _is_modest(shape: tuple[int, ...], role: Use) -> bool:
    return len(shape) - len(role.stack) <= 1 or _slice_size(shape, role) < TINY


def _replicated(
    small: Mapping[str, Any], leaves: Mapping[str, Any], parts: Mapping[str, int]
) -> set[str]:
    """The small parameters, from the smallest up, that fit into the spare bytes of a device."""
    n = math.prod(parts.values())
    budget = SPARE * sum(map(_bytes, leaves.values())) / n
    whole: set[str] = set()
    for path in sorted(small, key=lambda p: _bytes(small[p])):
        budget -= _bytes(small[path]) * (1 - 1 / n)  # what it adds to a device's own part of it
        if budget < 0:
            break
        whole.add(path)
    return whole


def _bytes(leaf: Any) -> int:
    return math.prod(leaf.shape) * int(leaf.dtype.itemsize)


def _spread(shape: tuple[int, ...], role: Use, parts: Mapping[str, int]) -> PartitionSpec | None:
    """The first of the ways of rule 2 in which every axis is divided."""
    outputs = role.outputs
    inputs = sorted(role.inputs, key=lambda i: -shape[i])
    free = [*outputs, *inputs]
    ways: list[dict[int, Any]] = [{o: TENSOR, i: FSDP} for o in outputs for i in inputs]
    ways += [{i: (TENSOR, FSDP)} for i in free]
    ways += [{i: TENSOR, j: FSDP} for i in free for j in free if i != j]
    for way in ways:
        sizes = {i: math.prod(parts[n] for n in names_of(entry)) for i, entry in way.items()}
        if all(shape[i] % size == 0 for i, size in sizes.items()):
            return PartitionSpec(*(way.get(i) for i in range(max(way) + 1)))
    return None


def partition_specs(layout: Layout, param_specs: Any) -> dict[str, Any]:
    """The placement of the adapters, read off that of the parameters.

    `a` [*stack, *inputs, rank] takes the mesh axes of W's stack and input axes, `b`
    [*stack, rank, *outputs] those of its stack and output axes; the rank is never sharded. The
    arrays of another kind follow the axes of W that it says they have (`updates.Kind.axes`). So
    what a device holds of the factors is what it needs beside its part of W.

    Args:
      layout: from `lora_jax.resolve`.
      param_specs: a flat `{path: PartitionSpec}`, or a tree of them like the parameters. What the
        layout does not adapt is ignored.

    Returns:
      A tree like that of `lora_jax.init`, `{path: Factors(a, b)}` for LoRA, of PartitionSpecs.

    Raises:
      LoraError: a target without a PartitionSpec, or with one that has too many entries.

    >>> import jax, jax.numpy as jnp, lora_jax
    >>> f = lambda params, x: x @ params["q"]["kernel"]
    >>> params, x = {"q": {"kernel": jnp.ones((8, 4))}}, jnp.ones((3, 8))
    >>> layout = lora_jax.resolve(lora_jax.LoraSpec(rank=2, targets="**/kernel"), f, params, x)
    >>> partition_specs(layout, {"q": {"kernel": PartitionSpec("fsdp", "tensor")}})
    {'q/kernel': Factors(a=P('fsdp', None), b=P(None, 'tensor'))}
    """
    flat = paths.flatten(param_specs)
    return {target.path: _follow(target, flat) for target in layout.targets}


def _follow(target: Target, flat: Mapping[str, Any]) -> Any:
    spec = flat.get(target.path)
    if not isinstance(spec, PartitionSpec):
        raise LoraError(
            f"{target.path!r} is adapted, but param_specs has {spec!r} for it and not a "
            f"PartitionSpec; the nearest paths are:\n{listed(nearest(target.path, flat))}"
        )
    _check_rank(target.path, target.shape, spec, str(spec))
    whole = (*spec, *(None for _ in range(len(target.shape) - len(spec))))
    kind = kind_of(target)

    def place(axes: tuple[int | None, ...]) -> PartitionSpec:
        return PartitionSpec(*(None if i is None else whole[i] for i in axes))

    return kind.fields(*map(place, kind.axes(target)))
