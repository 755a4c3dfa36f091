"""Full fine-tuning and LoRA: the memory and disk space of each, and the report on them."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from experiments.paper import benefits, counts, measurement_file, trained
from experiments.paper.benefits import Benefits, Compared, MeasuredSide
from experiments.paper.trained import CASES, Case, StepBytes, TrainingSide
from lora_jax import LoraError, models, paths
from lora_jax.report.document import Table
from measuring import timing

pytestmark = pytest.mark.standard_promotion  # for Optax's schedules

D, LAYERS, RANK = 16, 1, 4
SMALL: dict[str, Any] = {"vocab_size": 37, "hidden_size": D, "num_layers": LAYERS, "mlp_size": 24}
TINY: dict[str, Case] = {
    "minilm": dataclasses.replace(
        CASES["minilm"], rows=2, length=8,
        config=models.BertConfig(num_heads=4, max_positions=8, **SMALL),
    ),
    "smollm2": dataclasses.replace(
        CASES["smollm2"], rows=2, length=8,
        config=models.DecoderConfig(
            num_heads=4, num_kv_heads=2, head_dim=4, max_positions=8, **SMALL
        ),
    ),
}  # fmt: skip
FACTORS = {
    "minilm": counts.lora(RANK, [(D, D)] * 2 * LAYERS),
    "smollm2": counts.lora(RANK, [(D, D), (D, D // 2)] * LAYERS),
}
HEAD = {"minilm": 2 * D + 2, "smollm2": 0}
MACHINE = timing.Machine("a processor", 2, "cpu", "cpu", "3", "1", "2")


@pytest.fixture(scope="module")
def made() -> dict[str, dict[str, TrainingSide]]:
    """The sides of each tiny model, by the names of model and side."""
    with jax.numpy_dtype_promotion("standard"):
        return {
            name: {side: make() for side, make in trained.sides(case).items()}
            for name, case in TINY.items()
        }


def fresh(side: TrainingSide) -> TrainingSide:
    """Return the side with a copy of its state, which steps may donate."""
    return side._replace(state=jax.tree.map(jnp.copy, side.state))


def on_disk(folder: pathlib.Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.few(1)
@pytest.mark.parametrize("name", TINY)
def test_what_is_trained(name: str, made: dict[str, dict[str, TrainingSide]]) -> None:
    full, lora = made[name].values()
    head = models.Head("mean", 2) if name == "minilm" else None
    assert lora_jax.count(full.state.trained) == lora_jax.count(
        models.shapes(TINY[name].config, head)
    )
    assert lora_jax.count(full.frozen) == 0
    assert lora_jax.count(lora.state.trained["adapters"]) == FACTORS[name]
    assert lora_jax.count(lora.state.trained["base"]) == HEAD[name]
    assert lora_jax.count(lora.frozen) + HEAD[name] == lora_jax.count(full.state.trained)


@pytest.mark.parametrize("name", TINY)
def test_memory(name: str, made: dict[str, dict[str, TrainingSide]]) -> None:
    found = {side: trained.memory(one) for side, one in made[name].items()}
    for side, one in made[name].items():
        numbers, memory = lora_jax.count(one.state.trained), found[side]
        assert memory.gradients == 4 * numbers
        assert memory.weights == 4 * (numbers + lora_jax.count(one.frozen))
        assert 0 <= memory.optimizer - 2 * 4 * numbers < 64  # Adam's moments, and counters
        analysis: Any = one.program.memory_analysis()
        held = memory.weights + memory.optimizer
        assert held <= analysis.argument_size_in_bytes < held + 2048  # and the batch
        new = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
        assert new < 2048  # the metrics
        assert memory.total == analysis.argument_size_in_bytes + analysis.temp_size_in_bytes + new
        parts = (memory.weights, memory.optimizer, memory.gradients, memory.rest)
        assert sum(parts) == memory.total
    assert found["lora"].total < found["full"].total


@pytest.mark.few(1)
@pytest.mark.parametrize("name", TINY)
def test_steps_and_checkpoints(
    name: str, made: dict[str, dict[str, TrainingSide]], tmp_path: pathlib.Path
) -> None:
    for side, one in made[name].items():
        again = fresh(one)
        take = trained.stepping(again)
        before = jax.tree.map(np.array, again.state.trained)
        take()
        state = take()
        assert int(state.step) == 2 and int(state.skipped) == 0
        for path, factors in state.trained["adapters"].items():  # A's gradient begins at zero
            assert (before["adapters"][path].b != factors.b).any()
        moved = [(before["base"][path] != x).any() for path, x in state.trained["base"].items()]
        assert sum(moved) > len(moved) / 2 or not moved  # a key's bias has no gradient
        size = trained.written(again, state, tmp_path, side)
        folder = tmp_path / "adapters" / side
        assert size == on_disk(folder)
        _, adapters, _ = lora_jax.restore(folder)
        kept = {"adapters": adapters, "base": lora_jax.restore(folder).trainable}
        assert lora_jax.count(kept) == lora_jax.count(state.trained)
        for path, array in paths.flatten(kept).items():
            assert (np.asarray(array) == paths.flatten(state.trained)[path]).all(), path


def test_the_command(
    made: dict[str, dict[str, TrainingSide]],
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(benefits, "CASES", TINY)
    sides = {name: functools.partial(fresh, one) for name, one in made["smollm2"].items()}
    monkeypatch.setattr(trained, "sides", {TINY["smollm2"]: sides}.__getitem__)
    out = tmp_path / "benefits.json"
    assert benefits.main(["--out", str(out), "--models", "smollm2", "--steps", "3"]) == 0
    found = measurement_file.read(out, Benefits, "")
    assert found is not None
    (model,) = found.models
    full, lora = model.sides
    assert (model.model, model.rows, model.length) == ("SmolLM2", 2, 8)
    assert len(full.seconds) == len(lora.seconds) == 3
    assert model.parameters == full.trained
    assert lora.trained == FACTORS["smollm2"] < full.trained
    assert 0 < lora.checkpoint < full.checkpoint + 20_000  # the manifests of tiny trees
    said = capsys.readouterr()
    assert "checkpoint on disk" in said.out and found.machine.line() in said.out
    assert "3 steps of each side" in said.err
    (section,) = benefits.sections(tmp_path)
    assert len([block for block in section.blocks if isinstance(block, Table)]) == 2


def by_hand() -> Benefits:
    full = MeasuredSide(
        "full", 1000, StepBytes(40_000, 4_000, 8_000, 4_000), 4_000, (2.0, 4.0, 9.0)
    )
    lora = MeasuredSide("lora", 10, StepBytes(10_000, 4_040, 80, 40), 40, (1.0, 2.0, 3.0))
    return Benefits(MACHINE, 60.0, (Compared("MiniLM", 2, 8, 1000, (full, lora)),))


def test_the_tables_are_the_numbers(tmp_path: pathlib.Path) -> None:
    measurement_file.write(tmp_path / "benefits.json", by_hand())
    assert measurement_file.read(tmp_path / "benefits.json", Benefits, "") == by_hand()
    (section,) = benefits.sections(tmp_path)
    ratios, memory = (block for block in section.blocks if isinstance(block, Table))
    assert [row[1:] for row in ratios.rows] == [
        ("memory of a step", "40.00 kB", "10.00 kB", "0.250", "1.20 TB", "350.00 GB", "0.292"),
        ("checkpoint on disk", "4.00 kB", "40 B", "0.0100", "350.00 GB", "35.00 MB", "0.000100"),
        ("tokens/s", "4.0", "8.0", "2.00", "32.5", "43.1", "1.33"),
    ]
    assert memory.rows[1] == (
        *("MiniLM", "LoRA", "10", "1.00%"),
        *("4.04 kB", "80 B", "40 B", "5.84 kB", "10.00 kB"),
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda found: found["models"][0]["sides"].reverse(), "sides are ('lora', 'full')"),
        (lambda found: found["models"][0]["sides"][0].update(seconds=[]), "seconds is '[]'"),
        (lambda found: found["models"][0]["sides"][0].pop("memory"), "expected side, trained"),
        (lambda found: found.pop("seconds"), "it has machine, models"),
    ],
)
def test_a_damaged_file_is_named(change: Any, said: str, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "benefits.json"
    measurement_file.write(file, by_hand())
    found = json.loads(file.read_text())
    change(found)
    file.write_text(json.dumps(found))
    with pytest.raises(LoraError) as error:
        benefits.sections(tmp_path)
    text = str(error.value)
    assert said in text and f"python -m experiments.paper.benefits --out {file}" in text
