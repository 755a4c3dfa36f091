"""Batches of images with their labels. Images are decoded and resized when they are needed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
from numpy.typing import NDArray

from lora_jax.data.batches import Batches, Facts
from lora_jax.data.catalogue import open_data
from lora_jax.data.config import ImageDataConfig
from lora_jax.data.epochs import Epochs, EpochTable
from lora_jax.data.images import NO_AUGMENTATION, Augmentation, decode, pixels
from lora_jax.data.labels import labels_of
from lora_jax.models.text.example import Example, field_of
from lora_jax.models.weights.preprocessing import Preprocessing


def image_classification(
    config: ImageDataConfig,
    preprocessing: Preprocessing,
    split: str,
    batch_size: int,
    *,
    shuffle: bool = False,
    seed: int = 0,
    epochs: int | None = 1,
    set_apart: bool = False,
    augmentation: Augmentation = NO_AUGMENTATION,
) -> Batches:
    """Make batches of images with their labels; see `lora_jax.data.classification` for the
    arguments.

    A batch has, for B images:

        pixels  [B, height, width, channels] float32, as `preprocessing` says
        label   [B]    int32    class id, or float32 for real numbers
        weight  [B]    float32  1, or 0 for a row that only fills the batch
        index   [B]    int32    number of the example in the split

    Every epoch has every example exactly once. B is always `batch_size`: a batch that would be
    short is filled with copies of its rows, at weight 0. A process reads and decodes only its own
    rows of a batch, in threads, a few batches ahead. The augmentation is drawn for each image in
    each epoch.
    """
    source = open_data(config, set_apart)
    examples, limit = source.examples(split), config.limit(split)
    size = len(examples) if limit is None else min(limit, len(examples))
    table = ImageTable(
        epochs=Epochs(np.zeros(size, np.int64), batch_size, seed if shuffle else None, epochs),
        labels=labels_of(config, source),
        examples=examples,
        config=config,
        preprocessing=preprocessing,
        where=f"{source.name}, split {split!r}",
        augmentation=augmentation,
        seed=seed,
    )
    table.row(0, 0)  # a wrong field should be found before anything else is loaded
    facts = Facts(
        source=source.name,
        split=split,
        examples=size,
        batches=table.epochs.batches,
        notes=source.notes,
    )
    return table.batches(facts, grain.ReadOptions(config.threads, config.threads))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageTable(EpochTable):
    """The images, which are decoded when they are needed, and their labels."""

    examples: Sequence[Example]
    config: ImageDataConfig
    preprocessing: Preprocessing
    where: str
    augmentation: Augmentation
    seed: int

    def columns(
        self, epoch: int, chosen: NDArray[np.int64], rows: NDArray[np.int64]
    ) -> dict[str, NDArray[Any]]:
        found = {i: self.row(epoch, i) for i in dict.fromkeys(rows.tolist())}
        images, labels = zip(*(found[i] for i in rows.tolist()), strict=True)
        kind = np.float32 if self.labels.regression else np.int32
        return {"pixels": np.stack(images), "label": np.array(labels, kind)}

    def row(self, epoch: int, index: int) -> tuple[NDArray[np.float32], int | float]:
        """Return the pixels and the label of an example in an epoch."""
        example, where = self.examples[index], f"{self.where}, example {index}"
        field, how = self.config.image_field, self.preprocessing
        image = decode(field_of(example, field, "image_field", where), how.channels, where)
        value = field_of(example, self.config.label_field, "label_field", where)
        random = np.random.default_rng((self.seed, epoch, index))
        box = self.augmentation.box(image.size, random)
        found = pixels(image, how, box, self.augmentation.flips(random))
        return found, self.labels.encode(value, where)
