"""The config of a run of a pretrained ViT on images."""

from __future__ import annotations

import dataclasses
from typing import Any

from lora_jax.data.image_config import ImageDataConfig
from lora_jax.training.config import require
from lora_jax.training.pretrained import PretrainedConfig, PretrainedModelConfig


@dataclasses.dataclass(frozen=True)
class ImageModelConfig(PretrainedModelConfig):
    """The pretrained model."""

    dropout: float = 0.0
    """Dropout rate inside the encoder while training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.dropout < 1, "model.dropout", self.dropout, "in [0, 1)")

    def apply_to(self, config: Any) -> Any:
        """The model's own configuration with these settings."""
        config = super().apply_to(config)
        return dataclasses.replace(config, dropout=self.dropout, attention_dropout=self.dropout)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageConfig(PretrainedConfig):
    """A run of a pretrained ViT on images."""

    model: ImageModelConfig
    """The pretrained model."""
    data: ImageDataConfig
    """The data."""
