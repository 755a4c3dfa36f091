"""A run shows its devices, a trace of some steps, and the share of the peak that it reaches."""

from __future__ import annotations

import pathlib

import jax
import pytest

from lora_jax.cli import train as command_line
from lora_jax.planner import measure
from lora_jax.primitives import flops
from lora_jax.system import devices
from lora_jax.training import metrics
from tests.planner.test_hlo import grid
from tests.planner.test_plan import GPT, H100, SIZES
from tests.training.runs import OWN, ROOT, SMALL, run


def test_a_run_with_a_trace_on_a_device_whose_peak_is_known(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(devices.KINDS, "cpu", "l4-24gb")
    summary = run(tmp_path / "run", *SMALL, "--profile", "2", "--steps", "6")
    printed = capsys.readouterr().out
    assert printed.startswith(
        "8 devices (cpu) in 1 process, as data 8 x fsdp 1 x tensor 1\n32 rows"
    )
    assert f"steps 2 to 3 are traced in {tmp_path / 'run' / 'profile'}: tensorboard" in printed
    assert len(list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))) == 1
    shares = [line["mfu"] for line in metrics.read(tmp_path / "run") if "split" not in line]
    assert shares[0] is None and all(0 < share < 1e-3 for share in shares[1:])
    assert 0 <= summary["mfu"] < 1e-3 and "  MFU 0.0%" in printed


def test_the_products_of_a_run_are_those_of_its_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan counts what rematerialisation computes again, and a run's utilisation does not."""
    config = command_line.parse(["--config", GPT, *SIZES], OWN, ROOT)[1]
    on = grid(1, 1, 1)
    with jax.set_mesh(on):
        workload = config.workload(config)  # type: ignore[union-attr]
        take, _, _, arguments = measure.prepared(config, workload, on, H100)  # type: ignore[arg-type]
        planned = measure.measure(config, workload, on, H100).flops  # type: ignore[arg-type]
        traced = jax.jit(take).trace(*arguments).jaxpr
    assert 0.7 * planned < flops.of_products(traced) < 0.8 * planned
    monkeypatch.setattr(flops, "RECOMPUTED", "nothing is named so")
    assert flops.of_products(traced) == planned


def test_the_table_knows_every_device_by_the_name_that_jax_gives_it() -> None:
    assert set(devices.KINDS.values()) == set(devices.DEVICES)
    assert devices.known("TPU v5 lite") == devices.DEVICES["tpu-v5e"]
    assert devices.known("cpu") is None
