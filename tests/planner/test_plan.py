"""A plan's numbers agree with the shardings, the shapes and the compiler."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

import train
from lora_jax.cli import train as command_line
from lora_jax.data.batches import Batches
from lora_jax.data.process_slice import Shard
from lora_jax.planner import (
    measure,
    plan,
    plan_report,
)
from lora_jax.planner.options import PlanOptions
from lora_jax.system.devices import DEVICES
from lora_jax.training import directory
from lora_jax.training.config import ConfigError
from tests.planner.test_hlo import grid
from tests.training import tiny
from tests.training.runs import OWN, ROOT

GPT = str(ROOT / "configs/gpt3_175b.py")
LAYERS, WIDTH, HEADS, VOCABULARY, LENGTH, ROWS = 3, 64, 4, 128, 16, 16
SMALL = {
    "layers": LAYERS,
    "width": WIDTH,
    "heads": HEADS,
    "vocabulary": VOCABULARY,
    "length": LENGTH,
    "batch-size": ROWS,
    "accumulate": 1,
}
H100 = DEVICES["h100-80gb"]


def planned(*arguments: str) -> plan.Plan:
    name, config, options = command_line.parse(
        ["--config", *arguments, "--plan-compiler=simulated"], OWN, ROOT
    )
    return plan.make(name, config, options)


SIZES = tuple(f"--{name}={size}" for name, size in SMALL.items())


@functools.cache
def gpt() -> plan.Plan:
    """Return the small model's plan on data 2 x fsdp 2 x tensor 2. Its loader raises, so that no
    weight is read."""
    return planned(GPT, *SIZES, "--mesh.fsdp=2", "--mesh.tensor=2", "--plan-devices=8")


def measured() -> measure.StepCosts:
    return gpt().runs["lora"]


# ---- the step


def test_bytes_of_weights_adapters_and_optimizer_are_the_hand_count() -> None:
    """The mesh is data 2 x fsdp 2 x tensor 2; weights are bfloat16, adapters float32; r = 4."""
    found = measured()
    d, f, v, t = WIDTH, 4 * WIDTH, VOCABULARY, LENGTH
    kernels = 4 * d * d + 2 * d * f  # of a layer
    cut, split, whole = 4, 2, 1
    weights = LAYERS * (
        kernels / cut + (3 * d + f) / split + (d + d + 2 * 2 * d) / whole  # biases, norms
    ) + (v * d / cut + t * d / cut + 2 * d)
    assert found.bytes.weights == 2 * weights
    adapters = LAYERS * 2 * (d * 4 / split + 4 * d / split)  # a over fsdp, b over tensor
    assert found.bytes.adapters == 4 * adapters
    counters = 8  # Adam's and the schedule's steps, int32
    assert found.bytes.optimizer == 2 * found.bytes.adapters + counters
    assert found.bytes.batch == 2 * 4 * ROWS * LENGTH / 4
    assert found.adapter_parameters == LAYERS * 2 * 2 * 4 * d
    assert found.checkpoint_trained == 4 * found.adapter_parameters


def test_activations_are_what_a_rematerialised_layer_keeps() -> None:
    """A layer keeps its bfloat16 input for the rows of one device; head and embedding keep more."""
    layers = LAYERS * (ROWS // 4) * LENGTH * WIDTH * 2
    head = (ROWS // 4) * LENGTH * (VOCABULARY // 2) * 4
    assert layers <= measured().bytes.activations <= layers + 3 * head


def test_full_fine_tuning_has_the_moments_of_every_weight_and_a_third_more_flops() -> None:
    full, lora = gpt().runs["full"], measured()
    assert full.bytes.weights == lora.bytes.weights
    assert full.bytes.optimizer == pytest.approx(2 * full.bytes.weights, rel=1e-3)
    assert full.checkpoint_trained == full.checkpoint_full == lora.checkpoint_full
    # LoRA has the forward pass twice and one of two backward products: 3 of 4.
    assert (lora.flops - lora.flops_adapters) / full.flops == pytest.approx(0.75, abs=0.03)
    assert not any(t.of == "adapters" for t in full.traffic)


def test_what_lora_adds_grows_with_the_rank_and_nothing_else_does() -> None:
    config = command_line.parse(["--config", GPT, *SIZES, "--lora.rank=8"], OWN, ROOT)[1]
    on = grid(2, 2, 2)
    with jax.set_mesh(on):
        large = measure.measure(config, config.workload(config), on, H100)
    small = measured()

    def sums(found: measure.StepCosts, of: str) -> int:
        return sum(a.operand.bytes * a.times for a in found.arrays if a.of == of)

    assert 0 < 2 * sums(small, "adapters") == sums(large, "adapters")
    assert 0 < sums(small, "base") == sums(large, "base")
    assert sums(small, "update") == sums(large, "update")
    assert all(4 in a.operand.dims for a in small.arrays if a.of == "adapters")
    assert large.flops_adapters == 2 * small.flops_adapters


def test_bfloat16_counts_two_bytes_in_every_gathered_weight() -> None:
    gathered = {
        a.operand.dtype for a in measured().arrays if a.kind == "all-gather" and a.of == "base"
    }
    assert "bf16" in gathered
    assert "f16" not in gathered
    up = (WIDTH // 2, 4 * WIDTH // 2)
    found = [a for a in measured().arrays if a.operand.dims == up and a.kind == "all-gather"]
    assert {(a.operand.dtype, a.operand.bytes, a.times) for a in found} == {
        ("bf16", 2 * math.prod(up), LAYERS)
    }


# ---- speeds


def test_seconds_of_a_ring() -> None:
    eight = tuple(range(8))
    assert measure.seconds("all-reduce", 8_000, eight, H100) == 2 * 7 * 1_000 / 450e9
    assert measure.seconds("all-gather", 1_000, eight, H100) == 7 * 1_000 / 450e9
    assert measure.seconds("all-gather", 1_000, (3,), H100) == 0
    across = (0, 8, 16)  # one device of each of three machines
    assert H100.rate(across) == H100.network
    assert H100.rate(tuple(range(32))) == 8 * H100.network
    assert DEVICES["tpu-v5p"].rate(tuple(range(4096))) == DEVICES["tpu-v5p"].link


# ---- the command


def test_a_plan_leaves_nothing_but_itself(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """There is no run directory and no lock; the plan is written next to the run's place."""
    monkeypatch.chdir(tmp_path)
    assert train.main(["--config", OWN, "--plan", "--plan-compiler=simulated"]) == 0
    name, config, _ = command_line.parse(["--config", OWN], OWN, ROOT)
    run = directory.default(name, config)
    written = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert written == [tmp_path / f"{run}.plan.json"]
    assert "this run fits h100-80gb" in capsys.readouterr().out
    assert json.loads(written[0].read_text())["devices"] == 1


