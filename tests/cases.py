"""The table of programs that the transform must handle, Linen, NNX and bare side by side.

Every dimension of a weight is chosen so that no activation has as many elements as the weight:
the tests can then tell a product `a @ b` or a gradient of W by its size alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

import lora_jax

B, T = 3, 5


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    f: Callable[..., Any]  # f(params, *args, **kwargs) -> a tree of arrays
    params: Any
    args: tuple[Any, ...]
    targets: tuple[str, ...]
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    reverse: bool = True  # reverse-mode differentiable (a while_loop is not)
    batched: bool = True  # JAX can vmap the function over its weights alone


REGISTRY: dict[str, Callable[[], Case]] = {}


def case(make: Callable[[], Any]) -> Callable[[], Case]:
    """Register a builder; it returns (f, params, args, targets[, extras])."""
    name = make.__name__

    @functools.cache
    def build() -> Case:
        f, params, args, targets, *rest = make()
        return Case(name, f, params, args, targets, **(rest[0] if rest else {}))

    REGISTRY[name] = build
    return build


def normal(seed: int, *shape: int) -> jax.Array:
    """Drawn by NumPy and put on the device, which compiles nothing; `jnp.asarray` compiles."""
    return jax.device_put(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def near_ones_and_zeros(shapes: Any) -> Any:
    """Parameters for a model: norms' scales about one, the rest about zero, all of them random."""

    def draw(path: Any, leaf: Any) -> jax.Array:
        seed = sum(map(ord, jax.tree_util.keystr(path)))
        return 0.3 * normal(seed, *leaf.shape) + (getattr(path[-1], "key", "") == "scale")

    return jax.tree_util.tree_map_with_path(draw, shapes)


def linen(module: nn.Module, *args: Any, targets: tuple[str, ...], **kwargs: Any) -> Any:
    shapes = jax.eval_shape(functools.partial(module.init, **kwargs), jax.random.key(0), *args)
    variables = jax.tree.map(lambda x: normal(7, *x.shape) / 3, shapes)
    return module.apply, variables, args, targets, {"kwargs": kwargs}


def from_nnx(model: nnx.Module, *args: Any, targets: tuple[str, ...]) -> Any:
    f, params, state = lora_jax.from_nnx(model)
    return (lambda p, *a: f(p, state, *a)[0]), params, args, targets


# --- bare ---------------------------------------------------------------------------------------


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
    """Fused at each step, as q, k and v of a model that keeps them apart; k is not adapted."""

    def f(p: Any, x: Any) -> Any:
        return x @ jnp.concatenate([p["q"], p["k"], p["v"]], axis=1)

    return f, _three((10, 9), (10, 4), (10, 5)), (normal(4, B, 10),), ("q", "v")


@case
def bare_concatenated_inputs() -> Any:
    """Members that are transposed, or scaled, before they are put together."""

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
    """Two stacks of layers as one; and again along the outputs of each layer."""

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
    """[h, w, channels, multiplier], as Keras has it, for a convolution of `channels` groups."""

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


# --- control flow -------------------------------------------------------------------------------


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
    """Its rule is not the derivative of its equations: entering it would lose the gradient of x."""

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


# --- shard_map, over 8 devices ------------------------------------------------------------------


