"""The config of a data set of images."""

from __future__ import annotations

import dataclasses

from lora_jax.data.examples_config import ExamplesConfig


@dataclasses.dataclass(frozen=True)
class ImageDataConfig(ExamplesConfig):
    """The source of the images, their augmentation in training, and the sizes of batches."""

    source: str = "tfds:beans"
    """tfds:name/config:version, or JSONL and CSV files with the path of an image file in each row,
    as data/{split}.jsonl or train=a.csv,validation=b.csv."""
    image_field: str = "image"
    """The field with the image."""
    flip: bool = False
    """Training: mirror a random half of the images, left to right."""
    crop: float = 1.0
    """Training: cut out a random part of each image, with at least this share of its area, and a
    width of three quarters to four thirds of its height. 1: use the whole image."""
    threads: int = dataclasses.field(default=4, metadata={"incidental": True})
    """Batches that are decoded at the same time, each in a thread; as many more are kept ready."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("image_field", bool(self.image_field), "the name of a field")
        self._require("crop", 0 < self.crop <= 1, "above 0 and at most 1")
        self._require("threads", self.threads > 0, "at least 1")
