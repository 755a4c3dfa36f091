"""Outputs equal other frameworks' outputs: the real models, and a tiny one of every variant."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import models
from lora_jax.models.weights import families
from tests import npz

DECODERS = [
    *("llama", "llama_biased", "mistral", "qwen2", "qwen3", "gpt2", "gpt2_unscaled", "gemma2"),
    *("gemma2_biased", "gemma3", "phi3", "phi3_long", "mixtral", "qwen3_moe", "qwen3_moe_biased"),
]
ENCODERS = [
    *((n, False) for n in ("bert", "distilbert", "modernbert", "modernbert_biased")),
    *((n, scan) for n in ("roberta", "deberta_v2", "deberta_v3") for scan in (False, True)),
]
SCANNED = [(n, True) for n in ("llama_biased", "mistral", "gpt2", "gemma3", "phi3", "mixtral")]


def test_minilm_hidden_states(data: Path) -> None:
    golden = json.loads((data / "golden_minilm.json").read_text())
    source = models.open(models.MINILM)
    assert source.tokenizer().encode(golden["text"]).ids == golden["ids"]
    params = source.load()
    ids = jnp.asarray([golden["ids"]])
    hidden = jax.jit(models.Bert(source.config).apply)({"params": params}, ids)[0]
    np.testing.assert_allclose(hidden[0, :8], golden["hidden_cls_first8"], atol=1e-5)
    mean = hidden.mean(axis=0)
    pooled = mean / jnp.linalg.norm(mean)
    np.testing.assert_allclose(pooled[:8], golden["mean_pooled_normalised_first8"], atol=1e-6)


@pytest.mark.parametrize("scan", [pytest.param(False, marks=pytest.mark.slow), True])
def test_smollm2_logits(data: Path, smollm2: models.Source, scan: bool) -> None:
    golden = npz.read(data / "golden_smollm2.npz")
    config = dataclasses.replace(smollm2.config, scan_layers=scan)
    params = smollm2.load(config)
    ids = jnp.asarray(golden["ids"], jnp.int32)[None]
    assert smollm2.tokenizer().decode(list(golden["ids"])) == "The capital of France is"
    logits = jax.jit(models.DecoderModel(config).apply)({"params": params}, ids)[0]
    # All logits are compared, as a wrong order of q's rows may leave the top token as it is.
    np.testing.assert_allclose(logits[-1], golden["logits_last"], atol=1e-3)
    np.testing.assert_allclose(logits[:, :5], golden["logits_first5"], atol=1e-3)


@pytest.mark.parametrize(("name", "scan"), [*((n, False) for n in DECODERS), *SCANNED])
def test_decoder_as_transformers(data: Path, name: str, scan: bool) -> None:
    folder = data / "golden_models" / name
    source = models.open(str(folder))
    config = dataclasses.replace(source.config, scan_layers=scan)
    golden = npz.read(folder / "expected.npz")
    mask = jnp.asarray(golden["attention_mask"], bool)
    ids = jnp.asarray(golden["input_ids"], jnp.int32)
    logits = jax.jit(models.DecoderModel(config).apply)({"params": source.load(config)}, ids, mask)
    np.testing.assert_allclose(logits[mask], golden["logits"][mask], atol=1e-5)
    if "short" in golden:  # a row that ends where the frequencies have not changed yet
        short = golden["short"]
        ids = ids[:, : short.shape[1]]
        logits = jax.jit(models.DecoderModel(config).apply)({"params": source.load(config)}, ids)
        np.testing.assert_allclose(logits, short, atol=1e-5)


@pytest.mark.parametrize(("name", "scan"), ENCODERS)
def test_encoder_as_transformers(data: Path, name: str, scan: bool) -> None:
    folder = data / "golden_models" / name
    source = models.open(str(folder))
    config = dataclasses.replace(source.config, scan_layers=scan)
    golden = npz.read(folder / "expected.npz")
    ids, mask, types = (
        jnp.asarray(golden[key], jnp.int32) if key in golden else None
        for key in ("input_ids", "attention_mask", "token_type_ids")
    )
    mask = mask.astype(bool)
    hidden = jax.jit(models.Bert(config).apply)({"params": source.load(config)}, ids, mask, types)
    np.testing.assert_allclose(hidden[mask], golden["hidden"][mask], atol=1e-5)

    # As in transformers the head reads the first token, even if RoBERTa's rows are padded left.
    params = source.load(config, head=models.Head("roberta_head", num_classes=3))
    model = models.BertClassifier(config, num_classes=3, pooling="roberta_head")
    logits = jax.jit(model.apply)({"params": params}, ids, mask)
    rows = slice(0, 1) if name == "roberta" else slice(None)
    np.testing.assert_allclose(logits[rows], golden["logits"][rows], atol=1e-5)


@pytest.mark.parametrize(("name", "scan"), [("vit", True), ("vit_oblong", False)])
def test_vit_as_transformers(data: Path, name: str, scan: bool) -> None:
    folder = data / "golden_models" / name
    source = models.open(str(folder))
    config = dataclasses.replace(source.config, scan_layers=scan)
    golden = npz.read(folder / "expected.npz")
    pixels = jnp.asarray(golden["pixels"]).transpose(0, 2, 3, 1)
    hidden = jax.jit(models.Vit(config).apply)({"params": source.load(config)}, pixels)
    np.testing.assert_allclose(hidden, golden["hidden"], atol=1e-5)
    params = source.load(config, head=models.Head("cls", num_classes=3))
    logits = jax.jit(models.VitClassifier(config, 3).apply)({"params": params}, pixels)
    np.testing.assert_allclose(logits, golden["logits"], atol=1e-5)
    with pytest.raises(ValueError, match="but the model's are"):
        models.Vit(config).apply({"params": params["vit"]}, pixels[:, 1:])
    with pytest.raises(models.WeightsError, match="no head with the pooling 'mean'"):
        source.load(config, head=models.Head("mean", num_classes=3))


def test_a_configuration_tells_its_names(data: Path) -> None:
    folders = [path.parent for path in (data / "golden_models").glob("*/config.json")]
    assert len(folders) > 20
    for folder in folders:
        kind = json.loads((folder / "config.json").read_text())["model_type"]
        assert (
            families.table_of(models.open(str(folder)).config) is families.FAMILIES[kind].names
        ), folder.name