def test_the_json_holds_all_of_the_plan(tmp_path: pathlib.Path) -> None:
    plan_report.write(gpt(), tmp_path / "deep" / "plan.json")
    found = json.loads((tmp_path / "deep" / "plan.json").read_text())
    assert set(found) == {
        "format", "config", "mesh", "devices", "compiled_for", "extrapolated", "batch",
        "first_batch", "accumulate", "device", "runs", "notes", "compiler",
    }  # fmt: skip
    assert set(found["runs"]) == {"lora", "full"}
    assert set(found["runs"]["lora"]) == {
        "parameters", "adapter_parameters", "base_parameters_trained", "checkpoint_bytes",
        "full_checkpoint_bytes", "bytes", "flops", "flops_adapters", "flops_all_devices",
        "collectives", "arrays", "fits", "roofline", "weights",
        "program",
    }  # fmt: skip
    parts = found["runs"]["lora"]["bytes"]
    assert parts.pop("total") == sum(parts.values())
    assert found["mesh"] == {"data": 2, "fsdp": 2, "tensor": 2}
    assert "added by LoRA" in plan_report.text(gpt())


def test_no_weight_of_a_built_in_model_is_read(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its data is not tokenised either: the config gives the shape of a batch."""
    folder = tiny.write_model(tmp_path / "llama", tiny.LLAMA | {"num_hidden_layers": 1})
    source = tiny.write_examples(tmp_path / "data", ("text",), str)
    config = tmp_path / "config.py"
    config.write_text(
        "from lora_jax.training.causal_lm import causal_lm\n"
        "from lora_jax.data.config import DataConfig\n"
        "from lora_jax.training.text import ModelConfig, TextConfig\n"
        f"config = TextConfig(workload=causal_lm, model=ModelConfig(reference={str(folder)!r}),\n"
        f"    data=DataConfig(source={source!r}, eos='</s>', max_length=16, batch_size=8))\n"
    )
    (folder / "model.safetensors").write_bytes(b"poison")
    parsed = command_line.parse(["--config", str(config)], OWN, ROOT)[1]
    workload = parsed.workload(parsed)
    first = {k: (x.shape, x.dtype) for k, x in next(workload.train(Shard())).items()}
    assert first == {k: (x.shape, x.dtype) for k, x in workload.example.items()}

    monkeypatch.setattr(Batches, "iterator", None)
    found = planned(str(config), "--plan-devices", "1")
    assert not found.first_batch
    assert found.batch["input_ids"] == (8, 16)
    assert found.runs["lora"].parameters == found.runs["full"].base_parameters_trained > 0


def test_it_does_not_fit_what_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run fits a device with exactly its total of bytes, and does not with one byte less."""
    found = gpt()
    total = int(found.runs["lora"].bytes.total)
    for memory, fits in ((total, True), (total - 1, False)):
        device = dataclasses.replace(H100, memory=memory)
        monkeypatch.setitem(DEVICES, "h100-80gb", device)
        assert found.fits("lora") is fits
        words = "this run fits" if fits else "this run does NOT fit"
        assert words in plan_report.text(found)
    assert found.runs["full"].bytes.total > total


def test_the_roofline_names_the_longest_of_three() -> None:
    found = gpt()
    roof, run = found.roofline("lora"), found.runs["lora"]
    assert roof.compute == run.flops / H100.flops
    assert roof.memory == run.moved / H100.bandwidth
    assert roof.communication == sum(t.seconds for t in run.traffic)
    assert roof.seconds == getattr(roof, roof.bound) == max(dataclasses.astuple(roof))


def test_more_devices_than_can_be_simulated_are_extrapolated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The extrapolation is close to the result of compiling for all eight devices."""
    real = planned(OWN, "--plan-devices", "8")
    monkeypatch.setattr(plan, "LIMIT", 4)
    found = planned(OWN, "--plan-devices", "8")
    assert (found.extrapolated, real.extrapolated) == (True, False)
    assert (found.compiled, real.compiled) == ((2, 4), (8,))
    guess, truth = found.runs["lora"], real.runs["lora"]
    assert guess.bytes.weights == truth.bytes.weights
    assert guess.bytes.adapters == truth.bytes.adapters
    assert guess.bytes.activations == pytest.approx(truth.bytes.activations, rel=0.05)
    assert guess.flops == pytest.approx(truth.flops, rel=1e-6)
    assert "EXTRAPOLATED" in plan_report.text(found)
    written = plan_report.to_json(found)
    assert written["extrapolated"] is True
    assert written["compiled_for"] == [2, 4]
    assert written["notes"][0].startswith("extrapolated")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ("--plan-devices", "6", "--mesh.fsdp", "4"),
            "--plan-devices 6: mesh .* does not use 6 devices",
        ),
        (
            ("--plan-devices", "8", "--batch-size", "12"),
            "has 12 rows, which mesh.data x mesh.fsdp = 8",
        ),
        (("--plan-devices", "16"), "JAX is in use in this process already and has 8"),
    ],
)
def test_what_cannot_be_planned_is_said(arguments: tuple[str, ...], says: str) -> None:
    jax.devices()
    with pytest.raises(ConfigError, match=says):
        planned(OWN, *arguments)


def test_an_unknown_device_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"plan_device must be one of a100-40gb, .*tpu-v7x"):
        PlanOptions(plan_device="h100")


def test_help_lists_the_flags_of_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.main(["--config", OWN, "--help-all"])
    text = capsys.readouterr().out
    for flag in ("plan", "plan-device", "plan-devices", "plan-file", "plan-compiler"):
        assert re.search(rf"--{flag}\s", text)
    assert all(name in text for name in DEVICES)


@pytest.mark.slow
def test_gpt3_175b(tmp_path: pathlib.Path) -> None:
    """The article's case on 64 devices, in a process that has as many."""
    file = tmp_path / "plan.json"
    subprocess.run(
        [
            sys.executable, str(ROOT / "train.py"), "--config", GPT,
            "--plan", "--plan-compiler=simulated", "--plan-devices", "64",
            "--plan-file", str(file),
        ],
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    found = json.loads(file.read_text())
    lora, full = found["runs"]["lora"], found["runs"]["full"]
    assert lora["parameters"] == pytest.approx(175e9, rel=0.01)
    assert lora["adapter_parameters"] == 2 * 96 * 2 * 4 * 12288 == 18_874_368
    # 350 GB to 35 MB, in 16 bits; our checkpoints hold the float32 masters.
    assert lora["full_checkpoint_bytes"] == pytest.approx(350e9, rel=0.01)
    assert lora["checkpoint_bytes"] == 4 * 18_874_368
    # 1.2 TB to 350 GB: weights and optimizer state, on all devices.
    state = {
        name: 64 * sum(run["bytes"][part] for part in ("weights", "adapters", "optimizer"))
        for name, run in found["runs"].items()
    }
    assert state["lora"] == pytest.approx(350e9, rel=0.01)
    assert state["full"] == pytest.approx(3 * 350e9, rel=0.01)
    assert lora["fits"]
    # Full fine-tuning takes 82.5 or 86.6 GB of 85.5 GB: XLA's temporaries depend on the CPU that
    # the plan is made on.
    assert full["bytes"]["total"] > 1.5 * lora["bytes"]["total"]
    assert lora["flops"] < 0.74 * full["flops"]
    # No device ever holds a whole stack of weights: the smallest of them has 29 GB.
    assert lora["bytes"]["temporaries"] < 10e9
    assert np.prod(list(found["mesh"].values())) == found["devices"] == 64
