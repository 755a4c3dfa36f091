"""The law over bases and kinds of update: `adapt` on codes equals the merged, dequantised weights.

Every program meets NF4 with the kind that asks most of a rule: DoRA, whose gain may not be lost on
the way. A rule multiplies with W in one place, with a gain or without, so LoRA over NF4 is for the
programs that refuse a gain and for a few. The other bases differ from NF4 in `dense()` alone, and
the other kinds are lowered to plain factors: a few programs do for them. LoRA over floats is
tests/test_transform.py.
"""

from __future__ import annotations

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
OTHERS = [
    *(("lora", scheme) for scheme in ("nf4", "int8", "int4", "fp8")),
    *((kind, None) for kind in ("dora", "vera", "loha", "lokr")),
]
REFUSED = {  # a gain of each output cannot follow W there
    "bare_einsum_summed_letter",  # a sum over some outputs
    "bare_concatenated_inputs",  # an output of members with different gains
    "bare_padded",  # an output of W and of constants
}
TABLE = [
    *((name, "lora", "nf4") for name in sorted(REFUSED)),
    *((name, "dora", "nf4") for name in sorted(cases.REGISTRY) if name not in REFUSED),
    *((name, *other) for name in FEW for other in OTHERS if name in cases.REGISTRY),
]


@pytest.mark.parametrize(("name", "kind", "scheme"), TABLE)
def test_the_law(name: str, kind: str, scheme: str | None) -> None:
    """Red: a rule that moves W and forgets the gain, or the codes; a gain on the wrong axes."""
    law = Law(cases.REGISTRY[name](), kind, scheme)
    for got, want in zip(law.got, law.want, strict=True):
        assert_near(got, want)


def assert_near(got: Any, want: Any) -> None:
    """Equal within 2e-5 of the largest entry of all arrays.

    (Not of each: the gradient of a saturated attention is a small difference of large numbers, in
    which the definition itself is 3.5e-5 away from float64.)
    """
    got, want = jax.device_get((got, want))
    largest = max((float(np.abs(x).max()) for x in jax.tree.leaves(want)), default=0.0)
    chex.assert_trees_all_close(got, want, rtol=0, atol=2e-5 * largest)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_gain_that_cannot_follow_is_refused(name: str) -> None:
    """Red: an output summed over as if each had the same gain."""
    with pytest.raises(lora_jax.LoraError, match="no low-rank rule"):
        _ = Law(cases.REGISTRY[name](), "dora").got


@pytest.mark.parametrize("name", FEW)
def test_a_quantised_base_without_adapters(name: str) -> None:
    """Red: a quantised weight that only an adapted one lets in."""
    case = cases.REGISTRY[name]()
    layout = lora_jax.resolve(
        lora_jax.LoraSpec(2, targets=case.targets), case.f, case.params, *case.args, **case.kwargs
    )
    q = lora_jax.quantize(case.params, "int8", layout)
    g = lora_jax.adapt(lora_jax.Layout(), case.f)
    got = jax.jit(lambda q, *args: g(q, {}, *args, **case.kwargs))(q, *case.args)
    want = case.f(lora_jax.dequantize(q), *case.args, **case.kwargs)
    assert_near(got, want)
