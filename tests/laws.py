"""Laws for the layout of any function: it is complete, and `adapt` equals `merge`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax
from tests import oracle
from tests.test_transform import assert_close, weighted


def drawn_adapters(layout: lora_jax.Layout) -> Any:
    shapes = jax.eval_shape(lambda: lora_jax.init(jax.random.key(0), layout))
    draw = np.random.default_rng(3).standard_normal
    return jax.tree.map(lambda x: jax.device_put((0.1 * draw(x.shape)).astype(x.dtype)), shapes)


def assert_adapt_equals_merge(
    layout: lora_jax.Layout,
    f: Callable[..., Any],
    params: Any,
    *args: Any,
    tolerance: float = 2e-5,
) -> None:
    """Compare outputs and gradients with the merged ones, to `tolerance` of the largest entry."""
    adapters = drawn_adapters(layout)
    g = lora_jax.adapt(layout, f)

    def both(fn: Callable[[Any, Any], Any]) -> Any:
        def loss(adapters: Any, params: Any) -> Any:
            out = [x for x in jax.tree.leaves(fn(params, adapters)) if is_float(x)]
            return weighted(out), out

        (_, out), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(adapters, params)
        return out, gradients

    got = both(lambda p, ad: g(p, ad, *args))
    want = both(lambda p, ad: f(lora_jax.merge(layout, p, ad), *args))
    assert_close(got, want, tolerance)
    moved = [bool(np.any(np.asarray(x))) for x in jax.tree.leaves(want[1])]
    assert all(moved) or not moved, "a gradient is zero: the comparison proves nothing"


def flat(params: Any) -> dict[str, Any]:
    """The parameters by path."""
    keyed = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(k, simple=True, separator="/"): x for k, x in keyed}


def is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def left_out(layout: lora_jax.Layout) -> dict[str, str]:
    return {entry.path: entry.reason for entry in layout.left_out}


def assert_complete(
    layout: lora_jax.Layout, f: Callable[..., Any], params: Any, *args: Any
) -> None:
    """Check that "all-linear" takes or names every kernel that the oracle finds."""
    found = oracle.walk(f, params, *args)
    unnamed = set(found.kernels) - {t.path for t in layout.targets}
    if unnamed:  # a layout that has every kernel needs no list
        reasons = left_out(layout)
        unnamed -= {path for path, reason in reasons.items() if reason}
        heads = {path for path, reason in reasons.items() if "output head" in reason}
        assert heads == found.heads
    kernels = {path: found.kernels[path] for path in sorted(unnamed)}
    assert not kernels, f"left out without a reason: {kernels}"
