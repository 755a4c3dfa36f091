"""Programs of jax.numpy and lax without control flow."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from tests.cases.case import B, T, case, normal


@case
def bare_matmul() -> Any:
    return lambda p, x: x @ p["w"], {"w": normal(0, 10, 14)}, (normal(1, B, T, 10),), ("w",)


@case
def bare_transposed_left() -> Any:
    return lambda p, x: p["w"].T @ x, {"w": normal(0, 10, 14)}, (normal(1, 10, 7),), ("w",)


@case
def bare_vector() -> Any:
    return lambda p, x: p["w"] @ x, {"w": normal(0, 14, 10)}, (normal(1, 10),), ("w",)


@case
def bare_einsum_in_the_middle() -> Any:
    f = lambda p, x: jnp.einsum("btd,hdk->bhtk", x, p["w"])  # noqa: E731
    return f, {"w": normal(0, 2, 10, 7)}, (normal(1, B, T, 10),), ("w",)


@case
def bare_einsum_scrambled() -> Any:
    f = lambda p, x: jnp.einsum("kdhg,tbgk->hbdt", p["w"], x)  # noqa: E731
    return f, {"w": normal(0, 7, 4, 2, 5)}, (normal(1, T, B, 5, 7),), ("w",)


@case
def bare_einsum_summed_letter() -> Any:
    f = lambda p, x: jnp.einsum("bd,dhk->bk", x, p["w"])  # noqa: E731
    return f, {"w": normal(0, 10, 3, 7)}, (normal(1, B, 10),), ("w",)


@case
def bare_batched_product() -> Any:
    f = lambda p, x: jnp.einsum("ebd,edk->ebk", x, p["w"])  # noqa: E731
    return f, {"w": normal(0, 4, 10, 14)}, (normal(1, 4, B, 10),), ("w",)


@case
def bare_used_both_ways() -> Any:
    def f(p: Any, x: Any) -> Any:  # tied by hand: encode, then decode with the transpose
        return jnp.tanh(x @ p["w"]) @ p["w"].T

    return f, {"w": normal(0, 10, 14)}, (normal(1, B, 10),), ("w",)


@case
def bare_ragged_dot() -> Any:
    def f(p: Any, x: Any, sizes: Any) -> Any:
        return jax.lax.ragged_dot(x, p["experts"], sizes)

    args = (normal(1, 9, 10), jnp.array([4, 0, 3, 2]))
    # JAX raises NotImplementedError where only the experts of a ragged_dot are batched.
    return f, {"experts": normal(0, 4, 10, 14)}, args, ("experts",), {"batched": False}


@case
def bare_ragged_dot_of_scaled_rows() -> Any:
    def f(p: Any, x: Any, sizes: Any) -> Any:  # as an RMS norm does
        gain = jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True)) * p["scale"][None]
        return jax.lax.ragged_dot(x * gain, p["experts"], sizes)

    params = {"experts": normal(0, 4, 10, 14), "scale": normal(2, 10)}
    args = (normal(1, 9, 10), jnp.array([4, 0, 3, 2]))
    return f, params, args, ("experts",), {"batched": False}


@case
def bare_convolution_of_scaled_rows() -> Any:
    def f(p: Any, x: Any) -> Any:
        gain = jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True)) * p["scale"][None, None]
        return jax.lax.conv_general_dilated(
            x * gain, p["w"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )

    params = {"w": normal(0, 3, 10, 14), "scale": normal(2, 10)}
    return f, params, (normal(1, B, 6, 10),), ("w",)


@case
def bare_experts_by_index() -> Any:
    def f(p: Any, x: Any, expert: Any) -> Any:
        return jnp.einsum("bd,bdk->bk", x, p["experts"][expert])

    args = (normal(1, B, 10), jnp.array([3, 0, 3]))
    return f, {"experts": normal(0, 4, 10, 14)}, args, ("experts",)


@case
def bare_fused_split() -> Any:
    def f(p: Any, x: Any) -> Any:
        q, k, v = jnp.split(p["qkv"], 3, axis=-1)
        return (x @ q) * jnp.tanh(x @ k) + x @ v

    return f, {"qkv": normal(0, 10, 24)}, (normal(1, B, 10),), ("qkv",)


@case
def bare_fused_reshape() -> Any:
    def f(p: Any, x: Any) -> Any:
        w = p["qkv"].reshape(10, 3, 2, 4)
        return jnp.einsum("bd,dshk->sbhk", x, w)

    return f, {"qkv": normal(0, 10, 24)}, (normal(1, B, 10),), ("qkv",)


def _three(*shapes: tuple[int, ...]) -> dict[str, Any]:
    return {
        path: normal(i, *shape) for i, (path, shape) in enumerate(zip("qkv", shapes, strict=True))
    }


@case
def bare_concatenated_outputs() -> Any:
    """A model with separate q, k and v joins them at each step; k is not adapted."""

    def f(p: Any, x: Any) -> Any:
        return x @ jnp.concatenate([p["q"], p["k"], p["v"]], axis=1)

    return f, _three((10, 9), (10, 4), (10, 5)), (normal(4, B, 10),), ("q", "v")


@case
def bare_concatenated_inputs() -> Any:
    """Some parts are transposed or scaled before they are joined."""

    def f(p: Any, x: Any) -> Any:
        return x @ jnp.concatenate([p["q"].T, 2.0 * p["k"], p["v"]], axis=0)

    return f, _three((12, 7), (9, 12), (8, 12)), (normal(4, B, 24),), ("q", "k")


@case
def bare_stacked_outputs() -> Any:
    def f(p: Any, x: Any) -> Any:
        return jnp.einsum("bi,iko->kbo", x, jnp.stack([p["q"], p["k"], p["v"]], axis=1))

    return f, _three(*[(10, 9)] * 3), (normal(4, B, 10),), ("q", "v")


@case
def bare_stacked_layers() -> Any:
    def f(p: Any, x: Any) -> Any:
        step = lambda h, w: (jnp.tanh(h @ w), None)  # noqa: E731
        return jax.lax.scan(step, x, jnp.stack([p["q"], p["k"], p["v"]]))[0]

    return f, _three(*[(10, 10)] * 3), (normal(4, B, 10),), ("q", "v")


@case
def bare_concatenated_stacks() -> Any:
    """A stack of layers is joined to another, which is k and v joined along their outputs."""

    def f(p: Any, x: Any) -> Any:
        layers = jnp.concatenate([p["q"], jnp.concatenate([p["k"], p["v"]], axis=2)])
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, layers)[0]

    params = _three((1, 11, 11), (2, 11, 5), (2, 11, 6))
    return f, params, (normal(4, B, 11),), ("*",)


@case
def bare_padded() -> Any:
    def f(p: Any, x: Any) -> Any:
        return x @ jnp.pad(p["w"], ((1, 2), (0, 3)), constant_values=0.5)

    return f, {"w": normal(0, 9, 11)}, (normal(1, B, 12),), ("w",)


@case
def bare_tiled() -> Any:
    f = lambda p, x: x @ jnp.tile(p["w"], (2, 3))  # noqa: E731
    return f, {"w": normal(0, 10, 11)}, (normal(1, B, 20),), ("w",)


@case
def bare_scaled_per_channel() -> Any:
    f = lambda p, x: x @ (p["w"] * p["g"] / (2 + p["g"]))  # noqa: E731
    return f, {"w": normal(0, 9, 11), "g": normal(1, 1, 11)}, (normal(2, B, 9),), ("w",)


@case
def bare_columns_by_index() -> Any:
    f = lambda p, x, ids: x @ p["w"][:, ids]  # noqa: E731
    return f, {"w": normal(0, 9, 11)}, (normal(2, B, 9), jnp.array([4, 0, 4, 9])), ("w",)


@case
def bare_vmap_over_an_index() -> Any:
    def f(p: Any, x: Any, ids: Any) -> Any:
        return jax.vmap(lambda i, x: jnp.tanh(p["table"][i]) + x @ p["experts"][i])(ids, x)

    params = {"table": normal(0, 4, 14), "experts": normal(1, 4, 10, 14)}
    return f, params, (normal(2, B, 10), jnp.array([3, 0, 3])), ("table", "experts")


@case
def bare_depthwise_kernel_reshaped() -> Any:
    """Keras's kernel [h, w, channels, multiplier] for a convolution of `channels` groups."""

    def f(p: Any, x: Any) -> Any:
        return jax.lax.conv_general_dilated(
            x, p["w"].reshape(3, 3, 1, 12), (1, 1), "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=4,
        )  # fmt: skip

    return f, {"w": normal(0, 3, 3, 4, 3)}, (normal(1, 2, 5, 3, 4),), ("w",)


