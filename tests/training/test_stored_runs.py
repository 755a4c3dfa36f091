"""Runs on weights that stay quantised as their file holds them."""

from __future__ import annotations

import pathlib
import shutil

import pytest

from lora_jax.bases.recipe import ABOUT
from lora_jax.checkpoint.adapter import restore_about
from lora_jax.cli import generate
from lora_jax.training.causal_lm import causal_lm
from lora_jax.training.config import ConfigError
from lora_jax.training.text import ModelConfig
from tests.training import tiny
from tests.training.runs import ROOT, train_in
from tests.training.test_text import text_config

pytestmark = pytest.mark.slow

GOLDEN = ROOT / "tests/golden/golden_models"


@pytest.mark.parametrize("name", ["llama_nf4"])
def test_a_folder_of_bitsandbytes(name: str, source: str, tmp_path: pathlib.Path) -> None:
    model = shutil.copytree(GOLDEN / name, tmp_path / "model")
    tiny.tokenizer(pair=False).save(str(model / "tokenizer.json"))
    found = {}
    for quantize in ("stored", "none"):
        config = text_config(
            causal_lm, model, source, steps=4, model=ModelConfig(str(model), quantize=quantize)
        )
        found[quantize] = train_in(tmp_path / quantize, config)
    stored, floats = found["stored"], found["none"]
    assert stored["base_parameters"] == floats["base_parameters"]
    assert stored["base_bytes_per_device"] < floats["base_bytes_per_device"]
    for when in ("before", "after"):
        losses = [run[when]["validation"]["loss"] for run in (stored, floats)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert restore_about(tmp_path / "stored/adapters/last")[ABOUT] == {"scheme": "stored"}
    run, out = str(tmp_path / "stored"), str(tmp_path / "out.jsonl")
    assert generate.main(["--adapter", run, "--prompt", "word1", "--out", out]) == 0


def test_a_model_of_floats_has_nothing_stored(llama: pathlib.Path, source: str) -> None:
    settings = ModelConfig(str(llama), quantize="stored")
    with pytest.raises(ConfigError, match=r"holds no quantised weights; --model.quantize nf4"):
        causal_lm(text_config(causal_lm, llama, source, model=settings))
