"""Training some base parameters (a head, norms) beside the adapters, and leaving the rest alone.

The first guard is what is differentiated: split the parameters, take gradients with respect to
the adapters and the trained part alone, and no gradient of a frozen weight is ever computed:

    trained, rest = frozen.split(params, ("classifier/**",))
    def loss(trainable, x):
        base = frozen.join(trainable["base"], rest)
        return objective(g(base, trainable["adapters"], x))
    grads = jax.grad(loss)({"adapters": adapters, "base": trained}, x)

The second guard, for those whose training code holds all parameters in one tree, is `partition`:
an optax transformation with no update and no state for what is frozen. (`optax.masked` alone
does not freeze: where its mask is False the raw gradient passes through as the update.)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import jax

from lora_jax import paths
from lora_jax.base import is_base
from lora_jax.errors import LoraError, listed, nearest

if TYPE_CHECKING:
    import optax


def trained_mask(tree: Any, patterns: Iterable[str]) -> Any:
    """A tree of bools like `tree`: True where some pattern matches, that is, where to train.

    Raises:
      LoraError: a pattern that matches nothing.

    >>> trained_mask({"body": {"w": 0}, "head": {"w": 0, "b": 0}}, ("head/*",))
    {'body': {'w': False}, 'head': {'b': True, 'w': True}}
    """
    if isinstance(patterns, str):
        patterns = (patterns,)
    known = list(paths.flatten(tree))
    hits: set[str] = set()
    for pattern in patterns:
        matched = paths.matching(pattern, known)
        if not matched:
            raise LoraError(
                f"the pattern {pattern!r} of parameters to train matches nothing; the nearest "
                f"paths are:\n{listed(nearest(pattern, known))}"
            )
        hits.update(matched)
    return jax.tree_util.tree_map_with_path(
        lambda p, _: paths.path_of(p) in hits, tree, is_leaf=is_base
    )


def split(params: Any, patterns: Iterable[str]) -> tuple[dict[str, Any], Any]:
    """The trained leaves as `{path: leaf}`, and `params` with None in their places.

    `join` is its inverse. A quantised weight is one leaf.

    Raises:
      LoraError: a pattern that matches nothing, or a quantised weight, which cannot be trained.

    >>> split({"body": 1, "head": 2}, ("head",))
    ({'head': 2}, {'body': 1, 'head': None})
    """
    mask = trained_mask(params, patterns)
    trained = {
        path: leaf
        for (path, leaf), keep in zip(
            paths.flatten(params).items(), jax.tree.leaves(mask), strict=True
        )
        if keep
    }
    if quantised := [path for path, leaf in trained.items() if is_base(leaf)]:
        raise LoraError(
            f"{quantised[0]!r} and {len(quantised) - 1} more are quantised, so they cannot be "
            "trained: leave them out of the patterns, or lora_jax.dequantize the parameters"
        )
    hide = lambda leaf, keep: None if keep else leaf  # noqa: E731
    return trained, jax.tree.map(hide, params, mask, is_leaf=is_base)


def join(trained: dict[str, Any], rest: Any) -> Any:
    """`params` again, from the two parts that `split` made.

    Raises:
      LoraError: the trained leaves and the holes do not correspond.

    >>> join({"head": 2}, {"body": 1, "head": None})
    {'body': 1, 'head': 2}
    """
    leaves = jax.tree_util.tree_leaves_with_path(rest, is_leaf=lambda x: x is None)
    holes = [paths.path_of(p) for p, leaf in leaves if leaf is None]
    unknown = [p for p in trained if p not in holes]
    if unknown or (missing := [p for p in holes if p not in trained]):
        what = f"no hole for {unknown[0]!r}" if unknown else f"nothing for the hole {missing[0]!r}"
        raise LoraError(
            f"the trained parameters do not fit the rest: {what}; both must come from one "
            "frozen.split (a parameter that is None in the model itself cannot be split)"
        )
    return jax.tree_util.tree_map_with_path(
        lambda p, leaf: trained[paths.path_of(p)] if leaf is None else leaf,
        rest,
        is_leaf=lambda x: x is None,
    )


def partition(
    tx: optax.GradientTransformation, tree: Any, patterns: Iterable[str]
) -> optax.GradientTransformation:
    """`tx` on the leaves that some pattern matches; no update and no state for all others.

    For `{"params": params, "adapters": adapters}` in one tree, `("adapters/**",)` trains the
    adapters alone. Gradients of frozen leaves that are computed all the same cost their FLOPs
    as soon as anything reads them (a global norm, a clip outside the partition), so
    differentiate with respect to the trained part where you can.

    Raises:
      LoraError: a pattern that matches nothing.
    """
    import optax  # only who asks for an optimizer pays for the import

    labels = jax.tree.map(
        lambda train: "trained" if train else "frozen", trained_mask(tree, patterns)
    )
    return optax.partition({"trained": tx, "frozen": optax.set_to_zero()}, labels)
