"""NF4, compared with the bytes of bitsandbytes and with a second implementation."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax.bases import dynamic, nf4
from tests import npz

STORED = npz.read(pathlib.Path(__file__).parent / "data" / "bitsandbytes.npz")
CASES = sorted({name.partition("/")[0] for name in STORED} - {"made_with", "int8"})


def stored(case: str) -> dict[str, np.ndarray]:
    start = f"{case}/"
    return {n.removeprefix(start): STORED[n] for n in STORED if n.startswith(start)}


def quantised(case: str) -> tuple[nf4.FourBit, dict[str, np.ndarray], dict]:
    """Return our base for the fixture's W, which torch stores as [out, in], and the file's data."""
    want = stored(case)
    state = json.loads(want["bitsandbytes__nf4"].tobytes())
    w = jnp.asarray(want["w"]).astype(state["dtype"]).T
    double = "nested_absmax" in want
    params = lora_jax.quantize({"w": w}, "nf4", "w", block=state["blocksize"], double=double)
    return params["w"], want, state


@pytest.mark.parametrize("case", CASES)
def test_bytes_of_bitsandbytes(case: str) -> None:
    base, want, state = quantised(case)
    np.testing.assert_array_equal(np.ravel(base.codes), want["weight"].ravel())
    scales = base.scales
    if isinstance(scales, dynamic.Dynamic):
        np.testing.assert_array_equal(scales.table, want["nested_quant_map"])
        np.testing.assert_array_equal(scales.scales, want["nested_absmax"])
        assert float(scales.offset) == state["nested_offset"]
        np.testing.assert_array_equal(np.ravel(scales.codes), want["absmax"])
    else:
        np.testing.assert_array_equal(np.ravel(scales), want["absmax"])


@pytest.mark.few(4)
@pytest.mark.parametrize("case", CASES)
def test_dense_is_what_bitsandbytes_dequantises(case: str) -> None:
    base, want, state = quantised(case)
    dense = base.dense()
    assert dense.dtype == state["dtype"] and dense.shape == want["w"].T.shape
    dense = np.asarray(dense.astype(jnp.float32)).T
    if "nested_absmax" in want:  # a sum of two rounded terms, which XLA rounds once
        np.testing.assert_allclose(dense, want["dense"], rtol=2**-7, atol=1e-7)
        assert np.mean(dense != want["dense"]) < 1e-3
    else:
        np.testing.assert_array_equal(dense, want["dense"])


def test_the_table_is_that_of_bitsandbytes() -> None:
    np.testing.assert_array_equal(np.array(nf4.NF4, np.float32), STORED["plain/quant_map"])


def second(w: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales as specified: the nearest value, for one number after the other."""
    values = np.array(nf4.NF4, np.float32)
    flat = w.astype(np.float32).ravel()
    codes, scales = [], []
    for start in range(0, flat.size, block):
        numbers = flat[start : start + block]
        absmax = np.abs(numbers).max()
        scales.append(absmax)
        for x in numbers:
            normal = np.float32(x * np.float32(np.float32(1) / absmax)) if absmax else 0.0
            codes.append(int(np.argmin(np.abs(values.astype(np.float64) - np.float64(normal)))))
    codes += [0] * (len(codes) % 2)
    packed = [high << 4 | low for high, low in zip(codes[::2], codes[1::2], strict=True)]
    return np.array(packed, np.uint8), np.array(scales, np.float32)


@pytest.mark.parametrize("shape", [(3, 64), (7, 48), (1, 33), (33, 1), (5, 5), (2, 100)])
def test_second_implementation(shape: tuple[int, int]) -> None:
    w = np.random.default_rng(shape[0]).standard_normal(shape).astype(np.float32)
    w[0, 0] = 0
    base = lora_jax.quantize({"w": jnp.asarray(w.T)}, "nf4", "w", block=32)["w"]
    codes, scales = second(w, 32)
    mine = np.array(base.codes).ravel()
    if w.size % 2:  # the half byte of padding: bitsandbytes pads before it looks up the code of 0
        mine[-1] &= 0xF0
    np.testing.assert_array_equal(mine, codes)
    np.testing.assert_array_equal(np.ravel(base.scales), scales)


def test_double_quantisation_of_a_stack_is_that_of_each_layer() -> None:
    w = jax.random.normal(jax.random.key(0), (3, 2, 320, 24)) * jnp.arange(1.0, 7).reshape(
        3, 2, 1, 1
    )
    target = lora_jax.Target("w", w.shape, (0, 1), (2,), (3,), 1, 1.0)
    whole = lora_jax.quantize({"w": w}, "nf4", lora_jax.Layout((target,)), double=True)["w"]
    alone = lora_jax.quantize({"w": w[2, 1]}, "nf4", "w", double=True)["w"]
    one = jax.tree.map(lambda x: x[2, 1], whole)
    jax.tree.map(np.testing.assert_array_equal, one, alone)
    np.testing.assert_array_equal(whole.dense()[2, 1], one.dense())
    assert whole.codes.shape == (3, 2, 24, 160) and whole.scales.offset.shape == (3, 2)


def test_blocks_that_divide_the_inputs_are_rows() -> None:
    """Blocks that divide the inputs have one row for each output, so that rows can be sharded."""
    w = jax.random.normal(jax.random.key(0), (128, 6))
    rows = lora_jax.quantize({"w": w}, "nf4", "w", block=64)["w"]
    run_on = lora_jax.quantize({"w": w}, "nf4", "w", block=256)["w"]
    assert rows.codes.shape == (6, 64) and rows.scales.shape == (6, 2)
    assert run_on.codes.shape == (1, 384) and run_on.scales.shape == (1, 3)


def test_a_scale_between_two_codes_takes_the_lower() -> None:
    """A scale halfway between two codes takes the lower code."""
    table = dynamic.dynamic_map()
    middles = (table[140:200] + table[141:201]) * np.float32(0.5)
    scales = np.concatenate([middles, -middles, [1, -1]]).astype(np.float32)
    found = dynamic.quantise(jnp.asarray(scales)[None])
    assert found.offset == 0 and found.scales == 1
    below = np.searchsorted(table, scales, side="left") - 1  # the entry under each middle
    np.testing.assert_array_equal(found.codes[0, :-2], below[:-2])


def test_a_tpu_looks_scales_up_without_a_gather() -> None:
    """Its sum of selected entries has the same bits as the lookup, for every code of each table."""
    tables = jnp.asarray([dynamic.dynamic_map(), np.linspace(-3, 2, 256, dtype=np.float32)])
    codes = jax.random.permutation(jax.random.key(1), jnp.arange(512).reshape(2, 256) % 256, axis=1)
    codes = codes.astype(jnp.uint8)
    want = np.take_along_axis(np.asarray(tables), np.asarray(codes, np.int32), axis=1)
    np.testing.assert_array_equal(dynamic.selected(tables, codes), want)
    scales = dynamic.Dynamic(codes[:, None], jnp.ones((2, 1)), jnp.zeros(2), tables)
    traced = jax.jit(dynamic.Dynamic.dense).trace(scales)
    programs = {p: traced.lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "tpu")}
    assert "gather" in programs["cpu"] and "gather" not in programs["tpu"]
