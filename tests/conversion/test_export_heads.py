"""A classifier goes out only if transformers computes the same, or without its head if asked."""

from __future__ import annotations

import json
import pathlib
import shutil
from typing import Any

import numpy as np
import pytest

import lora_jax
from lora_jax import LoraSpec, models
from lora_jax.checkpoint import restore_about
from lora_jax.cli import export as command
from lora_jax.exchange import peft
from lora_jax.models.weights.stored import LAST
from measuring.golden_runs import GOLDEN, GoldenRun, write_run

SPEC = LoraSpec(2, 3.0, "bert/encoder/layer_*/attention/*/kernel")
ENCODERS = ["bert", "roberta", "distilbert", "deberta_v2", "deberta_v3", "modernbert"]
POOLINGS: dict[type, str] = {models.VitConfig: "cls", models.DecoderConfig: LAST}
# Other than BERT's they are as slow as whole runs.
NAMES = [n if n == "bert" else pytest.param(n, marks=pytest.mark.slow) for n in ENCODERS]


def export(run: GoldenRun, out: pathlib.Path, *options: str) -> int:
    return command.main([str(run.folder), "--out", str(out), *options])


def opened(run: GoldenRun, folder: pathlib.Path, name: str, labels: int) -> Any:
    """Return the logits of the folder on the base with transformers' head for this model."""
    source = models.open(str(GOLDEN / name))
    config = source.config
    head = models.Head(POOLINGS.get(type(config), "roberta_head"), labels)
    if isinstance(config, models.DecoderConfig):
        config = config.without_logits()
    params = models.shapes(config, head) | {config.root: source.load(config)}
    zeros = lora_jax.paths.flatten({"classifier": params["classifier"]})
    params = lora_jax.paths.replace(params, {p: np.zeros(x.shape, "f4") for p, x in zeros.items()})
    names = models.hf_names(config, head)
    layout, adapters, trained = peft.load(folder, names, run.f, params, run.inputs)
    assert set(zeros) <= set(trained), "a part of the head comes from the base"
    params = lora_jax.paths.replace(params, dict(trained))
    return lora_jax.adapt(layout, run.f)(params, adapters, run.inputs)


@pytest.mark.few(1)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_head_that_transformers_does_not_have_is_refused(
    name: str, pooling: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", name, pooling=pooling, spec=SPEC)
    for format in ("peft", "hf"):
        assert export(run, tmp_path / "out", "--format", format) == 1
        said = capsys.readouterr().err
        assert f"model.pooling '{pooling}'" in said and "its own is 'roberta_head'" in said
        assert "--model.pooling roberta_head" in said and "--no-head" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [*ENCODERS, "modernbert_biased", "vit", "vit_oblong", "llama", "gpt2", "qwen2"]
)
@pytest.mark.parametrize("labels", [1, 2, 5])
def test_a_head_that_transformers_has_goes_out(
    name: str, labels: int, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    decoder = name in ("llama", "gpt2", "qwen2")
    pattern = "decoder/**/o/kernel" if decoder else "vit/encoder/**/kernel"
    spec = LoraSpec(2, 3.0, pattern) if decoder or name.startswith("vit") else SPEC
    classes = tuple("abcde"[:labels]) if labels > 1 else ()
    pooling = LAST if decoder else "roberta_head"
    run = write_run(tmp_path / "run", name, labels=classes, spec=spec, pooling=pooling)
    assert export(run, tmp_path / "out", "--format", "peft") == 0
    assert f"num_labels={labels}" in capsys.readouterr().err
    got = opened(run, tmp_path / "out", name, labels)
    np.testing.assert_allclose(got, run.outputs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frozen", ["classifier/dense/kernel", "classifier/out/bias"])
def test_a_head_that_was_trained_in_part_is_refused(
    frozen: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", "bert", spec=SPEC)
    about = restore_about(run.folder)
    part = {path: x for path, x in run.adapter.trainable.items() if path != frozen}
    adapter, base = run.adapter._replace(trainable=part), lora_jax.fingerprint(run.params)
    lora_jax.save(run.folder, adapter, fingerprint=base, about=about, overwrite=True)
    for format in ("peft", "hf"):
        assert export(run, tmp_path / "out", "--format", format) == 1
        said = capsys.readouterr().err
        assert f"has no '{frozen}'" in said and "--lora.trainable 'classifier/**'" in said


def test_a_run_without_factors_is_no_adapter(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", "bert", spec=SPEC)
    about = restore_about(run.folder)
    head = lora_jax.Adapter(lora_jax.Layout(()), {}, run.adapter.trainable)
    base = lora_jax.fingerprint(run.params)
    lora_jax.save(run.folder, head, fingerprint=base, about=about, overwrite=True)
    assert export(run, tmp_path / "out", "--format", "peft") == 1
    assert "--format hf" in capsys.readouterr().err


@pytest.mark.few(1)
@pytest.mark.parametrize("labels", [("a", "b"), ()])
def test_a_base_that_pools_otherwise(
    labels: tuple[str, ...], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = shutil.copytree(GOLDEN / "modernbert", tmp_path / "base")
    config = json.loads((base / "config.json").read_text()) | {"classifier_pooling": "mean"}
    (base / "config.json").write_text(json.dumps(config))
    run = write_run(tmp_path / "run", str(base), spec=SPEC, labels=labels)
    assert export(run, tmp_path / "out", "--format", "peft") == 1
    assert "classifier_pooling 'mean'" in capsys.readouterr().err
    assert export(run, tmp_path / "out", "--format", "hf") == 0
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["classifier_pooling"] == "cls"


@pytest.mark.parametrize("name", [*NAMES, pytest.param("vit", marks=pytest.mark.slow)])
def test_an_encoder_goes_out_without_its_head(
    name: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command says what is left out, and the rest is the adapter of the bare encoder."""
    spec = LoraSpec(2, 3.0, "vit/encoder/**/kernel") if name == "vit" else SPEC
    run = write_run(tmp_path / "run", name, pooling="mean", spec=spec)
    assert export(run, tmp_path / "out", "--format", "peft", "--no-head") == 0
    pooling = "cls" if name == "vit" else "mean"
    assert f"left out: {pooling} pooling and the head of 3 outputs" in capsys.readouterr().err
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["task_type"] == "FEATURE_EXTRACTION" and not settings["modules_to_save"]
    keys = peft.describe(tmp_path / "out").shapes
    assert not [key for key in keys if name in key or "classifier" in key]
    assert len(keys) == 2 * len(run.adapter.layout.targets)
