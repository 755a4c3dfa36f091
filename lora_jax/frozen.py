"""Train some base parameters (a head, norms) together with the adapters, and freeze the rest.

Guard 1 is the argument that you differentiate. Split the parameters and take gradients with
respect to the adapters and the trained part only. Then no gradient of a frozen weight is computed:

    trained, rest = frozen.split(params, ("classifier/**",))
    def loss(trainable, x):
        base = frozen.join(trainable["base"], rest)
        return objective(g(base, trainable["adapters"], x))
    grads = jax.grad(loss)({"adapters": adapters, "base": trained}, x)

Guard 2 is `partition`, for training code that holds all parameters in one tree: an optax
transformation that gives frozen parameters no update and no state. (`optax.masked` alone does not
freeze: where its mask is False, the raw gradient passes through as the update.)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import jax

from lora_jax import paths
from lora_jax.base import is_base
from lora_jax.errors import LoraError, near_paths

if TYPE_CHECKING:
    import optax


def trained_mask(tree: Any, patterns: Iterable[str]) -> Any:
    """Return a tree of bools like `tree`: True where some pattern matches and the leaf is trained.

    Args:
      tree: a pytree of parameters.
      patterns: patterns in the language of `lora_jax.paths`, or a single one.

    Returns:
      A tree of the same structure with a bool in place of each leaf.

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
                f"the pattern {pattern!r} of parameters to train matches nothing"
                f"{near_paths(pattern, known)}"
            )
        hits.update(matched)
    return jax.tree_util.tree_map_with_path(
        lambda p, _: paths.path_of(p) in hits, tree, is_leaf=is_base
    )


def split(params: Any, patterns: Iterable[str]) -> tuple[dict[str, Any], Any]:
    """Split the parameters into the trained leaves and the rest.

    `join` is the inverse. A quantised weight is one leaf.

    Args:
      params: the base parameters, a pytree.
      patterns: patterns of the parameters to train, or a single one.

    Returns:
      `(trained, rest)`: `{path: leaf}`, and `params` with None in place of these leaves.

    Raises:
      LoraError: a pattern that matches nothing, or a quantised weight, which cannot be trained.

    >>> split({"body": 1, "head": 2}, ("head",))
    ({'head': 2}, {'body': 1, 'head': None})
    """
    mask = trained_mask(params, patterns)
    leaves = zip(paths.flatten(params).items(), jax.tree.leaves(mask), strict=True)
    trained = {path: leaf for (path, leaf), keep in leaves if keep}
    if quantised := [path for path, leaf in trained.items() if is_base(leaf)]:
        raise LoraError(
            f"{quantised[0]!r} and {len(quantised) - 1} more are quantised, so they cannot be "
            "trained: leave them out of the patterns, or lora_jax.dequantize the parameters"
        )
    hide = lambda leaf, keep: None if keep else leaf  # noqa: E731
    return trained, jax.tree.map(hide, params, mask, is_leaf=is_base)


def join(trained: dict[str, Any], rest: Any) -> Any:
    """Join the two parts that `split` returned back into the parameter tree.

    Args:
      trained: `{path: leaf}`, the trained leaves.
      rest: the parameter tree with None in their places.

    Returns:
      The parameter tree.

    Raises:
      LoraError: a trained leaf without a place, or a place without a leaf.

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
    """Apply `tx` to the leaves that some pattern matches; all others get no update and no state.

    For `{"params": params, "adapters": adapters}` in one tree, `("adapters/**",)` trains the
    adapters alone. Gradients of frozen leaves still cost their FLOPs if you compute them and
    something reads them (a global norm, or a clip outside the partition). So differentiate with
    respect to the trained part only, if you can.

    Args:
      tx: an optax optimizer for the trained leaves.
      tree: the tree of parameters that the optimizer will see.
      patterns: patterns of the leaves to train, or a single one.

    Returns:
      An optax transformation for the whole tree.

    Raises:
      LoraError: a pattern that matches nothing.

    >>> import jax.numpy as jnp, optax
    >>> tree = {"params": {"w": jnp.ones(2)}, "adapters": {"a": jnp.ones(2)}}
    >>> tx = partition(optax.sgd(0.5), tree, "adapters/**")
    >>> updates, _ = tx.update(tree, tx.init(tree))
    >>> [x.tolist() for x in (updates["params"]["w"], updates["adapters"]["a"])]
    [[0.0, 0.0], [-0.5, -0.5]]
    """
    import optax  # imported here so that `import lora_jax` stays fast

    labels = jax.tree.map(
        lambda train: "trained" if train else "frozen", trained_mask(tree, patterns)
    )
    return optax.partition({"trained": tx, "frozen": optax.set_to_zero()}, labels)
