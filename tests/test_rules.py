"""Single rules of the primitives, on the smallest programs that need them.

Each program is a model of other people, reduced to one operation; tests/foreign has the models.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.experimental import pallas as pl

import lora_jax
from lora_jax import LoraError, LoraSpec
from tests import laws
from tests.cases import normal

X = normal(1, 3, 6)
IDS = jnp.array([2, 0, 3])


def assert_law(f: Any, params: Any, *args: Any, targets: Any = "all-linear", **kwargs: Any) -> Any:
    layout = lora_jax.resolve(LoraSpec(2, 4.0, targets, **kwargs), f, params, *args)
    laws.assert_adapt_equals_merge(layout, f, params, *args)
    return layout


# --- mixed batches over ragged_dot --------------------------------------------------------------


def mixture(p: Any, x: Any) -> Any:
    """Sort tokens by expert, as mixtures of experts do: x [batch, tokens, in]."""
    rows = jnp.tanh(x @ p["first"]).reshape(-1, 8)
    expert = jnp.argmax(rows @ p["router"], axis=-1)
    order = jnp.argsort(expert)
    sizes = jnp.bincount(expert, length=3).astype(jnp.int32)
    y = lax.ragged_dot(rows[order], p["experts"], sizes)
    y = jnp.zeros_like(y).at[order].set(y)
    return jnp.tanh(y).reshape(*x.shape[:-1], -1) @ p["head"]


MIXTURE = {
    "first": normal(0, 6, 8),
    "router": normal(1, 8, 3),
    "experts": normal(2, 3, 8, 7),
    "head": normal(3, 7, 5),
}


@pytest.mark.few(2)
@pytest.mark.parametrize("target", ["head", "first", "experts", "router"])
def test_a_mixed_batch_over_a_ragged_dot(target: str) -> None:
    """An example in a mixed batch gets the same result as alone with its adapter merged."""
    x = normal(4, 3, 4, 6)
    layout = lora_jax.resolve(LoraSpec(2, 4.0, target), mixture, MIXTURE, x)
    members = [laws.drawn_adapters(layout), jax.tree.map(jnp.cos, laws.drawn_adapters(layout))]
    several, stacked = lora_jax.multi.stack([lora_jax.Adapter(layout, a) for a in members])
    ids = [1, 0, lora_jax.multi.BASE]
    g = jax.jit(lora_jax.adapt(several, mixture))

    def mixed(stacked: Any) -> Any:
        return g(MIXTURE, lora_jax.multi.select(stacked, jnp.array(ids)), x)

    got = mixed(stacked)
    for i, number in enumerate(ids):
        alone = MIXTURE if number < 0 else lora_jax.merge(layout, MIXTURE, members[number])
        np.testing.assert_allclose(got[i], mixture(alone, x[i : i + 1])[0], rtol=2e-5, atol=2e-5)
    gradients = jax.grad(lambda s: jnp.sin(mixed(s)).sum(), allow_int=True)(stacked)
    # The router is read by argmax, which has no gradient.
    assert np.any(np.asarray(gradients.factors[target].b)) or target == "router"


# --- functions with derivative rules of their own -----------------------------------------------


@jax.custom_jvp
def routed(x: Any, w: Any) -> tuple[Any, Any]:
    scores = x @ w
    return jax.nn.softmax(scores), scores.argmax(-1)


@routed.defjvp
def _routed_jvp(primals: Any, tangents: Any) -> Any:
    (x, w), (dx, dw) = primals, tangents
    y, best = routed(x, w)
    slope = x @ dw + dx @ w
    dy = y * (slope - (y * slope).sum(-1, keepdims=True))
    return (y, best), (dy, np.zeros(best.shape, jax.dtypes.float0))


@pytest.mark.parametrize("fold", [(), ("w",)], ids=["rule", "folded"])
def test_a_custom_jvp_with_an_integer_output(fold: Any) -> None:
    def f(p: Any, x: Any) -> Any:
        y, best = routed(x, p["w"])
        return y * best[:, None].astype(y.dtype)

    assert_law(f, {"w": normal(0, 6, 8)}, X, targets="w", fold=fold)


def test_a_custom_jvp_with_an_integer_input() -> None:
    @jax.custom_jvp
    def row(w: Any, i: Any, x: Any) -> Any:
        return (x @ w) * i.astype(x.dtype)

    @row.defjvp
    def rule(primals: Any, tangents: Any) -> Any:
        (w, i, x), (dw, _, dx) = primals, tangents
        return row(w, i, x), (x @ dw + dx @ w) * i.astype(x.dtype)

    f = lambda p, x, i: (row(p["w"], i, x), jnp.argmax(row(p["w"], i, x)))  # noqa: E731
    assert_law(f, {"w": normal(0, 6, 8)}, X, jnp.int32(3), targets="w")


# --- lookups ------------------------------------------------------------------------------------


def test_rows_looked_up_by_a_batched_scalar_index() -> None:
    f = lambda p, ids: jax.vmap(lambda i: p["table"][i])(ids)  # noqa: E731
    layout = assert_law(f, {"table": normal(0, 9, 6)}, IDS, targets="table")
    assert (layout["table"].inputs, layout["table"].outputs) == ((0,), (1,))


def test_a_table_of_matrices_looked_up_by_a_batched_scalar_index() -> None:
    f = lambda p, ids: jax.vmap(jax.vmap(lambda i: p["table"][i]))(ids[None])  # noqa: E731
    layout = assert_law(f, {"table": normal(0, 9, 6)}, IDS, targets="table")
    assert (layout["table"].inputs, layout["table"].outputs) == ((0,), (1,))


def test_an_expert_for_each_token_by_a_batched_scalar_index() -> None:
    f = lambda p, x, ids: jax.vmap(lambda x, i: x @ p["experts"][i])(x, ids)  # noqa: E731
    layout = assert_law(f, {"experts": normal(0, 4, 6, 8)}, X, IDS, targets="experts")
    assert layout["experts"].stack == (0,)


def test_two_experts_for_each_token_by_batched_indices() -> None:
    def f(p: Any, x: Any, ids: Any) -> Any:
        one = lambda x, i: jnp.einsum("d,kdh->kh", x, p["experts"][i])  # noqa: E731
        return jax.vmap(one)(x, ids)

    ids = jnp.stack([IDS, (IDS + 1) % 4], axis=1)
    layout = assert_law(f, {"experts": normal(0, 4, 6, 8)}, X, ids, targets="experts")
    assert layout["experts"].stack == (0,)


# --- convolutions -------------------------------------------------------------------------------


def depthwise(p: Any, x: Any) -> Any:
    """Keras stores [h, w, C, 1] and reshapes it to [h, w, 1, C] for a convolution of C groups."""
    h, w, channels, multiplier = p["w"].shape
    kernel = p["w"].reshape(h, w, 1, channels * multiplier)
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=channels,
    )  # fmt: skip


@pytest.mark.parametrize("multiplier", [1, 2])
def test_a_depthwise_kernel_that_is_reshaped(multiplier: int) -> None:
    params, x = {"w": normal(0, 3, 3, 4, multiplier)}, normal(1, 2, 5, 5, 4)
    layout = assert_law(depthwise, params, x, targets="w")
    target = layout["w"]
    assert sorted((*target.stack, *target.inputs, *target.outputs)) == [0, 1, 2, 3]
    assert set(target.inputs) >= {0, 1} and 2 in target.outputs


# --- control flow -------------------------------------------------------------------------------


class _Stack(nnx.Module):
    def __init__(self) -> None:
        make = nnx.vmap(lambda rngs: nnx.Linear(6, 6, rngs=rngs))
        self.layers = nnx.split_rngs(splits=3)(make)(nnx.Rngs(0))

    def __call__(self, x: Any) -> Any:
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat
        def run(x: Any, layer: Any) -> Any:
            return x + jnp.tanh(layer(x))

        return run(x, self.layers)


@pytest.mark.standard_promotion
def test_nnx_remat_inside_nnx_scan() -> None:
    f, params, state = lora_jax.from_nnx(_Stack())
    layout = assert_law(lambda p, x: f(p, state, x)[0], params, X, targets="layers/kernel")
    assert layout["layers/kernel"].stack == (0,)


def test_a_scan_that_hands_out_weights_that_nobody_reads() -> None:
    def f(p: Any, x: Any) -> Any:
        step = lambda h, w: (jnp.tanh(h @ w), (w, {"norm": (h * h).sum()}))  # noqa: E731
        h, (_, norms) = lax.scan(jax.checkpoint(step), x, p["w"])
        return h, norms

    assert_law(f, {"w": normal(0, 2, 6, 6)}, X, targets="w")


def on_each_platform(p: Any, x: Any) -> Any:
    """The other platform's branch holds a kernel of that platform, which cannot be lowered here."""

    def kernel(x: Any, out: Any) -> None:
        out[...] = jnp.tanh(x[...])

    def there(x: Any, w: Any) -> Any:
        return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct((3, 8), x.dtype))(x @ w)

    return lax.platform_dependent(x, p["w"], tpu=there, default=lambda x, w: jnp.tanh(x @ w))


