"""The error of an adapter that is merged into the original weights of a quantised base."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from lora_jax import paths
from lora_jax.adapters import Adapters, check
from lora_jax.base import dense, wide_dtype
from lora_jax.layout import Layout
from lora_jax.updates.kind import kind_of


class MergeError(NamedTuple):
    """The distance between a target merged into the quantised and into the original base.

    An error well above the update means that merging into the original base gives a model that
    the adapter was not trained for.

    Attributes:
      error: the Frobenius norm of the difference of the two merged weights.
      update: the Frobenius norm of the change that the adapter makes to the quantised base.
    """

    error: Any
    update: Any


def merge_error(
    layout: Layout, quantised: Any, original: Any, adapters: Adapters
) -> dict[str, MergeError]:
    """Return, for each target, the distance between the two ways to merge a quantised base.

    Args:
      layout: of the adapters.
      quantised: the parameters that the adapters were trained on.
      original: the same parameters before they were quantised.
      adapters: trained on `quantised`.

    Returns:
      `{path: MergeError(error, update)}`, [] float32 each.

    Raises:
      LoraError: a layout that does not fit the parameters or the adapters.

    >>> import lora_jax
    >>> from lora_jax import Factors
    >>> layout = lora_jax.Layout((lora_jax.Target("w", (4, 3), (), (0,), (1,), 1, 1.0),))
    >>> update = {"w": Factors(jnp.ones((4, 1)), jnp.ones((1, 3)))}
    >>> found = merge_error(layout, {"w": jnp.ones((4, 3))}, {"w": 1.1 * jnp.ones((4, 3))}, update)
    >>> [round(float(x), 4) for x in found["w"]]
    [0.3464, 3.4641]
    """
    theirs, ours = paths.flatten(original), paths.flatten(quantised)
    layout.check_params(theirs)
    layout.check_params(ours)
    check(layout, adapters)
    found = {}
    for t in layout.targets:
        kind, w = kind_of(t), jnp.asarray(dense(ours[t.path]))
        w = w.astype(wide_dtype(w.dtype))
        other = jnp.asarray(dense(theirs[t.path])).astype(w.dtype)
        merged = kind.merged(t, adapters[t.path], w)
        error = merged - kind.merged(t, adapters[t.path], other)
        found[t.path] = MergeError(_norm(error), _norm(merged - w))
    return found


def _norm(x: Any) -> Any:
    return jnp.linalg.norm(x.ravel())
