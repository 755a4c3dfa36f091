"""The bridge for NNX models: one line from a model object to a pure function and its trees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def from_nnx(model: Any, method: str = "__call__") -> tuple[Callable[..., Any], Any, Any]:
    """Split an NNX model into a pure function, its parameters, and all its other state.

    Args:
      model: an `nnx.Module`; it is read, not changed.
      method: the method to call.

    Returns:
      `(f, params, state)` with `f(params, state, *args, **kwargs) -> (output, new_state)`.
      `params` is a plain nested dict of the `nnx.Param` values (paths like
      `layers/0/attention/query/kernel`), `state` a plain dict of everything else: batch
      statistics, random number generators, caches. It is handed in and out, so that dropout and
      batch statistics move on as they do in NNX.

    >>> import jax, jax.numpy as jnp, lora_jax
    >>> from flax import nnx
    >>> f, params, state = lora_jax.from_nnx(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    >>> spec, x = lora_jax.LoraSpec(rank=2, targets="kernel"), jnp.ones((1, 4))
    >>> layout = lora_jax.resolve(spec, f, params, state, x)
    >>> adapters = lora_jax.init(jax.random.key(0), layout)
    >>> y, state = lora_jax.adapt(layout, f)(params, adapters, state, x)
    >>> y.shape
    (1, 3)
    """
    from flax import nnx  # 1.6 s of import time that only NNX users need

    graphdef, *states = nnx.split(model, nnx.Param, ...)
    param_state, rest_state = states

    def f(params: Any, state: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        whole = nnx.merge(
            graphdef, _filled(nnx, param_state, params), _filled(nnx, rest_state, state)
        )
        out = getattr(whole, method)(*args, **kwargs)
        return out, nnx.to_pure_dict(nnx.state(whole, nnx.Not(nnx.Param)))

    return f, nnx.to_pure_dict(param_state), nnx.to_pure_dict(rest_state)


def _filled(nnx: Any, abstract: Any, values: Any) -> Any:
    """A state of the same structure and variable types, with other values."""
    state = nnx.merge_state(abstract)
    nnx.replace_by_pure_dict(state, values)
    return state
