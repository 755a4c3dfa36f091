"""Batches of images: every example once, the same for all shards, and resumed in their middle."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import chex
import numpy as np
import pytest
from tensorflow_datasets.core.download import extractor

from lora_jax.data import DataError, ImageDataConfig, open_source, tensorflow_files
from lora_jax.data.image_classification import image_classification
from lora_jax.data.images import Augmentation, decode, pixels
from lora_jax.data.process_slice import Shard
from lora_jax.models.weights.preprocessing import Preprocessing
from lora_jax.system.checked import ConfigError
from tests.data.image_stand_in import SHAPES, SIZES, drawn, encoded

HOW = Preprocessing((16, 16), 3, 2, 1 / 255, (0.5,) * 3, (0.5,) * 3)
SOURCE = "tfds:shapes_stand_in/files"
VARIED = Augmentation(flip=True, crop=0.5)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> ImageDataConfig:
    folder = str(tmp_path_factory.mktemp("tfds"))
    open_source(SOURCE, folder)
    return ImageDataConfig(source=SOURCE, data_dir=folder)


def training(config: ImageDataConfig, **settings: Any) -> Any:
    settings = {"seed": 3, "epochs": None, "augmentation": VARIED} | settings
    return image_classification(config, HOW, "train", 8, shuffle=True, **settings)


def test_images_come_as_they_were_stored(shapes: ImageDataConfig) -> None:
    examples = open_source(SOURCE, shapes.data_dir).examples("train")
    for row in examples:
        name, number = row["file_name"].rsplit("_", 1)
        assert row["image"] == encoded(drawn(name, int(number)), int(number))


def test_one_pass_has_every_example_once(shapes: ImageDataConfig) -> None:
    batches = image_classification(shapes, HOW, "validation", 8)
    assert batches.labels is not None and batches.labels.names == SHAPES
    first, last = batches
    assert first["weight"].tolist() == [1] * 8 and last["weight"].tolist() == [1] * 7 + [0]
    assert [*first["index"], *last["index"][:7]] == list(range(SIZES["validation"]))
    np.testing.assert_array_equal(last["pixels"][7], last["pixels"][0])
    assert first["pixels"].dtype == np.float32 and first["label"].dtype == np.int32
    examples = open_source(SOURCE, shapes.data_dir).examples("validation")
    for i, row in enumerate(examples[:8]):
        assert first["label"][i] == row["label"]
        image = decode(row["image"], 3, "here")
        np.testing.assert_array_equal(first["pixels"][i], pixels(image, HOW))
    assert "15 examples, 2 batches an epoch" in str(batches.facts())


def test_every_epoch_varies_each_image_anew(shapes: ImageDataConfig) -> None:
    epochs = [{}, {}]
    for number, batch in enumerate(itertools.islice(training(shapes), 12)):
        rows = zip(batch["index"], batch["pixels"], batch["weight"], strict=True)
        epochs[number // 6] |= {int(i): x for i, x, weight in rows if weight}
    assert epochs[0].keys() == epochs[1].keys() == set(range(SIZES["train"]))
    same = sum(np.array_equal(epochs[0][i], epochs[1][i]) for i in epochs[0])
    assert same == 0
    plain = next(training(shapes, augmentation=Augmentation()).iterator())
    again = next(training(shapes, augmentation=Augmentation(), seed=4).iterator())
    assert plain["index"].tolist() != again["index"].tolist()


def test_shards_are_the_rows_of_the_whole(shapes: ImageDataConfig) -> None:
    whole = list(itertools.islice(training(shapes), 7))
    parts = [training(shapes).iterator(Shard((part,), 2)) for part in (0, 1)]
    for batch in whole:
        halves = [next(part) for part in parts]
        chex.assert_trees_all_equal(
            batch, {k: np.concatenate([half[k] for half in halves]) for k in batch}
        )
    with pytest.raises(DataError, match="cannot be divided evenly into 3 parts"):
        training(shapes).iterator(Shard((0,), 3))


def test_resumed_is_uninterrupted(shapes: ImageDataConfig) -> None:
    batches = training(shapes)
    straight = list(itertools.islice(batches.iterator(), 9))
    iterator = batches.iterator(Shard((1,), 2))
    for _ in range(5):
        next(iterator)
    state = iterator.get_state()
    resumed = training(shapes).iterator()
    resumed.set_state(state)
    for batch in straight[5:]:
        chex.assert_trees_all_equal(next(resumed), batch)


def test_paths_in_files(tmp_path: Path) -> None:
    rows = []
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(encoded(drawn("train", i), i))
        rows.append(f'{{"picture": "{tmp_path}/{i}.png", "kind": "{SHAPES[i % 3]}"}}\n')
    (tmp_path / "train.jsonl").write_text("".join(rows))
    config = ImageDataConfig(
        source=str(tmp_path / "{split}.jsonl"), image_field="picture", label_field="kind"
    )
    (batch,) = image_classification(config, HOW, "train", 6)
    assert batch["label"].tolist() == [0, 1, 2, 0, 1, 2]
    (tmp_path / "4.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"split 'train', example 4: 0 bytes that Pillow cannot"):
        list(image_classification(config, HOW, "train", 6))


def test_a_wrong_field_is_found_at_once(shapes: ImageDataConfig) -> None:
    config = ImageDataConfig(source=SOURCE, data_dir=shapes.data_dir, image_field="picture")
    with pytest.raises(DataError, match=r"(?s)no 'picture', which data\.image_field names"):
        image_classification(config, HOW, "train", 8)
    config = ImageDataConfig(source=SOURCE, data_dir=shapes.data_dir, image_field="label")
    with pytest.raises(DataError, match=r"got a int; data\.image_field names the field"):
        image_classification(config, HOW, "train", 8)


@pytest.mark.parametrize("name", ["arrays", "archives"])
def test_files_are_prepared_without_tensorflow(
    name: str, shapes: ImageDataConfig, tmp_path: Path
) -> None:
    source = open_source(f"tfds:shapes_stand_in/{name}", str(tmp_path))
    for split, size in SIZES.items():
        rows = {row["file_name"]: row for row in source.examples(split)}
        assert len(rows) == size
        for i in range(size):
            found = decode(rows[f"{split}_{i}"]["image"], 3, "here")
            file = encoded(drawn(split, i), i)
            wanted = drawn(split, i) if name == "arrays" else decode(file, 3, "here")
            np.testing.assert_array_equal(found, wanted)
    assert extractor.tf is not tensorflow_files.TF


def test_what_needs_tensorflow_says_so(tmp_path: Path) -> None:
    message = r"(?s)whose tf\.image is called.*Without TensorFlow, prepare it"
    with pytest.raises(DataError, match=message):
        open_source("tfds:shapes_stand_in/tensorflow", str(tmp_path))


@pytest.mark.parametrize("setting", [{"crop": 0.0}, {"crop": 1.5}, {"threads": 0}])
def test_settings_out_of_range(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"data.{next(iter(setting))} must be"):
        ImageDataConfig(**setting)