@case
def bare_scan_hands_out_its_weights() -> Any:
    def f(p: Any, x: Any) -> Any:
        step = jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), (w, h)))
        h, (weights, states) = jax.lax.scan(step, x, p["w"])
        return h @ weights[0], states

    return f, {"w": normal(0, 3, 10, 10)}, (normal(1, B, 10),), ("w",)


@case
def bare_sliced_scaled_reversed() -> Any:
    def f(p: Any, x: Any) -> Any:
        w = 0.5 * -p["w"][::2, 1:]
        return x @ jnp.flip(w, 0) / 3.0

    return f, {"w": normal(0, 20, 15)}, (normal(1, B, 10),), ("w",)


@case
def bare_unrolled_stack() -> Any:
    def f(p: Any, x: Any) -> Any:
        for i in range(3):
            x = jnp.tanh(x @ p["layers"][i])
        return x

    return f, {"layers": normal(0, 3, 10, 10)}, (normal(1, 2, 10),), ("layers",)


@case
def bare_stop_gradient() -> Any:
    def f(p: Any, x: Any) -> Any:
        return x @ jax.lax.stop_gradient(p["w"]) + jnp.sin(x @ p["w"])

    return f, {"w": normal(0, 10, 14)}, (normal(1, B, 10),), ("w",)


@case
def bare_row_by_static_index() -> Any:
    def f(p: Any, x: Any) -> Any:
        return x + p["table"][2][None]

    return f, {"table": normal(0, 4, 10)}, (normal(1, 6, 10),), ("table",)
