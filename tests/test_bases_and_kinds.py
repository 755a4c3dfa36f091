"""The law over bases and kinds of update: `adapt` on codes equals the merged, dequantised weights.

Every program runs over NF4 with DoRA, the kind that asks most of a rule, because the gain must not
be lost on the way; one program for each rule is quick, and the others are slow. Every program that
a rotation can follow runs over NF4 with OFT too. A rule multiplies with W in one place, with a gain
or without, so LoRA over NF4 runs only on the programs that refuse a gain and on a few others. The
other bases differ from NF4 only in `dense()`, and the other kinds become plain factors or gains, so
a few programs are enough for them. LoRA over floats is tested in tests/test_transform.py.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import chex
import jax
import numpy as np
import pytest

import lora_jax
from tests import cases
from tests.test_transform import Law

pytestmark = pytest.mark.standard_promotion  # Flax and jnp inside the models promote

FEW = ["bare_matmul", "bare_ragged_dot", "bare_scan", "bare_transposed_left"]
FEW += ["linen_conv_2d_strided"]
QUICK = {*FEW, *cases.ONE_OF_EACH}
OTHERS = [
    *(("lora", scheme) for scheme in ("nf4", "int8", "int4", "fp8")),
    *((kind, None) for kind in ("dora", "vera", "loha", "lokr")),
]
REFUSED = {  # a gain of each output cannot follow W in these
    "bare_einsum_summed_letter",  # it sums over some outputs
    "bare_concatenated_inputs",  # an output comes from members with different gains
    "bare_padded",  # an output comes from W and from constants
}
UNTURNED = {  # a rotation of the inputs cannot follow W in these, nor in any convolution or lookup
    *("bare_concatenated_inputs", "bare_concatenated_outputs", "bare_concatenated_stacks"),
    *("bare_padded", "bare_row_by_static_index", "bare_sliced_scaled_reversed", "bare_tiled"),
    *("bare_stacked_layers", "bare_stacked_outputs", "bare_depthwise_kernel_reshaped"),
    *("bare_vmap_over_an_index", "bare_vmap_over_tables", "bare_convolution_of_scaled_rows"),
    *(name for name in cases.REGISTRY if "_conv" in name or "_embed" in name),
    *(name for name in cases.REGISTRY if name.startswith("shard_map")),
}
TURNED = sorted({*FEW, "bare_used_both_ways", "linen_scan"} - UNTURNED)
TABLE = [
    *(
        pytest.param(name, "oft", "nf4", marks=() if name in TURNED else pytest.mark.slow)
        for name in sorted(cases.REGISTRY)
        if name not in UNTURNED
    ),
    *(("bare_used_both_ways", kind, "nf4") for kind in ("ia3", "ia3_inputs", "miss")),
    *((name, kind, None) for name in TURNED for kind in ("oft", "ia3", "ia3_inputs", "miss")),
    *((name, "lora", "nf4") for name in sorted(REFUSED)),
    *(
        pytest.param(name, "dora", "nf4", marks=() if name in QUICK else pytest.mark.slow)
        for name in sorted(cases.REGISTRY)
        if name not in REFUSED
    ),
    *((name, *other) for name in FEW for other in OTHERS if name in cases.REGISTRY),
]


@pytest.mark.few(28)
@pytest.mark.parametrize(("name", "kind", "scheme"), TABLE)
def test_the_law(name: str, kind: str, scheme: str | None) -> None:
    case = cases.REGISTRY[name]()
    law = Law(in_blocks(case) if kind == "oft" else case, kind, scheme)
    for got, want in zip(law.got, law.want, strict=True):
        assert_near(got, want)


def in_blocks(case: cases.Case) -> cases.Case:
    """Return the case with a rank for each target that divides its inputs."""
    spec = lora_jax.LoraSpec(1, targets=case.targets)
    layout = lora_jax.resolve(spec, case.f, case.params, *case.args, **case.kwargs)
    ranks = {t.path: next(n for n in range(2, 99) if t.fan_in % n == 0) for t in layout.targets}
    rules: Any = tuple(lora_jax.Rule(path, rank=rank) for path, rank in ranks.items())
    return dataclasses.replace(case, targets=rules)


@pytest.mark.few(3)
@pytest.mark.parametrize("name", sorted(UNTURNED))
def test_a_rotation_that_cannot_follow_is_refused(name: str) -> None:
    with pytest.raises(lora_jax.LoraError, match=r"no low-rank rule|Use another kind of update"):
        _ = Law(in_blocks(cases.REGISTRY[name]()), "oft").got


def assert_near(got: Any, want: Any) -> None:
    """Compare to 2e-5 of the largest entry of all arrays."""
    got, want = jax.device_get((got, want))
    largest = max((float(np.abs(x).max()) for x in jax.tree.leaves(want)), default=0.0)
    chex.assert_trees_all_close(got, want, rtol=0, atol=2e-5 * largest)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_gain_that_cannot_follow_is_refused(name: str) -> None:
    with pytest.raises(lora_jax.LoraError, match="no low-rank rule"):
        _ = Law(cases.REGISTRY[name](), "dora").got


@pytest.mark.parametrize("name", FEW)
def test_a_quantised_base_without_adapters(name: str) -> None:
    case = cases.REGISTRY[name]()
    layout = lora_jax.resolve(
        lora_jax.LoraSpec(2, targets=case.targets), case.f, case.params, *case.args, **case.kwargs
    )
    q = lora_jax.quantize(case.params, "int8", layout)
    g = lora_jax.adapt(lora_jax.Layout(), case.f)
    got = jax.jit(lambda q, *args: g(q, {}, *args, **case.kwargs))(q, *case.args)
    want = case.f(lora_jax.dequantize(q), *case.args, **case.kwargs)
    assert_near(got, want)
