"""`merge`: the definition of an update, `W + scale * a @ b` for LoRA.

`lora_jax.adapt` is the fast path, tested to be equal to it.
"""

from __future__ import annotations

from typing import Any

from lora_jax import paths
from lora_jax.adapters import Adapters, check
from lora_jax.layout import Layout
from lora_jax.updates.kind import kind_of


def merge(layout: Layout, params: Any, adapters: Adapters) -> Any:
    """Return the parameters with every update added: `W + (alpha / rank) * a @ b`.

    The sum is formed in float32 (or in W's dtype if that is wider) and rounded once to W's dtype.
    There is no unmerge: subtracting does not restore a low-precision W, so keep the base.

    **A quantised base** can be merged in two ways. `params` decides which:

        merge(layout, quantised, adapters)   into the dequantised weights. The adapters were trained
                                             on these, so this is the model that was trained.
        merge(layout, original, adapters)    into the weights before they were quantised. This is
                                             another model; `merge_error` measures the difference.

    In both cases the merged leaves are float arrays: nothing is quantised again.

    Args:
      layout: from `lora_jax.resolve` or `lora_jax.restore`.
      params: the base parameters, a pytree; it is not changed.
      adapters: `{path: Factors(a, b)}`, or the arrays of another kind.

    Returns:
      A pytree like `params`, with the same shapes and dtypes. A target that was a quantised `Base`
      becomes an array; a quantised leaf that is not a target stays as it is.

    Raises:
      LoraError: the layout does not fit the parameters, or the adapters do not fit the layout.

    Source:
      Section 4.1 of arXiv 2106.09685: W0 + B A.

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
