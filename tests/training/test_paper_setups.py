"""The LoRA paper's set-ups of GPT-2 on E2E and of DeBERTa XXL on GLUE.

The numbers are from the paper's tables 10 and 11 and from the code released with it
(microsoft/LoRA). TFDS's own builders are used with other rows, because nothing can be downloaded.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
import tokenizers
from tensorflow_datasets.text import gem, glue

import lora_jax
from lora_jax import models
from lora_jax.cli import train as command_line
from lora_jax.data import open_source
from lora_jax.data.language_modelling import language_modelling
from lora_jax.models.weights import families
from lora_jax.training import causal_lm, classification
from tests.training import tiny
from tests.training.runs import ROOT, run

GPT2, DEBERTA = "configs/gpt2_e2e.py", "configs/deberta_glue.py"
END, END_ID = "<|endoftext|>", 44  # the id after the words of the tiny tokenizer
SIZES = {"train": 41, "validation": 9, "test": 5}
# config.json of openai-community/gpt2-medium, gpt2-large and microsoft/deberta-v2-xxlarge.
PUBLISHED: dict[str, dict[str, Any]] = {
    "medium": {"n_embd": 1024, "n_layer": 24, "n_head": 16},
    "large": {"n_embd": 1280, "n_layer": 36, "n_head": 20},
    "xxl": {
        **tiny.DEBERTA,
        "vocab_size": 128_100,
        "hidden_size": 1536,
        "num_hidden_layers": 48,
        "num_attention_heads": 24,
        "intermediate_size": 6144,
        "max_position_embeddings": 512,
        "position_buckets": 256,
    },
}
# Table 10: learning rate, batch size, epochs, longest input, weight decay, dropout of the head;
# and the size of the training split.
TABLE_10 = {
    "mnli": (1e-4, 8, 5, 256, 0.0, 0.15, 392_702),
    "sst2": (6e-5, 8, 16, 128, 0.01, 0.0, 67_349),
    "mrpc": (2e-4, 32, 30, 128, 0.01, 0.0, 3_668),
    "cola": (1e-4, 4, 10, 64, 0.0, 0.1, 8_551),
    "qnli": (1e-4, 6, 8, 512, 0.01, 0.1, 104_743),
    "qqp": (1e-4, 8, 11, 320, 0.01, 0.2, 363_846),
    "rte": (2e-4, 4, 11, 320, 0.01, 0.2, 2_490),
    "stsb": (2e-4, 4, 10, 128, 0.1, 0.2, 5_749),
}


def load(reference: str) -> Any:
    return command_line.load(reference, ROOT)[1]


def test_gpt2_is_set_as_in_the_paper() -> None:
    for name in ("medium", "large"):
        config = load(f"{GPT2}:{name}")
        adam = config.optimizer
        assert (adam.learning_rate, adam.weight_decay, adam.schedule) == (2e-4, 0.01, "linear")
        assert adam.warmup * config.steps == pytest.approx(500)
        assert config.steps == 5 * math.ceil(33_525 / 8)
        assert (adam.clip, adam.eps, config.lora.init) == (None, 1e-6, "uniform")
        assert (config.data.batch_size, config.data.pack) == (8, False)
        assert (config.lora.rank, config.lora.alpha, config.lora.dropout) == (4, 32.0, 0.1)
        assert (config.model.dropout, config.label_smoothing) == (0.0, 0.1)


@pytest.mark.parametrize("name", TABLE_10)
def test_deberta_is_set_as_in_the_paper(name: str) -> None:
    config = load(f"{DEBERTA}:{name}")
    rate, batch_size, epochs, length, decay, head, size = TABLE_10[name]
    adam = config.optimizer
    assert (adam.learning_rate, adam.weight_decay, adam.warmup) == (rate, decay, 0.1)
    assert (config.data.batch_size, config.data.max_length) == (batch_size, length)
    assert config.steps == epochs * math.ceil(size / batch_size)
    assert (config.model.dropout, config.model.head_dropout) == (0.1, head)
    assert config.data.source == f"tfds:glue/{name}"


@pytest.mark.parametrize(("name", "parameters"), [("medium", 393_216), ("large", 737_280)])
def test_parameters_of_gpt2(name: str, parameters: int) -> None:
    config = load(f"{GPT2}:{name}")
    shape = {"model_type": "gpt2", "vocab_size": 50_257, "n_positions": 1024}
    model = models.DecoderModel(
        config.model.apply_to(families.parse(shape | PUBLISHED[name] | {"n_layer": 2}, name))
    )
    apply = causal_lm.apply_of(model, smoothing=config.label_smoothing)
    batch = causal_lm.batch_shapes(config.data.batch_size, config.data.max_length)
    found = trained(config, apply, models.shapes(model.config), batch)
    assert found * PUBLISHED[name]["n_layer"] // 2 == parameters


def test_parameters_of_deberta() -> None:
    config = load(DEBERTA)
    model = models.BertClassifier(
        config.model.apply_to(families.parse(PUBLISHED["xxl"], "xxl")), 2, config.model.pooling
    )
    ids = jax.ShapeDtypeStruct((config.data.batch_size, config.data.max_length), np.int32)
    params = models.shapes(model.config, models.Head(config.model.pooling, 2))
    batch = {"input_ids": ids, "mask": jax.ShapeDtypeStruct(ids.shape, bool)}
    apply = classification.apply_of(model)
    assert (model.config.pooler_dropout, model.config.head_dropout) == (False, 0.0)
    assert trained(config, apply, params, batch) == 4_718_592  # 4.7M
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(params)) == pytest.approx(1.57e9, 0.01)


def trained(config: Any, apply: Any, params: Any, batch: Any) -> int:
    """Return the number of adapter parameters; nothing is computed."""
    layout = lora_jax.resolve(
        config.lora.spec, apply, params, batch, train=True, key=jax.random.key(0)
    )
    adapters = jax.eval_shape(lambda key: lora_jax.init(key, layout), jax.random.key(0))
    return sum(math.prod(x.shape) for x in jax.tree.leaves(adapters))


def tables(split: str) -> list[dict[str, Any]]:
    """Rows of E2E: a table of words, and a text with the same words."""
    random = np.random.default_rng(len(split))
    rows = []
    for number in range(SIZES[split]):
        words = " ".join(random.choice(tiny.WORDS[:9], 3))
        own = {"meaning_representation": words, "target": f"{words} word9", "references": []}
        rows.append({"gem_id": f"{number}", "gem_parent_id": f"{number}", **own})
    return rows


def pairs(split: str) -> list[dict[str, Any]]:
    """Rows of MRPC; a pair of equal sentences has label 1."""
    random = np.random.default_rng(len(split))
    rows = []
    for number in range(SIZES[split]):
        one, other = (" ".join(random.choice(tiny.WORDS[:9], 3)) for _ in range(2))
        second = other if number % 2 else one
        rows.append({"sentence1": one, "sentence2": second, "label": 1 - number % 2, "idx": number})
    return rows


@pytest.fixture
def prepared(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> Callable[[type, Callable[[str], list[dict[str, Any]]]], str]:
    """Return a function that gives a TFDS builder rows of ours, and returns its folder."""

    def with_rows(builder: type[Any], rows: Callable[[str], list[dict[str, Any]]]) -> str:
        def splits(self: Any, manager: Any) -> Any:
            return {split: list(enumerate(rows(split))) for split in SIZES}

        monkeypatch.setattr(builder, "_split_generators", splits)
        return str(tmp_path / "tfds")

    return with_rows


@pytest.mark.slow
def test_gpt2_trains_on_e2e(prepared: Any, tmp_path: pathlib.Path) -> None:
    weights = tiny.write_model(tmp_path / "gpt2", tiny.GPT2 | {"vocab_size": END_ID + 1})
    tokenizer = tokenizers.Tokenizer.from_file(str(weights / "tokenizer.json"))
    tokenizer.add_special_tokens([END])
    tokenizer.save(str(weights / "tokenizer.json"))
    folder = prepared(gem.Gem, tables)
    summary = run(
        tmp_path / "run",
        *("--model.reference", str(weights), "--data.data-dir", folder),
        *("--lora.targets", "layers*/attention/qkv/kernel@parts=0:16+32:16"),
        *("--data.max-length", "12", "--steps", "4", "--evaluate-every", "4"),
        config=GPT2,
    )
    assert summary["adapter_parameters"] == 2 * 2 * 4 * (16 + 16)
    assert summary["after"]["validation"]["loss"] < summary["before"]["validation"]["loss"]

    config = dataclasses.replace(load(GPT2).data, data_dir=folder, max_length=12)
    batch = next(iter(language_modelling(config, tokenizer, "train", config.batch_size)))
    assert {x.shape for x in batch.values()} == {(8, 12)}
    first = open_source(config.source, folder).examples("train")[0]
    read = [tokenizer.token_to_id(word) for word in first["meaning_representation"].split()]
    text = [*read, tokenizer.token_to_id("word9")]  # a target has the words of its table
    ids = [*read, END_ID, *text, END_ID]
    assert batch["input_ids"][0].tolist() == [*ids[:-1], *[1] * 4]
    assert batch["targets"][0].tolist() == [*ids[1:], *[1] * 4]
    assert batch["loss_weight"][0].tolist() == [0] * 3 + [1] * 5 + [0] * 4
    assert batch["segment_ids"].max() == 1


@pytest.mark.slow
def test_deberta_trains_on_glue(prepared: Any, tmp_path: pathlib.Path) -> None:
    weights = tiny.write_model(tmp_path / "deberta", tiny.DEBERTA)
    summary = run(
        tmp_path / "run",
        *("--model.reference", str(weights), "--data.data-dir", prepared(glue.Glue, pairs)),
        *("--steps", "4", "--evaluate-every", "4"),
        *("--data.buckets", "16", "--data.max-length", "64"),
        config=f"{DEBERTA}:mrpc",
    )
    assert summary["adapter_parameters"] == 2 * 2 * 16 * (16 + 16)
    assert summary["trainable_parameters"] == 16 * 16 + 16 + 2 * 16 + 2
    assert "accuracy" in summary["after"]["validation"]
