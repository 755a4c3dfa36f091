"""A TFDS data set of drawn shapes, small enough to make in a test."""

from __future__ import annotations

import io
import pathlib
import zipfile
from typing import Any, ClassVar

import numpy as np
import PIL.Image
import PIL.ImageDraw
import tensorflow_datasets as tfds
from tensorflow_datasets.core.utils.lazy_imports_utils import tensorflow as tf

SHAPES = ("disc", "frame", "stripes")
SIZES = {"train": 42, "validation": 15, "test": 9}


class ShapesStandIn(tfds.core.GeneratorBasedBuilder):
    """A data set with the fields of oxford_flowers102: PNG and JPEG images of many sizes."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: ClassVar = [
        tfds.core.BuilderConfig(name=name, description=name)
        for name in ("files", "arrays", "archives", "tensorflow")
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(),
            "label": tfds.features.ClassLabel(names=SHAPES),
            "file_name": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(
            builder=self, description="stand-in", features=tfds.features.FeaturesDict(features)
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        match self.builder_config.name:
            case "archives":
                return {split: list(_unpacked(self, dl_manager, split)) for split in SIZES}
            case "tensorflow":
                return {"train": [tf.image.decode_png(b"")]}
        return {split: list(_rows(self, split)) for split in SIZES}

    def _generate_examples(self, pipeline: Any) -> Any:
        raise NotImplementedError


def _rows(builder: ShapesStandIn, split: str) -> Any:
    for i in range(SIZES[split]):
        image = drawn(split, i)
        arrays = builder.builder_config.name == "arrays"
        stored = np.asarray(image) if arrays else io.BytesIO(encoded(image, i))
        yield i, {"image": stored, "label": i % len(SHAPES), "file_name": f"{split}_{i}"}


def _unpacked(builder: ShapesStandIn, dl_manager: Any, split: str) -> Any:
    path = pathlib.Path(builder.data_dir).parent / f"{split}.zip"
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as file:
        for i, row in _rows(builder, split):
            file.writestr(f"{split}_{i}", row["image"].read())
    if split == "test":
        found = {name: file.read() for name, file in dl_manager.iter_archive(path)}
    else:
        folder = dl_manager.extract(path)
        found = {}
        for name in tf.io.gfile.listdir(folder):
            with tf.io.gfile.GFile(folder / name, "rb") as file:
                found[name] = file.read()
    for name, content in found.items():
        i = int(name.rpartition("_")[2])
        yield i, {"image": io.BytesIO(content), "label": i % len(SHAPES), "file_name": name}


def drawn(split: str, i: int) -> PIL.Image.Image:
    """Return the image of an example: a shape of its class in a random colour and place."""
    random = np.random.default_rng((list(SIZES).index(split), i))
    wide, high = 24 + i % 7, 20 + i % 5
    image = PIL.Image.new("RGB", (wide, high), tuple(random.integers(0, 80, 3).tolist()))
    draw, colour = PIL.ImageDraw.Draw(image), tuple(random.integers(150, 256, 3).tolist())
    left, top = random.integers(1, 5, 2).tolist()
    box = (left, top, left + 15, top + 13)
    match SHAPES[i % len(SHAPES)]:
        case "disc":
            draw.ellipse(box, fill=colour)
        case "frame":
            draw.rectangle(box, outline=colour, width=2)
        case "stripes":
            for x in range(left, wide, 4):
                draw.line((x, 0, x, high), fill=colour, width=2)
    return image


def encoded(image: PIL.Image.Image, i: int) -> bytes:
    """Return an image as the bytes of a file, which is a JPEG every other time."""
    file = io.BytesIO()
    image.save(file, "JPEG" if i % 2 else "PNG", quality=95)
    return file.getvalue()
