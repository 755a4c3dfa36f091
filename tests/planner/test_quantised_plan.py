"""The plan of a run on a quantised base: the bytes of each scheme and of each kind of update."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from typing import Any

import pytest

import train
from configs import llama3_70b
from lora_jax.planner import measure, plan, plan_report
from lora_jax.planner.options import PlanOptions
from lora_jax.planner.weights import by_part
from lora_jax.system.devices import DEVICES
from lora_jax.training.config import MeshConfig
from tests.training.runs import ROOT

pytestmark = pytest.mark.slow

CONFIG = str(ROOT / "configs/llama3_70b.py")
L, D, MLP, KV, V, ROWS, LENGTH, RANK = 2, 512, 1024, 256, 256, 8, 16, 16
LAYER = {(D, D): 2, (D, KV): 2, (D, MLP): 2, (MLP, D): 1}  # (in, out) -> how many
NUMBERS = L * sum(i * o * n for (i, o), n in LAYER.items())  # the quantised ones
OUTPUTS = L * sum(o * n for (_, o), n in LAYER.items())
FLOATS = 2 * (2 * V * D + (2 * L + 1) * D)  # embedding, head and norms in bfloat16
SIZES = {"data": 1, "fsdp": 2, "tensor": 2}


@functools.cache
def costs(quantize: str, double: bool = False, kind: str = "lora") -> measure.StepCosts:
    changes: dict[str, Any] = {
        "layers": L, "hidden": D, "mlp": MLP, "kv_heads": 2, "vocabulary": V, "rows": ROWS,
        "length": LENGTH, "loss_chunk": LENGTH, "quantize": quantize, "double_quantize": double,
        "accumulate": 1, "mesh": MeshConfig(),
    }  # fmt: skip
    config = dataclasses.replace(llama3_70b.config, **changes)
    config = dataclasses.replace(config, lora=dataclasses.replace(config.lora, kind=kind))
    simulated = PlanOptions(plan_compiler="simulated")
    return plan._costs(config, config.workload(config), simulated, [SIZES], SIZES)


BITS = {"nf4": 4, "int4": 4, "int8": 8, "fp8": 8}


@pytest.mark.parametrize("scheme", ["nf4", "int4", "fp8"])
def test_codes_and_scales_of_each_scheme(scheme: str) -> None:
    """Each of four devices holds a fourth of the codes, and scales for its part."""
    parts = by_part(costs(scheme).weights)
    assert parts["codes"] == NUMBERS * BITS[scheme] // 8 // 4
    blocks = NUMBERS // 64 // 4 if BITS[scheme] == 4 else OUTPUTS // 2  # one for each output
    assert parts["scales"] == 4 * blocks
    assert costs(scheme).bytes.weights == sum(parts.values())
    assert costs(scheme).parameters == costs("none").parameters


def test_scales_in_8_bits() -> None:
    """Scales in 8 bits are a byte for each block. Their own scales, a mean and a table for each
    layer are on every device."""
    parts, products = by_part(costs("nf4", True).weights), sum(LAYER.values())
    own = NUMBERS // 64 // 256 * 4 + L * products * 4 * (1 + 256)
    assert parts["scales"] == NUMBERS // 64 // 4 + own
    assert parts["codes"] == by_part(costs("nf4").weights)["codes"]


def test_what_stays_in_floats() -> None:
    """Embedding and head are divided by four, and norms are whole."""
    norms = 2 * (2 * L + 1) * D
    assert by_part(costs("nf4").weights)["floats"] == (FLOATS - norms) // 4 + norms
    weights = {w.path: w for w in costs("nf4").weights}
    assert weights["lm_head/kernel"].kind == "floats"
    assert weights["layers/mlp/down/kernel"].shape == (L, MLP, D)
    assert set(weights["layers/mlp/down/kernel"].parts) == {"codes", "scales"}


def test_the_products_are_those_of_the_floats() -> None:
    """Codes are looked up and not multiplied, so the FLOPs equal the float base's."""
    assert costs("nf4").flops == pytest.approx(costs("none").flops, rel=1e-3)


def test_no_float_copy_of_the_stack_is_planned() -> None:
    """One layer's floats may exist for a while, but not all layers'."""
    assert costs("nf4").bytes.activations == pytest.approx(costs("none").bytes.activations, rel=0.1)


def test_a_magnitude_for_each_output_and_the_product_of_its_norm() -> None:
    lora, dora = costs("nf4"), costs("nf4", kind="dora")
    assert dora.adapter_parameters - lora.adapter_parameters == OUTPUTS
    assert dora.bytes.adapters - lora.bytes.adapters == 4 * OUTPUTS // 2  # `tensor` divides them
    assert dora.flops_adapters - lora.flops_adapters >= 2 * NUMBERS * RANK // 4


def test_the_plan_says_what_the_weights_are(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "plan.json"
    small = ("--layers=1", "--hidden=256", "--mlp=256", "--kv-heads=2", "--vocabulary=64")
    rows = ("--rows=2", "--length=8", "--loss-chunk=8", "--accumulate=1", "--plan-devices=1")
    arguments = [
        "--config",
        CONFIG,
        "--plan",
        "--plan-compiler=simulated",
        f"--plan-file={file}",
        *small,
        *rows,
    ]
    assert train.main(arguments) == 0
    found = json.loads(file.read_text())["runs"]
    kept = {w["path"]: w for w in found["lora"]["weights"]}
    assert kept["layers/attention/q/kernel"]["parts"]["codes"] == 256 * 256 // 2
    assert {w["kind"] for w in found["full"]["weights"]} == {"floats"}


@pytest.mark.parametrize(("devices", "weights"), [(1, 39.52e9), (8, 4.96e9)])
def test_llama_3_70b(devices: int, weights: float, capsys: Any) -> None:
    """The plan has the figures of docs/plan.md."""
    config = dataclasses.replace(llama3_70b.config, accumulate=8 // devices)
    sizes, device = {"data": 1, "fsdp": devices, "tensor": 1}, DEVICES["h100-80gb"]
    simulated = PlanOptions(plan_compiler="simulated")
    found = plan._costs(config, config.workload(config), simulated, [sizes], sizes)
    assert found.adapter_parameters == 207_093_760  # as PEFT counts them
    assert found.bytes.weights == pytest.approx(weights, rel=1e-3)
    assert found.bytes.total < device.memory


def test_65b_fits_one_device_of_48_gb() -> None:
    """LLaMA 65B, here with 2,048 tokens at a time, fits as QLoRA claims (arXiv 2305.14314)."""
    changes = {"mlp": 22_016, "kv_heads": 64, "vocabulary": 32_000}
    config = dataclasses.replace(llama3_70b.config, **changes)
    sizes, device = {"data": 1, "fsdp": 1, "tensor": 1}, DEVICES["l40s-48gb"]
    simulated = PlanOptions(plan_compiler="simulated")
    found = plan._costs(config, config.workload(config), simulated, [sizes], sizes)
    assert found.parameters == pytest.approx(65.2e9, rel=0.01)
    assert found.bytes.total < device.memory
    assert plan_report.in_units(found.bytes.weights) == "34.46 GB"
