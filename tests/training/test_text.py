"""The built-in workloads, on tiny random models and stand-in data."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import shutil
import types
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy

import lora_jax
from lora_jax import models, serving
from lora_jax.cli import train as command_line
from lora_jax.data.config import DataConfig
from lora_jax.data.process_slice import Shard
from lora_jax.serving import served_adapters
from lora_jax.training import pretrained, scores, text
from lora_jax.training.causal_lm import causal_lm
from lora_jax.training.classification import apply_of, classification
from lora_jax.training.config import ConfigError, LoraConfig, OptimizerConfig
from lora_jax.training.open_run import Run
from lora_jax.training.text import ModelConfig, TextConfig
from tests.serving import tiny as small
from tests.training import tiny
from tests.training.runs import ROOT, run, train_in

GLUE = "configs/glue_roberta.py"
# Table 9 of the paper: learning rate, batch size, epochs; and the size of the training split.
TABLE_9 = {
    "mnli": (5e-4, 16, 30, 392_702),
    "sst2": (5e-4, 16, 60, 67_349),
    "mrpc": (4e-4, 16, 30, 3_668),
    "cola": (4e-4, 32, 80, 8_551),
    "qnli": (4e-4, 32, 25, 104_743),
    "qqp": (5e-4, 16, 25, 363_846),
    "rte": (5e-4, 32, 80, 2_490),
    "stsb": (4e-4, 16, 40, 5_749),
}


def test_pairs_are_told_apart_by_their_token_types() -> None:
    config = models.BertConfig(
        vocab_size=9, hidden_size=8, num_layers=1, num_heads=2, mlp_size=8, max_positions=8
    )
    model = models.BertClassifier(config, 2)
    ids = np.array([[1, 2, 3, 4]], np.int32)
    batch = {"input_ids": ids, "mask": np.ones_like(ids, bool)}
    params = model.init(jax.random.key(0), ids)["params"]
    params["bert"]["embeddings"]["token_type"]["embedding"] *= 50  # it starts small
    apply = apply_of(model)
    one = apply(params, batch, train=False, key=None)
    types = {"token_types": np.array([[0, 0, 1, 1]], np.int32)}
    two = apply(params, batch | types, train=False, key=None)
    assert np.abs(one - two).max() > 1e-3


@pytest.mark.parametrize("name", TABLE_9)
def test_glue_is_set_as_in_the_paper(name: str) -> None:
    config: Any = command_line.load(f"{GLUE}:{name}", ROOT)[1]
    rate, batch_size, epochs, size = TABLE_9[name]
    assert config.optimizer.learning_rate == rate
    assert config.data.batch_size == batch_size
    assert config.steps == epochs * math.ceil(size / batch_size)
    assert (config.optimizer.schedule, config.optimizer.warmup) == ("linear", 0.06)
    assert (config.lora.rank, config.lora.alpha) == (8, 8.0)
    assert config.data.max_length == 512
    assert config.data.source == f"tfds:glue/{name}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "label", "outputs"), [("mnli", int, 3), ("stsb", lambda kind: kind / 2, 1)]
)
def test_glue_runs_on_stand_ins(
    name: str, label: Any, outputs: int, roberta: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    config: Any = command_line.load(f"{GLUE}:{name}", ROOT)[1]
    source = tiny.write_examples(tmp_path / "data", config.data.text_fields, label)
    summary = run(
        tmp_path / "run",
        *("--model.reference", str(roberta), "--data.source", source),
        *("--data.eval-split", "validation"),
        *("--steps", "2", "--evaluate-every", "2", "--data.max-length", "64"),
        config=f"{GLUE}:{name}",
    )
    assert summary["adapter_parameters"] == 2 * 8 * (16 + 16)  # q and v, r, in + out
    assert summary["trainable_parameters"] == 16 * 16 + 16 + 16 * outputs + outputs
    score = {"stsb": "pearson"}.get(name, "accuracy")
    assert score in summary["after"]["validation"]
    head = lora_jax.restore(tmp_path / "run/adapters/best").trainable
    assert head["classifier/out/kernel"].shape == (16, outputs)


def text_config(workload: Any, weights: pathlib.Path, source: str, **changes: Any) -> TextConfig:
    data = DataConfig(
        source=source,
        prompt="{text}",
        answer=" word1 word2 word3",
        eos="</s>",
        max_length=16,
        batch_size=8,
        eval_batch_size=16,
    )
    config = TextConfig(
        workload=workload,
        model=ModelConfig(reference=str(weights)),
        data=data,
        lora=LoraConfig(rank=4, targets=("**/attention/{query,value,q,v}/kernel",)),
        optimizer=OptimizerConfig(learning_rate=3e-2),
        steps=10,
        evaluate_every=10,
    )
    return dataclasses.replace(config, **changes)


def test_rows_longer_than_the_models_positions_are_an_error_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = text_config(causal_lm, pathlib.Path("nowhere"), "nothing.jsonl")
    table = dataclasses.replace(small.CONFIG, positions="learned", max_positions=15)
    monkeypatch.setattr(text, "open_model", lambda *_: types.SimpleNamespace(config=table))
    with pytest.raises(ConfigError, match=r"data.max_length must be at most 15, the positions of"):
        causal_lm(config)


def test_a_score_that_there_is_not_is_an_error_at_once() -> None:
    """A `select` that names no score is an error at once; a user's own workload is checked at step
    0.
    """
    for of, names in (
        (scores.token_scores, ["loss", "perplexity"]),
        (scores.real_scores, ["loss", "pearson"]),
        (scores.accuracy, ["loss", "accuracy"]),
        (scores.class_scores, ["loss", "accuracy", "f1", "matthews"]),
    ):
        assert scores.names(of) == names
    workload: Any = types.SimpleNamespace(evaluation={"validation": None}, select="acuracy")
    config: Any = text_config(causal_lm, pathlib.Path("nowhere"), "nothing.jsonl")
    setup: Any = types.SimpleNamespace(config=config, workload=workload)
    nothing: Any = None
    with pytest.raises(lora_jax.LoraError, match=r"nearest: 'accuracy'.*--select"):
        Run(setup, nothing, nothing).evaluate_before(
            nothing, {"validation": {"loss": 1.0, "accuracy": 0.5}}
        )


@pytest.mark.parametrize("kind", [causal_lm, classification])
def test_select_is_checked_before_any_weight_is_read(
    source: str, kind: Any, roberta: pathlib.Path, llama: pathlib.Path
) -> None:
    model = llama if kind is causal_lm else roberta
    with pytest.raises(lora_jax.LoraError, match="'nosuch', but an evaluation gives"):
        kind(text_config(kind, model, source, select="nosuch"))


def test_an_adapter_names_its_base_from_every_folder(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for given, named in (("models/a", str(tmp_path / "models/a")), (models.MINILM, models.MINILM)):
        assert pretrained.about(ModelConfig(given), "mean")["model"]["reference"] == named


def test_an_encoder_learns_labels(
    source: str, roberta: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    config = text_config(classification, roberta, source, steps=30)
    summary = train_in(tmp_path / "run", config)
    before, after = summary["before"]["validation"], summary["after"]["validation"]
    assert after["loss"] < 0.8 * before["loss"]
    assert after["accuracy"] > before["accuracy"]
    assert summary["merged_difference"] < 1e-5
    own = {f"bert/encoder/layer_0/attention/{name}/kernel": (16, 4) for name in _QV}
    assert shapes_of_a(tmp_path / "run") == own


def test_a_decoder_learns_labels(source: str, llama: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = text_config(classification, llama, source, steps=30, evaluate_every=30)
    summary = train_in(tmp_path / "run", config)
    before, after = summary["before"]["validation"], summary["after"]["validation"]
    assert after["loss"] < 0.8 * before["loss"]
    assert summary["merged_difference"] < 1e-5
    file = pathlib.Path(source.format(split="validation"))
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    server = serving.open(tmp_path / "run/adapters/best")
    found = [answer["prediction"] for answer in server.predict([row["text"] for row in rows])]
    right = [one == str(row["label"]) for one, row in zip(found, rows, strict=True)]
    assert np.mean(right) == pytest.approx(after["accuracy"])
    with pytest.raises(lora_jax.LoraError, match="adapters classify; `lora-jax predict`"):
        served_adapters.BaseChoice().open([str(tmp_path / "run")], "generate")


def test_a_decoder_learns_answers(source: str, llama: pathlib.Path, tmp_path: pathlib.Path) -> None:
    lora = LoraConfig(rank=4, targets=("**/kernel",))
    config = text_config(causal_lm, llama, source, lora=lora, steps=30)
    summary = train_in(tmp_path / "run", config)
    before, after = summary["before"]["validation"], summary["after"]["validation"]
    assert after["loss"] < 0.9 * before["loss"]
    assert after["perplexity"] == pytest.approx(math.exp(after["loss"]))
    assert summary["trainable_parameters"] == 0
    assert summary["tokens_per_second"] > 0


def test_scanned_layers_have_stacked_adapters(source: str, tmp_path: pathlib.Path) -> None:
    roberta = tiny.write_model(tmp_path / "roberta", tiny.ROBERTA)
    model = ModelConfig(reference=str(roberta), scan_layers=True, remat="full")
    config = text_config(classification, roberta, source, model=model)
    workload = classification(config)
    example, key = next(workload.train(Shard())), jax.random.key(0)
    layout = lora_jax.resolve(
        config.lora.spec, workload.apply, workload.params, example, train=True, key=key
    )
    stacked = {f"bert/encoder/layers/attention/{name}/kernel": (2, 16, 4) for name in _QV}
    shapes = jax.eval_shape(lambda: lora_jax.init(key, layout))
    assert {path: factors.a.shape for path, factors in shapes.items()} == stacked


_QV = ("query", "value")


def shapes_of_a(run: pathlib.Path) -> dict[str, tuple[int, ...]]:
    _, adapters, _ = lora_jax.restore(run / "adapters/last")
    return {path: factors.a.shape for path, factors in adapters.items()}


@pytest.mark.parametrize(("name", "make"), [("roberta", classification), ("llama", causal_lm)])
def test_dropout_needs_and_uses_the_key(
    source: str, name: str, make: Any, request: pytest.FixtureRequest
) -> None:
    weights = request.getfixturevalue(name)
    model = ModelConfig(reference=str(weights), dropout=0.5)
    workload = make(text_config(make, weights, source, model=model))
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = workload.arrays(jax.tree.map(lambda _: where, workload.params))
    batch = next(workload.train(Shard()))
    keys = [jax.random.key(i) for i in range(2)]
    apply = jax.jit(workload.apply, static_argnames="train")
    dropped = [apply(params, batch, train=True, key=key) for key in keys]
    assert not np.array_equal(*dropped)
    plain = [apply(params, batch, train=False, key=None) for _ in keys]
    np.testing.assert_array_equal(*plain)


def test_settings_of_the_other_kind_are_an_error(
    source: str, roberta: pathlib.Path, llama: pathlib.Path
) -> None:
    with pytest.raises(ConfigError, match="label_smoothing must be 0 for a classifier"):
        classification(text_config(classification, roberta, source, label_smoothing=0.1))
    model = ModelConfig(reference=str(llama), head_dropout=0.1)
    with pytest.raises(ConfigError, match="head_dropout must be None for a decoder"):
        causal_lm(text_config(causal_lm, llama, source, model=model))


def test_the_wrong_kind_of_model_is_an_error(
    source: str, roberta: pathlib.Path, llama: pathlib.Path
) -> None:
    with pytest.raises(ConfigError, match="is an encoder of text"):
        causal_lm(text_config(causal_lm, roberta, source))


def test_class_scores_are_those_of_the_textbook() -> None:
    labels = np.array([1, 1, 1, 0, 0, 0, 0, 1], np.int32)
    guesses = np.array([1, 1, 0, 0, 0, 1, 0, 0], np.int32)
    weights = np.array([1, 1, 1, 1, 1, 1, 1, 0], np.float32)  # the last row is padding
    logits = np.eye(2, dtype=np.float32)[guesses]
    sums = {k: np.asarray(v) for k, v in scores.class_sums(logits, labels, weights).items()}
    assert sums["confusion"].tolist() == [[3.0, 1.0], [1.0, 2.0]]  # by class, then by guess
    found = scores.class_scores(sums, float(weights.sum()))
    y, g = labels[:7], guesses[:7]
    assert found["accuracy"] == pytest.approx(np.mean(y == g))
    assert found["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))  # tp 2, fp 1, fn 1
    assert found["matthews"] == pytest.approx(np.corrcoef(y, g)[0, 1])


def test_pearson_is_numpys_over_any_cut_into_batches() -> None:
    random = np.random.default_rng(0)
    x, y = random.normal(size=(2, 30)).astype(np.float32)
    weights = np.ones(30, np.float32)
    parts = [
        scores.real_sums(x[cut], y[cut], weights[cut]) for cut in (slice(0, 11), slice(11, 30))
    ]
    sums = {name: float(sum(part[name] for part in parts)) for name in parts[0]}
    assert scores.real_scores(sums, 30.0)["pearson"] == pytest.approx(
        np.corrcoef(x, y)[0, 1], rel=1e-4
    )


def test_another_base_is_refused(
    source: str, llama: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "model"
    shutil.copytree(llama, weights)
    config = text_config(causal_lm, weights, source, steps=4)
    train_in(tmp_path / "run", config)
    (tmp_path / "run/summary.json").unlink()  # so that it goes on from its last checkpoint
    file = weights / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    name = "layers.0.mlp.up_proj.weight"
    safetensors.numpy.save_file({**tensors, name: tensors[name] * 1.01}, file)
    again = tmp_path / "run"
    with pytest.raises(lora_jax.LoraError, match="layers_0/mlp/up/kernel: other values") as error:
        train_in(again, config)
    assert "1 of 11 frozen parameters differ" in str(error.value)
    assert "--allow-other-base" in str(error.value)
    train_in(again, dataclasses.replace(config, allow_other_base=True))