def _mapped(body: Any, *specs: Any, check_vma: bool = True) -> Any:
    *in_specs, out_specs = specs
    mesh = jax.make_mesh(
        (2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3
    )
    return jax.shard_map(
        body, mesh=mesh, in_specs=tuple(in_specs), out_specs=out_specs, check_vma=check_vma
    )


@case
def shard_map_column_and_row_parallel() -> Any:
    """A Megatron pair: the first product cut by its outputs, the second by its inputs, one sum."""

    def body(up: Any, down: Any, x: Any) -> Any:
        return jax.lax.psum(jnp.tanh(x @ up) @ down, "tensor")

    rows = P(("data", "fsdp"))
    mapped = _mapped(body, P(None, "tensor"), P("tensor"), rows, rows)
    params = {"up": normal(0, 10, 14), "down": normal(1, 14, 10)}
    f = lambda p, x: mapped(p["up"], p["down"], x)  # noqa: E731
    return f, params, (normal(2, 4, 10),), ("up", "down"), {"batched": False}


@case
def shard_map_contracted_over_two_axes() -> Any:
    def body(w: Any, x: Any) -> Any:
        return jax.lax.psum(x @ w, ("fsdp", "tensor"))

    mapped = _mapped(body, P(("fsdp", "tensor")), P("data", ("fsdp", "tensor")), P("data"))
    f = lambda p, x: mapped(p["w"], x)  # noqa: E731
    return f, {"w": normal(0, 12, 14)}, (normal(1, 4, 12),), ("w",), {"batched": False}


def _gathered(check_vma: bool) -> Any:
    """The weights brought together over `fsdp` by hand, along their inputs and their outputs."""

    def body(up: Any, down: Any, x: Any) -> Any:
        up = jax.lax.all_gather(up, "fsdp", axis=0, tiled=True)
        down = jax.lax.all_gather(down, "fsdp", axis=1, tiled=True)
        return jax.lax.psum(jnp.tanh(x @ up) @ down, "tensor")

    rows = P(("data", "fsdp"))
    mapped = _mapped(
        body, P("fsdp", "tensor"), P("tensor", "fsdp"), rows, rows, check_vma=check_vma
    )
    params = {"up": normal(0, 10, 14), "down": normal(1, 14, 10)}
    f = lambda p, x: mapped(p["up"], p["down"], x)  # noqa: E731
    return f, params, (normal(2, 4, 10),), ("up", "down"), {"batched": False}


@case
def shard_map_all_gather() -> Any:
    return _gathered(check_vma=True)


@case
def shard_map_all_gather_unchecked() -> Any:
    return _gathered(check_vma=False)


@case
def shard_map_over_scanned_layers() -> Any:
    """One axis by hand, the others left to XLA; the layer axis sliced off inside."""

    def body(layers: Any, x: Any) -> Any:
        def layer(x: Any, w: Any) -> Any:
            return jnp.tanh(jax.lax.psum(x @ w["up"], "tensor") @ w["down"]), None

        x, _ = jax.lax.scan(layer, x, layers)
        return jax.lax.all_gather(x, "tensor", axis=1, tiled=True)

    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    specs = {"up": P(None, "tensor", None), "down": P(None, None, "tensor")}
    mapped = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(specs, P(None, "tensor")),
        out_specs=P(),
        axis_names={"tensor"},
        check_vma=False,
    )
    params = {"up": normal(0, 3, 10, 14) / 4, "down": normal(1, 3, 14, 10) / 4}
    f = lambda p, x: jax.jit(mapped)(p, x)  # noqa: E731
    return f, params, (normal(2, 4, 10),), ("up", "down"), {"batched": False}


# --- Linen --------------------------------------------------------------------------------------


@case
def linen_dense() -> Any:
    return linen(nn.Dense(14), normal(1, B, T, 10), targets=("params/kernel",))


@case
def linen_dense_general_outputs() -> Any:
    return linen(nn.DenseGeneral((2, 7)), normal(1, B, T, 10), targets=("params/kernel",))


@case
def linen_dense_general_inputs() -> Any:
    module = nn.DenseGeneral(14, axis=(-2, 1))
    return linen(module, normal(1, B, 2, T, 4), targets=("params/kernel",))


@case
def linen_dense_general_batch() -> Any:
    module = nn.DenseGeneral(14, axis=-1, batch_dims=(0,))
    return linen(module, normal(1, 4, B, 10), targets=("params/kernel",))


@case
def linen_einsum() -> Any:
    module = nn.Einsum((2, 10, 7), "btd,hdk->bthk", use_bias=False)
    return linen(module, normal(1, B, T, 10), targets=("params/kernel",))


@case
def linen_conv_1d() -> Any:
    return linen(nn.Conv(14, (3,)), normal(1, B, 8, 10), targets=("params/kernel",))


@case
def linen_conv_2d_strided() -> Any:
    module = nn.Conv(14, (3, 2), strides=(2, 1), padding="VALID")
    return linen(module, normal(1, 2, 7, 8, 5), targets=("params/kernel",))


@case
def linen_conv_grouped() -> Any:
    module = nn.Conv(12, (3, 3), feature_group_count=3, kernel_dilation=(2, 1))
    return linen(module, normal(1, 2, 8, 6, 9), targets=("params/kernel",))


@case
def linen_conv_transposed() -> Any:
    module = nn.ConvTranspose(14, (3,), strides=(2,))
    return linen(module, normal(1, B, 6, 10), targets=("params/kernel",))


@case
def linen_embed() -> Any:
    ids = jnp.array([[3, 0, 21], [1, 1, 22]])
    return linen(nn.Embed(23, 9), ids, targets=("params/embedding",))


class _Tied(nn.Module):
    @nn.compact
    def __call__(self, ids: Any) -> Any:
        table = nn.Embed(23, 9, name="table")
        return table.attend(jnp.tanh(table(ids)))


@case
def linen_embed_tied() -> Any:
    ids = jnp.array([[3, 0, 21, 7], [1, 1, 22, 2]])
    return linen(_Tied(), ids, targets=("params/table/embedding",))


