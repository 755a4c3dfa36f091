"""`configs/vit_images.py` on drawn shapes: a run trains, predicts, and gets a report."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds

import lora_jax
from lora_jax import checkpoint, models
from lora_jax.cli import predict, report
from lora_jax.cli import train as command_line
from lora_jax.data import open_source
from lora_jax.data.process_slice import Shard
from lora_jax.training import config_json
from lora_jax.training.classification import classification
from lora_jax.training.config import ConfigError
from lora_jax.training.image_classification import apply_of, image_classification
from lora_jax.training.images import ImageConfig
from lora_jax.training.pretrained import PretrainedModelConfig
from lora_jax.training.text import ModelConfig, TextConfig
from tests.data.image_stand_in import SHAPES
from tests.serving.classifiers import evaluated
from tests.training import tiny
from tests.training.runs import ROOT, run

CONFIG = str(ROOT / "configs/vit_images.py")
SOURCE = "tfds:shapes_stand_in/files"


class Finished(NamedTuple):
    model: pathlib.Path
    data: pathlib.Path
    run: pathlib.Path
    summary: dict[str, Any]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A finished run of the config with a tiny model, drawn shapes, and smaller numbers."""
    folder = tmp_path_factory.mktemp("images")
    model = tiny.write_model(folder / "vit", tiny.VIT | {"num_hidden_layers": 1})
    arguments = (
        *("--model.reference", str(model)),
        *("--data.source", SOURCE, "--data.data-dir", str(folder)),
        *("--data.batch-size", "16", "--data.eval-batch-size", "16"),
        *("--steps", "30", "--evaluate-every", "15", "--optimizer.learning-rate", "2e-2"),
    )
    summary = run(folder / "run", *arguments, config=CONFIG)
    return Finished(model, folder, folder / "run", summary)


def config_of(finished: Finished, **model: Any) -> ImageConfig:
    config: Any = command_line.load(CONFIG, ROOT)[1]
    data = dataclasses.replace(config.data, source=SOURCE, data_dir=str(finished.data))
    own = PretrainedModelConfig(reference=str(finished.model), **model)
    return dataclasses.replace(config, model=own, data=data)


def test_a_vit_learns_shapes(finished: Finished) -> None:
    before, after = (finished.summary[name]["validation"] for name in ("before", "after"))
    assert after["loss"] < 0.6 * before["loss"]
    assert after["accuracy"] > before["accuracy"]
    assert set(finished.summary["after"]) == {"validation", "test"}
    assert finished.summary["adapter_parameters"] == 2 * 16 * (16 + 16)  # q and v, r, in + out
    assert finished.summary["trainable_parameters"] == 16 * len(SHAPES) + len(SHAPES)
    assert finished.summary["merged_difference"] < 1e-5


def test_the_adapter_says_what_it_classifies(finished: Finished) -> None:
    folder = finished.run / "adapters/best"
    about = checkpoint.restore_about(folder)
    assert about["labels"] == list(SHAPES) and about["image_field"] == "image"
    assert about["model"]["pooling"] == "cls"
    adapter = lora_jax.restore(folder)
    assert adapter.trainable["classifier/out/kernel"].shape == (16, len(SHAPES))
    assert {path.split("/")[-2] for path in adapter.parameters} == {"query", "value"}


