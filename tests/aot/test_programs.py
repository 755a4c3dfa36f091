"""Programs of small steps by the compilers of a TPU and of a GPU, which need neither.

Each test is skipped where the compiler is not installed (`lora-jax[plan-tpu,plan-cuda]`).
"""

from __future__ import annotations

import pytest

from lora_jax.planner import real_compiler
from measuring import compiled_steps
from measuring.compiled_steps import LAYERS, Case, Compiled

pytestmark = [pytest.mark.slow, pytest.mark.standard_promotion]  # optax
DEVICES = ("tpu-v5e", "h100-80gb")
FSDP, MIXED_MESH, DATA = (1, 4, 1), (1, 2, 2), (4, 1, 1)  # data, fsdp, tensor
QUANTISED = ("int8", "nf4")

# Table of programs; all of them are compiled for a TPU and for a GPU.
CASES = [
    *(Case("", base=base, kind=kind) for base in ("bfloat16", "nf4") for kind in ("lora", "dora")),
    *(Case("", base=base, sizes=FSDP) for base in ("bfloat16", *QUANTISED)),
    *(Case("", base=base, sizes=MIXED_MESH) for base in ("bfloat16", *QUANTISED)),
    Case("", sizes=DATA),
    Case("", "mixed", adapters=8),
    Case("", "mixed", adapters=64),
    Case("", "decode", adapters=8),
    Case("", "decode", adapters=64),
    Case("", "sweep", adapters=8),
    Case("", "experts", sizes=FSDP),
]
every = pytest.mark.parametrize(
    "case", [case._replace(device=device) for device in DEVICES for case in CASES], ids=str
)


def compiled(case: Case) -> Compiled:
    if said := real_compiler.missing(case.device):
        pytest.skip(said)
    return compiled_steps.compiled(case)


@every
def test_no_stack_of_floats_and_nothing_on_the_host(case: Case) -> None:
    """No float array has the shape of all layers' weights, no bfloat16 base is widened, no GPU
    copies the codes of all layers."""
    found = compiled(case)
    assert not found.floats_of_a_stack(case)
    assert case.device == "tpu-v5e" or not found.copies_of_codes(case)
    assert not found.on_the_host
    assert "nvoluntary full rematerialization" not in found.log


@every
def test_trained_state_is_donated(case: Case) -> None:
    found = compiled(case)
    assert found.program.aliased >= found.state


@every
def test_gpus_gather_codes_and_not_floats(case: Case) -> None:
    gathers = [c for c in compiled(case).arrays if c.kind == "all-gather" and c.of == "base"]
    floats = [c for c in gathers if c.operand.dtype in ("bf16", "f32")]
    on_gpu = case.device == "h100-80gb"
    if on_gpu and case.base in QUANTISED and case.sizes[1] > 1:
        assert gathers
        # Scales of int8 are floats, and XLA gives some factors the name of the base's product.
        assert all(c.result.size <= case.rank * compiled_steps.WIDTH for c in floats)


@every
def test_a_tpu_gathers_no_single_numbers(case: Case) -> None:
    if case.device == "tpu-v5e":
        assert compiled(case).scalar_gathers == 0


@pytest.mark.parametrize("device", DEVICES)
def test_data_parallelism_adds_only_the_sum_of_gradients(device: str) -> None:
    arrays = compiled(Case(device, sizes=DATA)).arrays
    assert {(c.kind, c.of) for c in arrays} == {("all-reduce", "adapters")}
    assert sum(c.times for c in arrays) <= 4 * LAYERS  # a and b of two weights
