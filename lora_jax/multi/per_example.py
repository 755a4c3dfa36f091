"""A function of a batch, run with a different value for each example.

`each(call, own, args, kwargs, ...)` is a `jax.vmap` over batches of one, so by definition the
function sees one example at a time. Products with arrays that all examples share (a base weight)
have no example axis under a vmap, and XLA computes them for all examples at once, as for a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.errors import LoraError

Axes = Any  # an int, None, or a pytree prefix of them
SHARED = None


def each(
    call: Callable[..., Any],
    own: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    in_axes: Axes = 0,
    out_axes: Axes = 0,
) -> Any:
    """Return `call(own_i, *args_i, **kwargs_i)` for every example i, with the outputs stacked.

    `own` is a pytree of arrays with a leading axis of examples. `args` and `kwargs` are of the
    whole batch. Array leaves of rank 1 and more are split along the axis that `in_axes` names: one
    for all, or a tuple with an entry (an int, None for shared, or a tree of them) for each of
    `args`, and 0 for `kwargs`. All other leaves are shared, except that a scalar PRNG key is folded
    with the example's number, so that examples draw different numbers. `out_axes` are the axes of
    the examples in the outputs; a scalar output becomes [B].

    Raises:
      LoraError: an argument that does not have B examples, or an output whose axis is not of size
        1.
    """
    count = len(jax.tree.leaves(own)[0])
    leaves, treedef = jax.tree.flatten((args, kwargs), is_leaf=_is_none)
    axes = [
        _checked(x, axis, count)
        for x, axis in zip(leaves, _flat_axes(in_axes, args, kwargs), strict=True)
    ]
    divided = [i for i, axis in enumerate(axes) if axis is not SHARED]
    keys = [i for i, x in enumerate(leaves) if axes[i] is SHARED and _is_key(x)]

    def one(own: Any, index: Any, parts: list[Any]) -> Any:
        mine = list(leaves)
        for i, part in zip(divided, parts, strict=True):
            mine[i] = jnp.expand_dims(part, axes[i])
        for i in keys:
            mine[i] = jax.random.fold_in(leaves[i], index)
        args, kwargs = jax.tree.unflatten(treedef, mine)
        out = call(own, *args, **kwargs)
        places = jax.tree.broadcast(out_axes, out)
        return jax.tree.map(_without_batch, out, places)

    parts, part_axes = [leaves[i] for i in divided], [axes[i] for i in divided]
    outs = jax.vmap(one, in_axes=(0, 0, part_axes))(own, jnp.arange(count), parts)
    places = jax.tree.broadcast(out_axes, outs)
    return jax.tree.map(lambda x, axis: jnp.moveaxis(x, 0, axis) if x.ndim > 1 else x, outs, places)


def _flat_axes(in_axes: Axes, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Axes]:
    """Return the axis of each leaf."""
    one = in_axes is None or isinstance(in_axes, int)
    keyword = in_axes if one and args else 0
    in_axes = (in_axes,) * len(args) if one else tuple(in_axes)
    if len(in_axes) != len(args):
        raise LoraError(
            f"in_axes has {len(in_axes)} entries for {len(args)} arguments after the parameters "
            "and adapters; give one for each, or one integer for all"
        )
    try:
        whole = jax.tree.broadcast((in_axes, keyword), (args, kwargs), is_leaf=_is_none)
    except ValueError as error:
        raise LoraError(f"in_axes does not fit the arguments: {error}") from error
    return jax.tree.leaves(whole, is_leaf=_is_none)


def _is_none(x: Any) -> bool:
    return x is None


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | np.generic)


def _is_key(x: Any) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _checked(x: Any, axis: Any, count: int) -> Any:
    """Return the axis along which a leaf is split, or SHARED."""
    if axis is None or not _is_array(x) or x.ndim == 0:
        return SHARED
    if not -x.ndim <= axis < x.ndim or x.shape[axis] != count:
        raise LoraError(
            f"there are {count} adapter ids, but an argument of shape {tuple(x.shape)} has not "
            f"{count} examples along axis {axis}. Every array is divided along its leading axis; "
            "say with adapt(..., in_axes=...) which are not (None: shared by all examples)"
        )
    return axis % x.ndim


def _without_batch(x: Any, axis: int) -> Any:
    """Return an output of a batch of one without the batch axis."""
    if jnp.ndim(x) == 0:
        return x
    if not -x.ndim <= axis < x.ndim or x.shape[axis] != 1:
        raise LoraError(
            f"an output of shape {tuple(x.shape)} for a batch of one has no examples along axis "
            f"{axis}; say with adapt(..., out_axes=...) where it has them"
        )
    return jnp.squeeze(x, axis)