def test_predictions_are_what_training_evaluates(
    finished: Finished, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    examples = open_source(SOURCE, str(finished.data)).examples("validation")
    for i, row in enumerate(examples):
        (tmp_path / f"{i}").write_bytes(row["image"])
    lines = [json.dumps({"image": str(tmp_path / f"{i}"), "n": i}) for i in range(len(examples))]
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(lines))
    given = ("--adapter", str(finished.run))
    written = ("--file", str(source), "--out", str(out), "--batch-size", "4")
    assert predict.main([*given, *written]) == 0
    assert "15 images" in capsys.readouterr().err
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["n"] for row in found] == list(range(len(examples)))
    wanted = jax.nn.softmax(evaluated(finished.run, config_of(finished)))
    shares = [[row["probabilities"][name] for name in SHAPES] for row in found]
    np.testing.assert_allclose(shares, wanted, atol=2e-5)

    (tmp_path / "3").write_bytes(b"")
    assert predict.main([*given, *written]) == 1
    assert "in.jsonl, line 4: 0 bytes that Pillow cannot read" in spaced(capsys)
    assert predict.main([*given, "--text", "a word"]) == 1
    assert "the adapters classify images: give --image, not --text" in spaced(capsys)


def spaced(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


def test_the_report_knows_the_run(finished: Finished, tmp_path: pathlib.Path) -> None:
    assert report.main([str(finished.run), "--out", str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    assert "Amplified directions of W" in text and "needs the weights" not in text
    assert "data.crop" in text and "data.threads" not in text


def test_the_example_is_a_batch(finished: Finished) -> None:
    workload = image_classification(config_of(finished))
    batch, example = next(workload.train(Shard())), workload.example
    assert example is not None
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        k: (v.shape, v.dtype) for k, v in example.items()
    }


def test_the_number_of_threads_names_no_run(finished: Finished) -> None:
    config = config_of(finished)
    more = dataclasses.replace(config, data=dataclasses.replace(config.data, threads=9))
    assert config_json.changes(config_json.to_dict(config), more) == []
    assert config_json.identity(config) == config_json.identity(more)


def test_dropout_is_for_training(finished: Finished) -> None:
    source = models.open(str(finished.model))
    config: Any = PretrainedModelConfig(reference="x", dropout=0.5).apply_to(source.config)
    model = models.VitClassifier(config, 2)
    batch = {"pixels": np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)}
    params = model.init(jax.random.key(0), batch["pixels"])["params"]
    apply, key = apply_of(model), jax.random.key(1)
    still = apply(params, batch, train=False, key=None)
    assert np.array_equal(still, model.apply({"params": params}, batch["pixels"]))
    assert not np.allclose(still, apply(params, batch, train=True, key=key))


def test_models_and_data_that_do_not_go_together(
    finished: Finished, tmp_path: pathlib.Path
) -> None:
    text = tiny.write_model(tmp_path / "text", tiny.ROBERTA | {"num_hidden_layers": 1})
    config = dataclasses.replace(
        config_of(finished), model=PretrainedModelConfig(reference=str(text))
    )
    with pytest.raises(ConfigError, match=r"an encoder of text; image_classification takes a ViT"):
        image_classification(config)
    base: Any = command_line.load(str(ROOT / "configs/glue_roberta.py"), ROOT)[1]
    own = dataclasses.replace(base, model=ModelConfig(reference=str(finished.model)))
    assert isinstance(own, TextConfig)
    with pytest.raises(ConfigError, match="classification takes a model of text"):
        classification(own)


@pytest.mark.parametrize(
    ("name", "classes"), [("beans", 3), ("flowers102", 102), ("food101", 101), ("cifar10", 10)]
)
def test_the_data_sets_are_known_without_tensorflow(
    name: str, classes: int, tmp_path: pathlib.Path
) -> None:
    config: Any = command_line.load(f"{CONFIG}:{name}", ROOT)[1]
    open_registered(tmp_path)
    features = tfds.builder(config.data.source.removeprefix("tfds:"), data_dir=tmp_path).info
    assert isinstance(features.features[config.data.image_field], tfds.features.Image)
    assert features.features[config.data.label_field].num_classes == classes
    assert config.steps % config.evaluate_every == 0


def open_registered(folder: pathlib.Path) -> None:
    """Register the data sets of TFDS, which TFDS itself does only if TensorFlow is installed."""
    with pytest.raises(lora_jax.LoraError, match="has no data set"):
        open_source("tfds:no_such_data_set", str(folder))
