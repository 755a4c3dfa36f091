"""A TFDS data set that is shaped like GLUE, and small enough to make in a test."""

from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds


class GlueStandIn(tfds.core.GeneratorBasedBuilder):
    """`pair` is shaped like MRPC (test labels hidden), `score` like STS-B, `offline` fails."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: ClassVar = [
        tfds.core.BuilderConfig(name=name, description=name)
        for name in ("pair", "score", "offline")
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        scored = self.builder_config.name == "score"
        label = np_float() if scored else tfds.features.ClassLabel(names=["different", "same"])
        features = {
            "sentence1": tfds.features.Text(),
            "sentence2": tfds.features.Text(),
            "label": label,
            "idx": tfds.features.Tensor(shape=(), dtype=np.int32),
        }
        return tfds.core.DatasetInfo(
            builder=self, description="stand-in", features=tfds.features.FeaturesDict(features)
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        if self.builder_config.name == "offline":
            raise ConnectionError("no route to host")
        return {split: rows(self.builder_config.name, split) for split in SIZES}

    def _generate_examples(self, pipeline: Any) -> Any:
        raise NotImplementedError


SIZES = {"train": 150, "validation": 7, "test": 5}  # above 100, where other formats lose rows


def np_float() -> tfds.features.Tensor:
    return tfds.features.Tensor(shape=(), dtype=np.float32)


def rows(config: str, split: str) -> list[tuple[int, dict[str, Any]]]:
    """Return the examples as GLUE numbers them; the hidden labels of `pair`'s test split are -1."""
    made = []
    for i in range(SIZES[split]):
        label: float = i / 8 if config == "score" else (i % 2 if split != "test" else -1)
        made.append(
            (i, {"sentence1": f"one {i}", "sentence2": f"two {i}", "label": label, "idx": i})
        )
    return made
