"""Plans by the compilers of TPUs and GPUs. Only the tests that compile need their wheels."""

from __future__ import annotations

import dataclasses
import types
from typing import Any

import numpy as np
import pytest

from lora_jax.cli import train as command_line
from lora_jax.planner import collectives, hlo, plan, plan_report, program, real_compiler
from lora_jax.planner.options import PlanOptions
from lora_jax.system.devices import DEVICES
from lora_jax.training import mesh
from lora_jax.training.config import ConfigError, MeshConfig
from tests.training.runs import OWN, ROOT

REFUSAL = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory \
space hbm. Used 63.80G of 30.75G hbm. Exceeded hbm capacity by 33.05G.

Program hbm requirement 63.80G:
    HLO temp         63.79G (100.0% utilization: Unpadded (63.58G) Padded (63.58G))

  Largest program allocations in hbm:

  1. Size: 2.00G
     Operator: op_name="jit(step)/jvp(Model)/h/0/attention/dot_general" \
source_file="/home/me/model.py" source_line=1059
     Shape: f32[32,4096,4096]{1,2,0:T(8,128)}
     Unpadded size: 2.00G
     XLA label: fusion.1265 = fusion(custom-call.224), kind=kOutput
     Allocation type: HLO temp
     ==========================

  2. Size: 512.00M
     Shape: bf16[64,4096]{1,0}
     Unpadded size: 512.00M
     ==========================
"""


def test_a_refusal_of_libtpu_is_read() -> None:
    """Its list of allocations becomes buffers with the lines of the model."""
    found = program.refusal(REFUSAL, "libtpu")
    assert found is not None
    assert found.refused
    assert (found.needs, found.limit) == (round(63.8 * 2**30), round(30.75 * 2**30))
    first, second = found.buffers
    assert (first.bytes, first.shape) == (2 * 2**30, "f32[32,4096,4096]")
    assert (first.line, second.line) == ("/home/me/model.py:1059", "")
    assert (second.bytes, second.shape) == (2**29, "bf16[64,4096]")
    assert program.refusal("INVALID_ARGUMENT: no such thing", "libtpu") is None


def test_every_device_has_a_compiler() -> None:
    for device, known in DEVICES.items():
        if known.is_gpu:
            grid, text = real_compiler.gpu_topology(device, 16)
            assert grid == "2x1x8"
            assert f"device_memory_size: {known.memory}" in text
        else:
            assert real_compiler.tpu_topology(device, 2 * 16, 2)[1]["num_slices"] == 2


@pytest.mark.parametrize(
    ("device", "count", "slices"), [("tpu-v5e", 512, 1), ("tpu-v7x", 3, 1), ("tpu-v6e", 9, 2)]
)
def test_devices_that_no_slice_has(device: str, count: int, slices: int) -> None:
    with pytest.raises(ConfigError, match=r"set --plan-slices to \d"):
        real_compiler.tpu_topology(device, count, slices)


def test_slices_are_of_tpus() -> None:
    with pytest.raises(ConfigError, match="plan_slices must be 1 for GPUs"):
        PlanOptions(plan_slices=2)


TPU_HLO = """HloModule jit_f, num_partitions=8

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = f32[8]{0:T(128)} get-tuple-element(%p), index=1
  %start = f32[64]{0:T(128)} all-gather(%x), channel_id=3, replica_groups=[1,8]<=[8], \
frontend_attributes={chain_id="0"}, metadata={op_name="jit(f)/jvp(f)/dot_general"}
  %done = f32[64]{0:T(128)} all-gather(%x), channel_id=3, replica_groups=[1,8]<=[8], \
frontend_attributes={chain_id="0"}, metadata={op_name="jit(f)/jvp(f)/dot_general"}
  %other = f32[64]{0:T(128)} all-gather(%x), channel_id=4, replica_groups=[1,8]<=[8]
  ROOT %t = (s32[]{:T(128)}, f32[8]{0:T(128)}) tuple(%i, %x)
}

