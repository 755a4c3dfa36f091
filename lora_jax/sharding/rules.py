"""Rules that say where parameters are placed, and the checks that a placement passes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import PartitionSpec

from lora_jax import paths
from lora_jax.bases.placement import names_of
from lora_jax.errors import LoraError, listed, near_paths, nearest

# A pattern in the language of `lora_jax.paths`, and the placement of the parameters it matches.
ShardingRule = tuple[str, PartitionSpec]
Specs = dict[str, PartitionSpec]


def specs(rules: Sequence[ShardingRule], params: Any) -> Specs:
    """Return the placement of each parameter. Exactly one rule must cover each.

    The order of the rules has no meaning.

    Args:
      rules: (pattern, PartitionSpec) pairs, patterns being in the language of `lora_jax.paths`.
      params: a tree of arrays, `jax.ShapeDtypeStruct`s or quantised bases.

    Returns:
      `{path: PartitionSpec}`.

    Raises:
      LoraError: a parameter that no rule or more than one covers, a rule that covers nothing, or a
        spec with more entries than the parameter has axes.

    >>> import jax.numpy as jnp
    >>> P = PartitionSpec
    >>> params = {"q": {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)}}
    >>> specs([("**/kernel", P("fsdp", "tensor")), ("**/bias", P("tensor"))], params)
    {'q/bias': P('tensor',), 'q/kernel': P('fsdp', 'tensor')}
    """
    found = covering(rules, paths.flatten(params))
    for path, hits in found.items():
        if not hits:
            raise LoraError(
                f"{path!r} is covered by no placement rule; the nearest patterns are:\n"
                f"{listed(nearest(path, [pattern for pattern, _ in rules]))}\n"
                f"Add a rule: ({path!r}, PartitionSpec(...))."
            )
    return {path: hits[0][1] for path, hits in found.items()}


def covering(
    rules: Sequence[ShardingRule], leaves: Mapping[str, Any]
) -> dict[str, list[ShardingRule]]:
    """Return the rule of each parameter in a list, which is empty if no rule covers it.

    Raises:
      LoraError: a parameter with two rules, or a rule that covers nothing.
    """
    found: dict[str, list[ShardingRule]] = {path: [] for path in leaves}
    for pattern, spec in rules:
        covered = paths.matching(pattern, leaves)
        if not covered:
            raise LoraError(
                f"the placement rule {_shown((pattern, spec))} covers no parameter"
                f"{near_paths(pattern, leaves)}\n"
                "A pattern must match the whole path: '*' stays inside one segment, '**' spans "
                "several ('**/query/kernel')."
            )
        for path in covered:
            shape = tuple(leaves[path].shape)
            check_entries(path, shape, spec, f"the placement rule {_shown((pattern, spec))}")
            found[path].append((pattern, spec))
    for path, hits in found.items():
        if len(hits) > 1:
            raise LoraError(
                f"{path!r} is covered by {len(hits)} placement rules, and their order has no "
                f"meaning:\n{listed(map(_shown, hits))}\nNarrow all but one of them."
            )
    return found


def _shown(rule: ShardingRule) -> str:
    return f"({rule[0]!r}, {rule[1]})"


def check_divides(
    specs: Mapping[str, PartitionSpec], params: Any, sizes: Mapping[str, int]
) -> None:
    """Raise `LoraError` if mesh axes do not divide the size that they shard, or do not exist."""
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


def check_entries(path: str, shape: tuple[int, ...], spec: PartitionSpec, source: str) -> None:
    """Raise `LoraError` if a PartitionSpec has more entries than the parameter has axes."""
    if len(spec) > len(shape):
        raise LoraError(
            f"{path!r}: {source} has {len(spec)} entries, but the shape {shape} has {len(shape)} "
            "axes; give it at most one entry per axis"
        )
