"""The config of a run that trains a pretrained ViT on images."""

from __future__ import annotations

import dataclasses

from lora_jax.data.config import ImageDataConfig
from lora_jax.training.pretrained import PretrainedConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageConfig(PretrainedConfig):
    """A run that trains a pretrained ViT on images."""

    data: ImageDataConfig
    """The data."""