@case
def linen_attention() -> Any:
    module = nn.MultiHeadDotProductAttention(2, qkv_features=14, out_features=11)
    targets = ("params/{query,key,value,out}/kernel",)
    return linen(module, normal(1, B, T, 10), targets=targets)


class _Layer(nn.Module):
    @nn.compact
    def __call__(self, x: Any, _: Any = None) -> Any:
        h = nn.LayerNorm(name="norm")(x)
        h = x + nn.MultiHeadDotProductAttention(2, name="attention")(h, h)
        return h + nn.Dense(10, name="down")(nn.gelu(nn.Dense(26, name="up")(h))), None


class _Scanned(nn.Module):
    remat: bool

    @nn.compact
    def __call__(self, x: Any) -> Any:
        layer = nn.remat(_Layer) if self.remat else _Layer
        stack = nn.scan(layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return stack(name="layers")(x, None)[0]


@case
def linen_scan() -> Any:
    targets = ("params/layers/**/kernel",)
    return linen(_Scanned(remat=False), normal(1, B, T, 10), targets=targets)


@case
def linen_scan_remat() -> Any:
    targets = ("params/layers/**/kernel",)
    return linen(_Scanned(remat=True), normal(1, B, T, 10), targets=targets)


class _BatchNormed(nn.Module):
    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        x = nn.Dense(14, name="dense")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        return nn.Dropout(0.5, deterministic=not train)(x)


@case
def linen_mutable_and_rngs() -> Any:
    module, x = _BatchNormed(), normal(1, B, T, 10)
    variables = module.init(jax.random.key(0), x, train=False)
    kwargs = {"train": True, "mutable": ["batch_stats"], "rngs": {"dropout": jax.random.key(3)}}
    return module.apply, variables, (x,), ("params/dense/kernel",), {"kwargs": kwargs}


# --- NNX ----------------------------------------------------------------------------------------


@case
def nnx_linear() -> Any:
    model = nnx.Linear(10, 14, rngs=nnx.Rngs(0))
    return from_nnx(model, normal(1, B, T, 10), targets=("kernel",))


@case
def nnx_linear_general() -> Any:
    model = nnx.LinearGeneral((2, 5), (3, 7), axis=(-2, -1), rngs=nnx.Rngs(0))
    return from_nnx(model, normal(1, B, T, 2, 5), targets=("kernel",))


@case
def nnx_einsum() -> Any:
    model = nnx.Einsum("btd,hdk->bthk", (2, 10, 7), rngs=nnx.Rngs(0))
    return from_nnx(model, normal(1, B, T, 10), targets=("kernel",))


@case
def nnx_conv_1d() -> Any:
    model = nnx.Conv(10, 14, (3,), rngs=nnx.Rngs(0))
    return from_nnx(model, normal(1, B, 8, 10), targets=("kernel",))


@case
def nnx_conv_2d_grouped_strided() -> Any:
    model = nnx.Conv(9, 12, (3, 2), strides=(1, 2), feature_group_count=3, rngs=nnx.Rngs(0))
    return from_nnx(model, normal(1, 2, 7, 6, 9), targets=("kernel",))


@case
def nnx_embed() -> Any:
    model = nnx.Embed(23, 9, rngs=nnx.Rngs(0))
    return from_nnx(model, jnp.array([[3, 0, 21], [1, 1, 22]]), targets=("embedding",))


class _NnxTied(nnx.Module):
    def __init__(self) -> None:
        self.table = nnx.Embed(23, 9, rngs=nnx.Rngs(0))

    def __call__(self, ids: Any) -> Any:
        return self.table.attend(jnp.tanh(self.table(ids)))


@case
def nnx_embed_tied() -> Any:
    ids = jnp.array([[3, 0, 21, 7], [1, 1, 22, 2]])
    return from_nnx(_NnxTied(), ids, targets=("table/embedding",))


@case
def nnx_attention() -> Any:
    model = nnx.MultiHeadAttention(
        2, 10, qkv_features=14, out_features=11, decode=False, rngs=nnx.Rngs(0)
    )
    return from_nnx(model, normal(1, B, T, 10), targets=("{query,key,value,out}/kernel",))


class _NnxScanned(nnx.Module):
    def __init__(self) -> None:
        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def make(rngs: nnx.Rngs) -> nnx.Linear:
            return nnx.Linear(10, 10, rngs=rngs)

        self.layers = make(nnx.Rngs(0))

    def __call__(self, x: Any) -> Any:
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x: Any, layer: Any) -> Any:
            return x + jnp.tanh(layer(x))

        return run(x, self.layers)


@case
def nnx_scan() -> Any:
    return from_nnx(_NnxScanned(), normal(1, 2, 10), targets=("layers/kernel",))
