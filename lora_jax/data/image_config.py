"""The config of a data set of images: what is read, and how batches are made of it."""

from __future__ import annotations

import dataclasses

from lora_jax.data.examples_config import ExamplesConfig


@dataclasses.dataclass(frozen=True)
class ImageDataConfig(ExamplesConfig):
    """The data: where images come from, how they are varied in training, and the batches."""

    source: str = "tfds:beans"
    """tfds:name/config:version, or JSONL and CSV files (data/{split}.jsonl, or
    train=a.csv,validation=b.csv) with the path of an image file in each row."""
    image_field: str = "image"
    """The field with the image."""
    flip: bool = False
    """Training: mirror one half of the images, left to right."""
    crop: float = 1.0
    """Training: cut out a random part of each image, of this share of its area or more, three
    quarters to four thirds as wide as high. 1: none is cut."""
    threads: int = dataclasses.field(default=4, metadata={"incidental": True})
    """Batches that are decoded at once, each in a thread; so many more are kept ready."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("image_field", bool(self.image_field), "the name of a field")
        self._require("crop", 0 < self.crop <= 1, "above 0 and at most 1")
        self._require("threads", self.threads > 0, "at least 1")
