"""Plans of well-known models by name, and of models of which only the config is there."""

from __future__ import annotations

import dataclasses
import pathlib

import jax
import pytest

from lora_jax import models
from lora_jax.cli import train as command_line
from lora_jax.errors import ModelReferenceError
from lora_jax.models.weights.known_shapes import _SHAPES
from lora_jax.planner import plan, plan_report
from lora_jax.training import mesh
from lora_jax.training.sizes import parameters
from lora_jax.training.text import TextConfig
from tests.training import tiny
from tests.training.runs import OWN, ROOT

# Billions, as the makers say.
PARAMETERS = {
    "smollm2-135m": 0.1345, "tinyllama-1.1b": 1.100, "llama2-7b": 6.738, "llama2-13b": 13.016,
    "llama2-70b": 68.977, "llama3-8b": 8.030, "llama3-70b": 70.554, "llama3.1-405b": 405.853,
    "llama3.2-1b": 1.236, "llama3.2-3b": 3.213, "mistral-7b": 7.248, "mixtral-8x7b": 46.703,
    "qwen2.5-7b": 7.616, "qwen2.5-32b": 32.764, "qwen3-8b": 8.191, "qwen3-32b": 32.762,
}  # fmt: skip


@pytest.mark.few(6)
@pytest.mark.parametrize("name", _SHAPES)
def test_a_known_shape_has_the_parameters_of_its_model(name: str) -> None:
    config = dataclasses.replace(models.open(f"shape:{name}").config, scan_layers=True)
    assert parameters(models.shapes(config)) / 1e9 == pytest.approx(PARAMETERS[name], rel=1e-3)


def test_a_known_shape_has_no_weights() -> None:
    source = models.open("shape:llama3-8b")
    with pytest.raises(ModelReferenceError, match="can only be planned"):
        source.load()
    with pytest.raises(ModelReferenceError, match="nearest: llama3-8b"):
        models.open("shape:llama3-8")


def test_the_option_model_names_a_known_shape() -> None:
    """It needs no config, and the other options stay."""
    given = ["--plan", "--model", "smollm2-135m", "--data.batch-size=2"]
    name, config, options = command_line.parse(given, OWN, ROOT)
    assert isinstance(config, TextConfig)
    assert (name, config.model.reference) == ("known_shape", "shape:smollm2-135m")
    assert (options.plan, config.data.batch_size) == (True, 2)


def test_a_decoder_is_planned_from_its_config_alone(tmp_path: pathlib.Path) -> None:
    """A folder with `config.json` alone is enough for a plan."""
    folder = tiny.write_model(tmp_path / "llama", tiny.LLAMA | {"num_hidden_layers": 1})
    for file in folder.iterdir():
        if file.name != "config.json":
            file.unlink()
    given = ["--config", str(ROOT / "configs/known_shape.py"), f"--model.reference={folder}"]
    given += ["--data.source", str(tmp_path / "nothing/{split}.jsonl"), "--model.quantize=none"]
    given += ["--model.no-double-quantize"]
    given += ["--data.max-length=16", "--model.loss-chunk=16", "--plan-devices=1", "--lora.rank=4"]
    name, config, options = command_line.parse(given, OWN, ROOT)
    options = dataclasses.replace(options, plan_compiler="simulated")
    made = plan.make(name, config, options, compare=False)  # type: ignore[arg-type]
    assert made.runs["lora"].parameters > 0


def test_fewer_rows_in_a_part_than_devices_are_said() -> None:
    """8 rows in 8 parts over 8 devices leave one row for all of them."""
    assert mesh.idle(8, 1, 8) == ""
    assert mesh.idle(8, 8, 1) == ""
    assert "Take --accumulate 1" in mesh.idle(8, 8, 8)
    assert "Take --accumulate 2" in mesh.idle(16, 4, 8)
    given = ["--config", OWN, "--plan-devices=8", "--accumulate=8", "--plan-compiler=simulated"]
    name, config, options = command_line.parse(given, OWN, ROOT)
    made = plan.make(name, config, options, compare=False)  # type: ignore[arg-type]
    assert jax.device_count("cpu") >= 8
    rows = next(iter(made.batch.values()))[0]
    said = [note for note in plan_report.notes(made) if "--accumulate 8" in note]
    assert bool(said) is (rows // 8 < 8)