def test_branches_by_platform_stay_branches_by_platform() -> None:
    """The adapted function chooses among branches by platform, as the original does."""
    params = {"w": normal(0, 6, 8)}
    layout = lora_jax.resolve(LoraSpec(2, 4.0, "w"), on_each_platform, params, X)
    adapters = laws.drawn_adapters(layout)
    want = jax.jit(on_each_platform)(lora_jax.merge(layout, params, adapters), X)
    got = jax.jit(lora_jax.adapt(layout, on_each_platform))(params, adapters, X)
    np.testing.assert_allclose(got, want, rtol=1e-5)


# --- which axes are inputs ----------------------------------------------------------------------


def test_the_columns_picked_by_indices_are_outputs() -> None:
    f = lambda p, x, ids: x @ p["w"][:, ids]  # noqa: E731
    layout = assert_law(f, {"w": normal(0, 6, 8)}, X, IDS, targets="w")
    assert (layout["w"].inputs, layout["w"].outputs) == ((0,), (1,))


def test_spectral_normalisation_is_no_use_of_the_weight() -> None:
    def f(p: Any, u: Any, x: Any) -> Any:
        v = u @ p["w"].T
        v = lax.stop_gradient(v / jnp.linalg.norm(v))
        u = v @ p["w"]
        u = lax.stop_gradient(u / jnp.linalg.norm(u))
        return x @ (p["w"] / (v @ p["w"] @ u.T)[0, 0])

    layout = assert_law(f, {"w": normal(0, 6, 8)}, normal(2, 1, 8), X, targets="w")
    assert (layout["w"].inputs, layout["w"].outputs) == ((0,), (1,))


