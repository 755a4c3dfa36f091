"""Which mesh axes shard which axis of each parameter, and of its adapter.

A placement is `{path: PartitionSpec}`. There are three ways to get one: from a table of rules
(`specs`), from one documented rule for a model that has no table (`automatic`), or from either
with the user's own rules on top (`place`). The placement of the adapters follows from that of the
parameters (`partition_specs`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from lora_jax import paths
from lora_jax.base import QuantisedMatrix, is_base
from lora_jax.bases.placement import names_of as names_of
from lora_jax.bases.placement import placed
from lora_jax.errors import LoraError, listed, nearest
from lora_jax.layout import Layout
from lora_jax.primitives import jaxprs
from lora_jax.primitives.adapted_weight import Use
from lora_jax.primitives.analysis import analyse
from lora_jax.sharding import flax_partitioning
from lora_jax.sharding.rules import ShardingRule as ShardingRule
from lora_jax.sharding.rules import Specs as Specs
from lora_jax.sharding.rules import check_divides as check_divides
from lora_jax.sharding.rules import check_entries, covering
from lora_jax.sharding.rules import specs as specs
from lora_jax.spec import Target
from lora_jax.updates.kind import kind_of

FSDP, TENSOR = "fsdp", "tensor"
# Both count the elements of one slice of the stack.
SMALL = 2**16  # below it a parameter may be replicated: biases and norms, even of a wide model
TINY = 2**10  # below it a parameter that nothing divides is replicated without an error
SPARE = 0.04  # the part that replicated small parameters may add to a device's share of the bytes


def tree_of(specs: Mapping[str, PartitionSpec], params: Any, sizes: Mapping[str, int]) -> Any:
    """Return the placement as a tree like `params`, with one PartitionSpec for each array.

    A quantised weight gets one for each of its arrays; it is an error if the placement would split
    one of its blocks. For a base of a kind that the package does not know, an array of W's shape is
    placed like W, and the other arrays are sharded along the leading axes that they share with W.
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
    """Return the entries of the leading axes that an array has in common with the weight."""
    same = 0
    while same < min(len(shape), len(own)) and shape[same] == own[same]:
        same += 1
    return PartitionSpec(*spec[:same])


def place(
    params: Any,
    sizes: Mapping[str, int],
    *,
    own: Sequence[ShardingRule] = (),
    table: Sequence[ShardingRule] | None = None,
    named: Mapping[str, PartitionSpec] | None = None,
    call: tuple[Callable[..., Any], tuple[Any, ...]] | None = None,
) -> Specs:
    """Return the placement of every parameter, checked against the mesh.

    Each parameter takes the first of these that it has: a rule in `own`; a rule in `table`, if
    there is a table; its Flax metadata; the placement that `automatic` finds.

    Args:
      params: a tree of arrays, `jax.ShapeDtypeStruct`s or quantised bases.
      sizes: the size of each mesh axis by its name (`mesh.shape`).
      own: the user's rules. Each must cover something, and no parameter may have two.
      table: the rules of a known model. They must cover every parameter exactly once.
      named: `{path: PartitionSpec}` of parameters whose Flax metadata is no longer in `params`
        (NNX), or is in logical names that need rules:
        `lora_jax.sharding.flax_partitioning.named(model, mesh.axis_names, rules)`.
      call: (f, args) such that `f(params, *args)` uses the parameters; `automatic` traces it.

    Returns:
      `{path: PartitionSpec}`.

    Raises:
      LoraError: see `specs`, `automatic` and `check_divides`.
    """
    leaves = paths.flatten(params)
    mine = {path: hits[0][1] for path, hits in covering(own, leaves).items() if hits}
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
        check_entries(path, tuple(leaves[path].shape), spec, f"the Flax metadata {spec}")


