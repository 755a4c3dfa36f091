"""Laws of every scheme of quantisation, and the errors of `quantize`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import lora_jax
from lora_jax import LoraError
from lora_jax.base import Base
from lora_jax.bases.quantise import bytes_of

SCHEMES = {
    "nf4": {"scheme": "nf4"},
    "nf4 in blocks of 32": {"scheme": "nf4", "block": 32},
    "nf4 across rows": {"scheme": "nf4", "block": 4096},
    "nf4 double": {"scheme": "nf4", "double": True},
    "int8": {"scheme": "int8"},
    "int8 grouped": {"scheme": "int8", "block": 32},
    "int4": {"scheme": "int4"},
    "int4 per channel": {"scheme": "int4", "block": "channel"},
    "fp8": {"scheme": "fp8"},
}
every_scheme = pytest.mark.parametrize("how", SCHEMES.values(), ids=SCHEMES)


def normal(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(len(shape)), shape, dtype)


def layout(shape: tuple[int, ...], stack: Any, inputs: Any, outputs: Any) -> lora_jax.Layout:
    return lora_jax.Layout((lora_jax.Target("w", shape, stack, inputs, outputs, 1, 1.0),))


def quantised(w: jax.Array, how: dict[str, Any], axes: lora_jax.Layout | None = None) -> Base:
    return lora_jax.quantize({"w": w}, targets="w" if axes is None else axes, **how)["w"]


def largest(w: jax.Array, groups: int) -> np.ndarray:
    """The largest magnitude in each group of inputs, for every number of w [in, out]."""
    parts = np.abs(np.asarray(w)).reshape(groups, -1, w.shape[1])
    return np.repeat(parts.max(axis=1), parts.shape[1], axis=0)


@pytest.mark.parametrize(
    ("how", "groups", "half_step"),
    [
        (SCHEMES["nf4"], 2, 0.1519036),  # half of the widest gap, from -1 to -0.696
        (SCHEMES["int8"], 1, 0.5 / 127),
        (SCHEMES["int8 grouped"], 4, 0.5 / 127),
        (SCHEMES["int4"], 2, 0.5 / 7),
        (SCHEMES["int4 per channel"], 1, 0.5 / 7),
        (SCHEMES["fp8"], 1, 16 / 448),  # a mantissa of 3 bits: steps of 32 at the top
    ],
)
def test_no_number_is_off_by_more_than_half_a_step(
    how: dict[str, Any], groups: int, half_step: float
) -> None:
    w = normal(128, 24) * jnp.exp(normal(1, 24))  # columns of very different sizes
    off = np.abs(np.asarray(quantised(w, how).dense() - w))
    assert (off <= half_step * largest(w, groups) * (1 + 1e-5)).all()
    assert off.max() > 0


@every_scheme
def test_dense_has_the_shape_and_dtype_that_the_base_says(how: dict[str, Any]) -> None:
    w = normal(2, 3, 8, 64, 5, dtype=jnp.bfloat16)
    base = quantised(w, how, layout(w.shape, (0, 1), (3, 2), (4,)))
    dense = jax.jit(lambda base: base.dense())(base)
    assert (dense.shape, dense.dtype) == (base.shape, base.dtype) == (w.shape, w.dtype)
    assert (base.ndim, base.size) == (5, w.size)
    error = jnp.linalg.norm((dense - w).astype(jnp.float32))
    assert error < 0.2 * jnp.linalg.norm(w.astype(jnp.float32))


@pytest.mark.few(4)
@every_scheme
def test_a_slice_of_a_stack_is_the_quantised_slice(how: dict[str, Any]) -> None:
    w = normal(3, 128, 6) * jnp.array([1.0, 10.0, 0.1])[:, None, None]
    stack = quantised(w, how, layout(w.shape, (0,), (1,), (2,)))
    alone = [quantised(w[i], how) for i in range(3)]
    for i in range(3):
        one = jax.tree.map(lambda x, i=i: x[i], stack)
        assert one.shape == (128, 6)
        jax.tree.map(np.testing.assert_array_equal, one, alone[i])
    x = normal(4, 128)
    want = jnp.stack([x @ base.dense() for base in alone])
    scanned = jax.lax.scan(lambda _, base: (None, x @ base.dense()), None, stack)[1]
    mapped = jax.vmap(lambda base: x @ base.dense())(stack)
    np.testing.assert_allclose(scanned, want, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(mapped, want, rtol=1e-5, atol=1e-4)
    restacked = jax.tree.map(lambda *parts: jnp.stack(parts), *alone)
    np.testing.assert_array_equal(restacked.dense(), stack.dense())


@pytest.mark.few(4)
@every_scheme
def test_quantising_what_was_dequantised_changes_no_code(how: dict[str, Any]) -> None:
    first = quantised(normal(128, 12), how)
    again = quantised(first.dense(), how)
    if how.get("double"):
        np.testing.assert_allclose(again.dense(), first.dense(), atol=0.05)
        return
    np.testing.assert_array_equal(again.codes, first.codes)
    np.testing.assert_allclose(again.scales, first.scales, rtol=2e-7)


@pytest.mark.few(4)
@every_scheme
def test_axes_of_the_layout_are_one_matrix(how: dict[str, Any]) -> None:
    """[heads, dim, model] with inputs (heads, dim) is [heads * dim, model], for any axis order."""
    w = normal(4, 32, 10)
    flat = quantised(w.reshape(128, 10), how)
    kernel = quantised(w, how, layout(w.shape, (), (0, 1), (2,)))
    np.testing.assert_array_equal(kernel.dense().reshape(128, 10), flat.dense())
    turned = jnp.transpose(w, (2, 0, 1))
    other = quantised(turned, how, layout(turned.shape, (), (1, 2), (0,)))
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(other), jax.tree.leaves(flat))
    np.testing.assert_array_equal(other.dense(), jnp.transpose(kernel.dense(), (2, 0, 1)))


def test_a_stack_axis_that_is_not_the_first() -> None:
    """A stack axis after the first is stored as an output, with the same values."""
    w = normal(64, 3, 5)
    inner = quantised(w, SCHEMES["int8"], layout(w.shape, (1,), (0,), (2,)))
    first = quantised(w.swapaxes(0, 1), SCHEMES["int8"], layout((3, 64, 5), (0,), (1,), (2,)))
    np.testing.assert_array_equal(inner.dense(), first.dense().swapaxes(0, 1))


@every_scheme
def test_zeros_stay_zeros(how: dict[str, Any]) -> None:
    w = normal(128, 4).at[:, 1].set(0)
    dense = quantised(w, how).dense()
    assert jnp.isfinite(dense).all()
    # In the other schemes, 0 is off by the error of a scale.
    if not how.get("double") and how.get("block") != 4096:
        np.testing.assert_array_equal(dense[:, 1], 0)


@every_scheme
def test_a_base_is_a_pytree_of_anything(how: dict[str, Any]) -> None:
    w = normal(3, 128, 6)
    base = quantised(w, how, layout(w.shape, (0,), (1,), (2,)))
    placed = jax.tree.map(lambda x: PartitionSpec(), base)
    assert jax.tree.structure(placed) == jax.tree.structure(base)
    shapes = jax.eval_shape(lambda base: base, base)
    assert shapes.shape == w.shape and jax.eval_shape(lambda b: b.dense(), base).shape == w.shape
    planned = jax.eval_shape(
        lambda w: quantised(w, how, layout(w.shape, (0,), (1,), (2,))),
        jax.ShapeDtypeStruct(w.shape, w.dtype),
    )
    assert bytes_of(planned) == bytes_of(base)


def test_bytes() -> None:
    """Weights take QLoRA's bytes: 4.5 bits each, or 4.127 with double quantisation."""
    w = {"w": normal(1024, 512)}
    size = 1024 * 512
    assert bytes_of(w) == 4 * size
    assert bytes_of(lora_jax.quantize(w, "int4", "w")) == 4.5 / 8 * size
    assert bytes_of(lora_jax.quantize(w, "nf4", "w")) == 4.5 / 8 * size
    double = bytes_of(lora_jax.quantize(w, "nf4", "w", double=True)) - 4 * 257
    assert double == (4 + 8 / 64 + 32 / (64 * 256)) / 8 * size
    assert bytes_of(lora_jax.quantize(w, "int8", "w")) == size + 4 * 512
    compiled = jax.jit(lambda q: q["w"].dense().sum()).lower(lora_jax.quantize(w, "int4", "w"))
    assert compiled.compile().memory_analysis().argument_size_in_bytes == 4.5 / 8 * size


