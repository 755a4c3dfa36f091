"""Weights inside loops, branches, checkpoints, nested functions and custom derivatives."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from tests.cases.case import B, case, normal


@case
def bare_scan() -> Any:
    def f(p: Any, x: Any) -> Any:
        def layer(x: Any, w: Any) -> Any:
            return jnp.tanh(x @ w["up"]) @ w["down"], x.sum()

        return jax.lax.scan(layer, x, p)

    params = {"up": normal(0, 3, 10, 14) / 4, "down": normal(1, 3, 14, 10) / 4}
    return f, params, (normal(2, B, 10),), ("up", "down")


@case
def bare_scan_reversed() -> Any:
    def f(p: Any, x: Any) -> Any:  # the last layer first
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), x.sum()), x, p["w"], reverse=True)

    return f, {"w": normal(0, 3, 10, 10)}, (normal(1, B, 10),), ("w",)


@case
def bare_scan_constant_weight() -> Any:
    def f(p: Any, x: Any) -> Any:  # one weight for all steps, as in a recurrent cell
        return jax.lax.scan(lambda h, x: (jnp.tanh(h @ p["w"] + x), h), jnp.zeros((2, 10)), x)

    return f, {"w": normal(0, 10, 10)}, (normal(1, 4, 2, 10),), ("w",)


@case
def bare_scan_weight_in_carry() -> Any:
    def f(p: Any, x: Any) -> Any:
        (_, y), _ = jax.lax.scan(
            lambda c, _: ((c[0], jnp.tanh(c[1] @ c[0])), None), (p["w"], x), None, length=3
        )
        return y

    return f, {"w": normal(0, 10, 10)}, (normal(1, 2, 10),), ("w",)


@case
def bare_while() -> Any:
    def f(p: Any, x: Any, n: Any) -> Any:
        def body(c: Any) -> Any:
            return c[0] + 1, jnp.tanh(c[1] @ p["w"])

        return jax.lax.while_loop(lambda c: c[0] < n, body, (0, x))[1]

    args = (normal(1, 2, 10), jnp.int32(3))
    return f, {"w": normal(0, 10, 10)}, args, ("w",), {"reverse": False}


@case
def bare_while_condition_reads_it() -> Any:
    def f(p: Any, x: Any) -> Any:
        return jax.lax.while_loop(
            lambda c: jnp.abs(c[1] @ p["w"]).sum() > 1.0,
            lambda c: (c[0] + 1, 0.5 * jnp.tanh(c[1] @ p["w"])),
            (0, x),
        )

    params = {"w": 0.1 * normal(0, 10, 10)}
    return f, params, (normal(1, 2, 10),), ("w",), {"reverse": False}


@case
def bare_cond() -> Any:
    def f(p: Any, x: Any) -> Any:
        yes, no = (lambda: x @ p["w"]), (lambda: jnp.sin(x) @ p["w"] * 2)
        return jax.lax.cond(x.sum() > 0, yes, no) + jax.lax.cond(x.sum() < 0, yes, no)

    return f, {"w": normal(0, 10, 14)}, (normal(1, B, 10),), ("w",)


def _checkpointed(policy: Any) -> Any:
    def f(p: Any, x: Any) -> Any:
        @functools.partial(jax.checkpoint, policy=policy)
        def layer(x: Any, w: Any) -> Any:
            return jnp.tanh(checkpoint_name(x @ w, "product"))

        return layer(layer(x, p["w"]), p["w"])

    return f, {"w": normal(0, 10, 10)}, (normal(1, 2, 10),), ("w",)


@case
def bare_checkpoint() -> Any:
    return _checkpointed(None)


@case
def bare_checkpoint_dots() -> Any:
    return _checkpointed(jax.checkpoint_policies.dots_saveable)


@case
def bare_checkpoint_names() -> Any:
    return _checkpointed(jax.checkpoint_policies.save_only_these_names("product"))


@case
def bare_nested_jit() -> Any:
    inner = jax.jit(lambda w, x: jnp.tanh(x @ w))
    f = lambda p, x: jax.jit(lambda p, x: inner(p["w"].T, x))(p, x)  # noqa: E731
    return f, {"w": normal(0, 14, 10)}, (normal(1, B, 10),), ("w",)


@case
def bare_vmap_over_examples() -> Any:
    f = lambda p, x: jax.vmap(lambda x: jnp.tanh(p["w"] @ x))(x)  # noqa: E731
    return f, {"w": normal(0, 14, 10)}, (normal(1, B, 10),), ("w",)


@case
def bare_vmap_over_weights() -> Any:
    f = lambda p, x: jax.vmap(lambda w, x: x @ w)(p["w"], x)  # noqa: E731
    return f, {"w": normal(0, 4, 10, 14)}, (normal(1, 4, B, 10),), ("w",)


@case
def bare_vmap_over_tables() -> Any:
    f = lambda p, ids: jax.vmap(lambda w, i: jnp.take(w, i, axis=0))(p["w"], ids)  # noqa: E731
    return f, {"w": normal(0, 4, 10, 14)}, (jnp.arange(8).reshape(4, 2),), ("w",)


@case
def bare_custom_jvp() -> Any:
    @jax.custom_jvp
    def soft(w: Any, x: Any) -> Any:
        return jnp.tanh(x @ w)

    @soft.defjvp
    def rule(primals: Any, tangents: Any) -> Any:
        (w, x), (dw, dx) = primals, tangents
        y = soft(w, x)
        return y, (1 - y**2) * (x @ dw + dx @ w)

    return lambda p, x: soft(p["w"], x), {"w": normal(0, 10, 14)}, (normal(1, B, 10),), ("w",)


@case
def bare_custom_jvp_straight_through() -> Any:
    """A rule that is not the derivative of the equations: entering them would lose x's gradient."""

    @jax.custom_jvp
    def quantised(w: Any, x: Any) -> Any:
        return jnp.round(x) @ w

    @quantised.defjvp
    def rule(primals: Any, tangents: Any) -> Any:
        (w, x), (dw, dx) = primals, tangents
        return quantised(w, x), 3 * jnp.sin(x) @ dw + dx @ w

    f = lambda p, x: quantised(p["w"], x)  # noqa: E731
    return f, {"w": normal(0, 10, 14)}, (3 * normal(1, B, 10),), ("w",)


@case
def bare_custom_jvp_beside() -> Any:
    f = lambda p, x: jax.nn.relu(x @ p["w"])  # noqa: E731
    return f, {"w": normal(0, 10, 14)}, (normal(1, B, 10),), ("w",)