# --- messages -----------------------------------------------------------------------------------


def test_two_leaves_of_one_path_are_an_error_that_names_it() -> None:
    f = lambda p, x: jnp.tanh(x @ p["a"]["b"]) @ p["a/b"]  # noqa: E731
    params = {"a/b": normal(0, 8, 5), "a": {"b": normal(1, 6, 8)}}
    with pytest.raises(LoraError, match="'a/b'"):
        lora_jax.resolve(LoraSpec(2, 4.0, "a/b"), f, params, X)


def test_a_product_that_is_known_is_not_denied() -> None:
    """The message does not deny that a product takes w, where a sum over inputs follows it."""
    f = lambda p, x: jnp.einsum("bi,io->b", x, p["w"])  # noqa: E731
    g = lambda p, x: jnp.einsum("bio,io->b", x[:, :, None] * jnp.ones(8), p["w"])  # noqa: E731
    with jax.numpy_rank_promotion("allow"):
        refused = [refusal(f) or "", refusal(g) or ""]
    assert not any("no product consumes" in text and "dot_general" in text for text in refused)


def refusal(f: Any) -> str | None:
    """Return the message of `resolve` about the target `w` of `f`, if it refuses it."""
    try:
        lora_jax.resolve(LoraSpec(2, 4.0, "w"), f, {"w": normal(0, 6, 8)}, X)
    except LoraError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    "change",
    [
        lambda w: jnp.pad(w, 1)[1:-1, 1:-1],
        lambda w: w / jnp.linalg.norm(w, axis=0, keepdims=True),
        lambda w: jnp.where(jnp.arange(8)[None] > 2, w, 0.0),
        lambda w: jnp.clip(w, -1, 1),
    ],
    ids=["pad", "mul", "select_n", "clip"],
)
def test_operations_are_reported_at_the_line_of_the_user(change: Any) -> None:
    """An error names the user's line, also inside a jitted function of jax.numpy."""

    def f(p: Any, x: Any) -> Any:
        return x @ change(p["w"]) + x @ p["w"]

    refused = refusal(f)
    if refused is None:
        assert_law(f, {"w": normal(0, 6, 8)}, X, targets="w")
    else:
        assert "unknown line" not in refused and "test_rules.py" in refused