def automatic(
    params: Any,
    sizes: Mapping[str, int],
    *,
    call: tuple[Callable[..., Any], tuple[Any, ...]] | None = None,
    fixed: Mapping[str, PartitionSpec] | None = None,
) -> Specs:
    """Return a placement for a model that has no table of rules.

    1. Stack axes (scanned layers, experts) are not sharded.
    2. An output axis takes `tensor` and an input axis takes `fsdp`. Of several, these are the first
       output and the longest input whose sizes divide. Without such a pair one axis takes both (an
       output rather than an input), or else any two axes take one each.
    3. Small parameters (fewer than 65,536 elements in one slice of the stack: biases, norms) are
       replicated, the smallest first, as long as all of them together add at most 4 % to a
       device's share of the bytes. The rest is sharded by rule 2. If nothing divides it, a small
       vector, or any parameter of fewer than 1,024 elements, is replicated.
    4. Any other parameter that nothing divides is an error.

    The roles of the axes come from a trace of `call`. For a parameter without roles, its two
    longest axes are used, the later one as the output.

    Args:
      params: a tree of arrays, `jax.ShapeDtypeStruct`s or quantised bases.
      sizes: the size of each mesh axis by its name. A missing axis counts as 1.
      call: (f, args) to trace: `f(params, *args)`. Nothing is computed.
      fixed: parameters that are placed elsewhere; the result leaves them out.

    Returns:
      `{path: PartitionSpec}`.

    Raises:
      LoraError: a parameter of rule 4.

    >>> import jax.numpy as jnp
    >>> f = lambda params, x: x @ params["w"] + params["b"]
    >>> params, x = {"w": jnp.ones((512, 1024)), "b": jnp.ones(1024)}, jnp.ones(512)
    >>> automatic(params, {"fsdp": 2, "tensor": 4}, call=(f, (x,)))
    {'b': P(), 'w': P('fsdp', 'tensor')}
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
    """Return the use that decides the roles of each parameter's axes."""
    found: Mapping[str, Sequence[Use]] = {}
    if call is not None:
        found = analyse(jaxprs.trace(call[0], params, call[1])).uses
    return {
        path: _role(tuple(leaf.shape), found.get(path, ()))
        for path, leaf in paths.flatten(params).items()
    }


def _role(shape: tuple[int, ...], uses: Sequence[Use]) -> Use:
    complete = [u for u in uses if u.has_axes]
    if complete:
        return min(complete, key=lambda u: not u.lookup)  # a tied embedding is a table
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
    """Return the small parameters, the smallest first, that fit into a device's spare bytes."""
    n = math.prod(parts.values())
    budget = SPARE * sum(map(_bytes, leaves.values())) / n
    whole: set[str] = set()
    for path in sorted(small, key=lambda p: _bytes(small[p])):
        budget -= _bytes(small[path]) * (1 - 1 / n)  # 1/n of it is the device's share already
        if budget < 0:
            break
        whole.add(path)
    return whole


def _bytes(leaf: Any) -> int:
    return math.prod(leaf.shape) * int(leaf.dtype.itemsize)


def _spread(shape: tuple[int, ...], role: Use, parts: Mapping[str, int]) -> PartitionSpec | None:
    """Return the first way of rule 2 (see `automatic`) that divides every axis, or None."""
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
    """Return the placement of the adapters, which follows the placement of the parameters.

    `a` [*stack, *inputs, rank] takes the mesh axes of W's stack and input axes, and `b` [*stack,
    rank, *outputs] takes the mesh axes of its stack and output axes. The rank is never sharded. For
    another kind of update, `updates.Kind.axes` tells which axes of W its arrays have. So each
    device holds the slice of the factors that belongs to its slice of W.

    Args:
      layout: from `lora_jax.resolve`.
      param_specs: a flat `{path: PartitionSpec}`, or a tree of PartitionSpecs like the parameters.
        Parameters that the layout does not adapt are ignored.

    Returns:
      A tree like that of `lora_jax.init` with PartitionSpecs for arrays: `{path: Factors(a, b)}`
      for LoRA.

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
    check_entries(target.path, target.shape, spec, str(spec))
    whole = (*spec, *(None for _ in range(len(target.shape) - len(spec))))
    kind = kind_of(target)

    def place(axes: tuple[int | None, ...]) -> PartitionSpec:
        return PartitionSpec(*(None if i is None else whole[i] for i in axes))

    return kind.fields(*map(place, kind.axes(target)))
