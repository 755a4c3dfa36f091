"""A TFDS data set of drawn shapes, small enough to make in a test."""

from __future__ import annotations

import io
from typing import Any, ClassVar

import numpy as np
import PIL.Image
import PIL.ImageDraw
import tensorflow_datasets as tfds

SHAPES = ("disc", "frame", "stripes")
SIZES = {"train": 42, "validation": 15, "test": 9}


class ShapesStandIn(tfds.core.GeneratorBasedBuilder):
    """Fields as those of oxford_flowers102; PNG and JPEG, no two of one size.

    `arrays` has images as NumPy arrays, for which TFDS calls TensorFlow.
    """

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: ClassVar = [
        tfds.core.BuilderConfig(name=name, description=name) for name in ("files", "arrays")
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
        arrays = self.builder_config.name == "arrays"
        return {split: list(_rows(split, arrays)) for split in SIZES}

    def _generate_examples(self, pipeline: Any) -> Any:
        raise NotImplementedError


def _rows(split: str, arrays: bool) -> Any:
    for i in range(SIZES[split]):
        image = drawn(split, i)
        stored = np.asarray(image) if arrays else io.BytesIO(encoded(image, i))
        yield i, {"image": stored, "label": i % len(SHAPES), "file_name": f"{split}_{i}"}


def drawn(split: str, i: int) -> PIL.Image.Image:
    """The image of an example: a shape of its class in any colour, somewhere."""
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
    """The file of an image, a JPEG every other time."""
    file = io.BytesIO()
    image.save(file, "JPEG" if i % 2 else "PNG", quality=95)
    return file.getvalue()
