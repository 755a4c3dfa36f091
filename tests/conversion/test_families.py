"""Commands train, stop, continue and export a run, from a folder of weights."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

import train
from lora_jax.cli import export
from lora_jax.training import processes
from tests.exchange.test_peft_consumers import vllm
from tests.training import tiny

pytestmark = pytest.mark.slow

CONFIG = str(pathlib.Path(train.__file__).parent / "configs" / "smollm2_definitions.py")
TRAIN = (
    *("--config", CONFIG, "--steps", "4", "--evaluate-every", "4", "--checkpoint-every", "4"),
    *("--data.prompt", "{text}", "--data.answer", " word1 word2", "--data.eos", "</s>"),
    *("--data.max-length", "16", "--data.batch-size", "8", "--data.eval-batch-size", "16"),
    *("--lora.rank", "2", "--lora.targets", "all-linear", "--optimizer.learning-rate", "0.03"),
)


@pytest.mark.parametrize(
    ("description", "modules"),
    [(tiny.GPT2, 8), (tiny.GEMMA3, 14), (tiny.QWEN3_MOE, 2 * (5 + 3 * 4))],
    ids=["gpt2", "gemma3", "qwen3_moe"],
)
def test_a_run_is_stopped_goes_on_and_is_exported(
    description: dict[str, Any],
    modules: int,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The PEFT adapter, read by other code, equals the merged folder minus the base."""
    source = tiny.write_examples(tmp_path / "data", ("text",), int)
    weights = tiny.write_model(tmp_path / "model", description)
    place = ("--model.reference", str(weights), "--data.source", source)
    command = (*TRAIN, *place, "--run-dir", str(tmp_path / "run"))
    with monkeypatch.context() as patch:
        patch.setattr(processes.Preemption, "asked", lambda self, step: step == 2)
        assert train.main(command) == processes.PREEMPTED
    assert train.main(command) == 0
    assert "Continuing from the checkpoint of step 2." in capsys.readouterr().out
    for format in (("hf",), ("peft", "--profile", "portable")):
        out = ("--out", str(tmp_path / format[0]))
        assert export.main([str(tmp_path / "run"), "--format", *format, *out]) == 0
    base = safetensors.numpy.load_file(weights / "model.safetensors")
    merged = safetensors.numpy.load_file(tmp_path / "hf" / "model.safetensors")
    deltas = vllm(tmp_path / "peft")
    assert len(deltas) == modules
    start = {"gpt2": "transformer."}.get(description["model_type"], "model.")
    for module, delta in deltas.items():
        name = f"{module}.weight"
        delta = delta.T if description["model_type"] == "gpt2" else delta
        moved = merged.pop(name) - base[name.removeprefix(start)]
        np.testing.assert_allclose(moved, delta, rtol=1e-4, atol=1e-6, err_msg=name)
        assert np.abs(delta).max() > 1e-3
    for name, x in merged.items():
        np.testing.assert_array_equal(x, base[name.removeprefix(start)])