def test_dequantize_keeps_all_else() -> None:
    params = {"w": normal(64, 4), "b": jnp.ones(4), "ids": jnp.arange(3), "none": None}
    back = lora_jax.dequantize(lora_jax.quantize(params, "int8", "w"))
    assert back["b"] is params["b"] and back["ids"] is params["ids"] and back["none"] is None
    np.testing.assert_allclose(back["w"], params["w"], atol=0.02)


PARAMS = {
    "w": normal(96, 4),
    "bank": normal(2, 64, 4),
    "codes": jnp.ones((64, 4), jnp.int8),
    "b": jnp.ones(4),
    "done": lora_jax.quantize({"w": normal(64, 4)}, "int8", "w")["w"],
}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("nf3", "w", {}), "no scheme 'nf3'; nearest: 'nf4'"),
        (("int8", "w", {"double": True}), "'int8' keeps its own"),
        (("nf4", "v", {}), "'v' matches no parameter"),
        (("nf4", "bank", {}), r"'bank' has shape \(2, 64, 4\).*Pass a layout"),
        (("nf4", "b", {}), r"'b' has shape \(4,\)"),
        (("nf4", "codes", {}), "'codes' has dtype int8"),
        (("nf4", "done", {}), r"'done' is quantised already \(ScaledCodes\)"),
        (("nf4", "w", {"block": 48}), "no blocks of 48 numbers; a block has 32, 64, 128"),
        (("nf4", "w", {"block": "channel"}), "'nf4' has no block='channel'"),
        (("int4", "w", {}), "groups of 64 numbers do not divide its 96 inputs; .* 48"),
        (("int8", "w", {"block": 0}), "groups of 0 numbers"),
    ],
)
def test_errors(arguments: tuple[str, str, dict[str, Any]], says: str) -> None:
    scheme, targets, how = arguments
    with pytest.raises(LoraError, match=says):
        lora_jax.quantize(PARAMS, scheme, targets, **how)


def test_the_layout_must_fit() -> None:
    with pytest.raises(LoraError, match="has shape"):
        lora_jax.quantize(PARAMS, "nf4", layout((64, 4), (), (0,), (1,)))
