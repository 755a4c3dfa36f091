"""The definition: `W + scale * a @ b`, or what another kind of update makes of W.

`lora_jax.adapt` is the fast path equal to it.
"""

from __future__ import annotations

from typing import Any

from lora_jax import paths
from lora_jax.adapters import Adapters, check
from lora_jax.layout import Layout
from lora_jax.updates.kind import kind_of


def merge(layout: Layout, params: Any, adapters: Adapters) -> Any:
    """The parameters with every update added: `W + (alpha / rank) * a @ b`.

    The sum is formed in float32 (or in W's dtype where that is wider) and rounded once to W's
    dtype. There is no unmerge: subtracting does not restore a low-precision W, so keep the base.

    **A quantised base** can be merged in two ways, and `params` says which:

        merge(layout, quantised, adapters)   into the dequantised weights, the ones that the
                                             adapters were trained on: the model that was trained
        merge(layout, original, adapters)    into the weights before they were quantised: another
                                             model, of which `merge_error` says by how much

    Either way the merged leaves are float arrays: nothing is quantised again.

    Args:
      layout: from `lora_jax.resolve` or `lora_jax.restore`.
      params: the base parameters, a pytree; not changed.
      adapters: `{path: Factors(a, b)}`, or the arrays of another kind.

    Returns:
      A pytree like `params`, same shapes and dtypes; a target that was a quantised `Base` is an
      array, and other such leaves stay as they are.

    Raises:
      LoraError: the layout does not fit the parameters, or the adapters the layout.

    >>> import jax.numpy as jnp, lora_jax
    >>> from lora_jax import Factors
    >>> params = {"w": jnp.ones((4, 3))}
    >>> f = lambda params, x: x @ params["w"]
    >>> layout = lora_jax.resolve(lora_jax.LoraSpec(1, 1.0, ("w",)), f, params, jnp.ones((2, 4)))
    >>> merged = merge(layout, params, {"w": Factors(jnp.ones((4, 1)), 2 * jnp.ones((1, 3)))})
    >>> merged["w"][0]
    Array([3., 3., 3.], dtype=float32)
    """
    leaves = paths.flatten(params)
    layout.check_params(leaves)
    check(layout, adapters)
    return paths.replace(
        params,
        {t.path: kind_of(t).merged(t, adapters[t.path], leaves[t.path]) for t in layout.targets},
    )