%condition (q: (s32[], f32[8])) -> pred[] {
  %q = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  %n = s32[]{:T(128)} constant(5)
  %j = s32[]{:T(128)} get-tuple-element(%q), index=0
  ROOT %less = pred[]{:T(512)} compare(%j, %n), direction=LT
}

ENTRY %main (a: (s32[], f32[8])) -> (s32[], f32[8]) {
  %a = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  %k = f32[8]{0:T(128)} custom-call(%a), custom_call_target="tpu_custom_call"
  ROOT %w = (s32[]{:T(128)}, f32[8]{0:T(128)}) while(%a), condition=%condition, body=%body
}
"""


def test_a_collective_of_libtpu_in_pieces_counts_once_in_each_iteration() -> None:
    """A loop of libtpu has its number of iterations in its condition only."""
    module = hlo.parse(TPU_HLO)
    assert module.times["body"] == 5
    assert module.unknown_loops == []
    found = collectives.collectives(module)
    assert [(c.times, c.asynchronous) for c in found] == [(5, True), (5, False)]
    assert program.kernels(module) == {"tpu_custom_call": 1}


def test_largest_values_name_the_line_of_the_model() -> None:
    """Lines of installed libraries are looked through."""
    text = """HloModule jit_f
FileNames
1 "/home/me/model.py"
2 "/lib/site-packages/flax/linear.py"

FunctionNames
1 "f"

FileLocations
1 {file_name_id=1 function_name_id=1 line=7 end_line=7 column=1 end_column=2}
2 {file_name_id=2 function_name_id=1 line=99 end_line=99 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}

ENTRY %main (a: f32[8]) -> f32[64,8] {
  %a = f32[8]{0} parameter(0)
  ROOT %b = f32[64,8]{1,0} broadcast(%a), metadata={op_name="f/broadcast" stack_frame_id=2}
}
"""
    (found,) = hlo.largest(hlo.parse(text), text)
    assert dataclasses.astuple(found) == (2048, "f32[64,8]", "f/broadcast", "/home/me/model.py:7")


def test_a_mesh_of_several_slices_has_the_slices_on_its_first_axis() -> None:
    """Neighbours on the other axes are in one slice."""

    def device(number: int) -> Any:
        return types.SimpleNamespace(
            id=number, slice_index=number % 2, process_index=0, platform="cpu", device_kind="cpu"
        )

    grid = mesh.hybrid((4, 2, 1), 2, [device(n) for n in range(8)])
    slices = np.vectorize(lambda d: d.slice_index)(grid)
    assert slices.reshape(2, 4).tolist() == [[0] * 4, [1] * 4]
    with pytest.raises(ConfigError, match="divisible by the 2 slices"):
        mesh.hybrid((3, 1, 1), 2, [])


# ---- with the wheels


@pytest.mark.parametrize(("device", "count"), [("tpu-v5e", 8), ("h100-80gb", 8)])
def test_a_plan_by_the_compiler_of_the_device(device: str, count: int) -> None:
    if lacking := real_compiler.missing(device):
        pytest.skip(lacking)
    given = [f"--plan-device={device}", f"--plan-devices={count}", "--plan-compiler=real"]
    name, config, options = command_line.parse(["--config", OWN, *given], OWN, ROOT)
    config = dataclasses.replace(config, mesh=MeshConfig(data=-1, fsdp=2))  # type: ignore[type-var]
    made = plan.make(name, config, options)  # type: ignore[arg-type]
    found = made.runs["lora"].program
    assert found is not None
    assert found.needs >= found.arguments > 0
    assert found.aliased > 0
    assert made.fits("lora")
    assert {c.kind for c in made.runs["lora"].arrays} >= {"all-reduce"}
    assert plan_report.text(made).startswith(f"Compiled by {made.compiler}\n")
    assert plan_report.to_json(made)["runs"]["lora"]["program"]["needs"] == found.needs
