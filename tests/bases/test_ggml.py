"""The blocks of GGUF files, compared with the gguf package on random bytes of every kind."""

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax.bases.ggml import FORMATS, GgmlBlocks

OUT, IN = 6, 512


def blocks(kind: str, seed: int = 0) -> np.ndarray:
    """Random blocks [out, blocks]: any bytes, except 16-bit floats, which have ordinary sizes."""
    rng = np.random.default_rng(seed)
    form = FORMATS[kind]
    raw = rng.integers(0, 256, (OUT, IN // form.size * form.record.itemsize), np.uint8)
    records = raw.view(form.record)
    for name in ("d", "m", "dmin"):
        if name in form.record.names:
            records[name] = rng.standard_normal(records.shape)
    return records


def base(records: np.ndarray, kind: str, dtype: str = "float32") -> GgmlBlocks:
    fields = {name: jnp.asarray(records[name]) for name in records.dtype.names}
    return GgmlBlocks((OUT, IN), (1, 0), dtype, fields, kind)


def expanded(records: np.ndarray, kind: str) -> np.ndarray:
    raw = np.ascontiguousarray(records).view(np.uint8).reshape(OUT, -1)
    return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])


@pytest.mark.parametrize("kind", FORMATS)
def test_dense_is_what_the_gguf_package_expands(kind: str) -> None:
    records = blocks(kind)
    want = expanded(records, kind)
    w = base(records, kind)
    assert w.shape == (IN, OUT) and w.lead == ()
    np.testing.assert_array_equal(w.dense().T, want)  # each operation rounds for itself
    fused = jax.jit(lambda w: w.dense())(w).T  # a product and a sum may be rounded once
    np.testing.assert_allclose(fused, want, rtol=1e-6, atol=1e-6 * np.abs(want).max())


@pytest.mark.parametrize("kind", FORMATS)
def test_a_record_is_as_long_as_a_block_of_the_file(kind: str) -> None:
    size, length = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    assert (FORMATS[kind].size, FORMATS[kind].record.itemsize) == (size, length)


@pytest.mark.few(2)
@pytest.mark.parametrize("kind", FORMATS)
def test_a_stack_is_its_layers(kind: str) -> None:
    layers = [base(blocks(kind, seed), kind, "bfloat16") for seed in range(3)]
    stack = jax.tree.map(lambda *xs: jnp.stack(xs), *layers)
    assert stack.shape == (3, IN, OUT) and stack.dtype == jnp.bfloat16
    scanned = jax.lax.scan(lambda _, w: (None, w.dense()), None, stack)[1]
    for i, layer in enumerate(layers):
        np.testing.assert_array_equal(stack.dense()[i], layer.dense())
        np.testing.assert_allclose(
            scanned[i].astype(jnp.float32), layer.dense().astype(jnp.float32), rtol=2**-7, atol=1e-6
        )


def test_it_can_be_dequantised_and_quantised_anew() -> None:
    w = base(blocks("Q4_K"), "Q4_K")
    params = lora_jax.dequantize({"w": w, "b": jnp.ones(2)})
    assert params["w"].shape == (IN, OUT)
    with pytest.raises(lora_jax.LoraError, match=r"quantised already \(GgmlBlocks\)"):
        lora_jax.quantize({"w": w}, "nf4", "w")
    lora_jax.quantize(params, "nf4", "w")
