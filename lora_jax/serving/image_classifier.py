"""Classify images. Each stays in its file until its batch is made; all have one length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import numpy as np
from numpy.typing import NDArray

from lora_jax import models
from lora_jax.checkpoint.saved_adapter import SavedAdapter
from lora_jax.data.images import decode, pixels
from lora_jax.errors import LoraError
from lora_jax.models.weights import preprocessing
from lora_jax.serving.classifier import Classifier, ClassifierTask, are_all
from lora_jax.serving.jsonl import JsonLine
from lora_jax.serving.served_adapters import Served


class ImageClassifier(Classifier):
    """Computes the scores of images. An example is a path and its place in the input.

    The folder of the base says how an image is preprocessed.
    """

    unit = "images"

    @staticmethod
    def task_of(member: SavedAdapter) -> ClassifierTask:
        """See `Classifier`. `lora_jax.training.image_classification` writes such notes."""
        labels: Any = member.about.get("labels")
        field = member.about.get("image_field")
        if not are_all(str, labels) or not isinstance(field, str) or not field:
            raise LoraError(
                f"adapter {member.name!r} ({member.folder}) does not say what images it "
                "classifies. Adapters that train.py exports do; one that you save yourself says it "
                'by lora_jax.save(..., about={"labels": ["no", "yes"], "image_field": "image", '
                '"model": {"reference": ...}})'
            )
        return ClassifierTask(tuple(labels), (field,))

    def prepare_model(self, served: Served, width: int) -> nn.Module:
        self._how = preprocessing.read(served.source.path, served.config)
        return models.VitClassifier(served.config, width)

    def example_of(self, line: JsonLine, task: ClassifierTask) -> tuple[str, str]:
        return line.get(task.fields[0], str), line.where

    def arrays(self, rows: Sequence[Any]) -> tuple[NDArray[Any], ...]:
        how = self._how
        found = {row: pixels(decode(row[0], how.channels, row[1]), how) for row in {*rows}}
        return (np.stack([found[row] for row in rows]),)

    def blank(self, length: int) -> tuple[NDArray[Any], ...]:
        return (np.zeros((1, *self._how.size, self._how.channels), np.float32),)
