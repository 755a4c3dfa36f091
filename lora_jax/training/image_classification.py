"""The workload of a ViT with a new head for classes, or for one real number."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import models
from lora_jax.data.image_classification import image_classification as batches_of
from lora_jax.data.images import Augmentation
from lora_jax.data.labels import Labels
from lora_jax.models.weights import preprocessing
from lora_jax.paths import Tree
from lora_jax.training import pretrained
from lora_jax.training.classification import judged
from lora_jax.training.images import ImageConfig
from lora_jax.training.pretrained import Pretrained
from lora_jax.training.workload import Workload

POOLING = "cls"  # the head reads the class token


def image_classification(config: ImageConfig) -> Workload:
    """Make the workload of a ViT with a new head, trained on labelled images."""
    source = pretrained.open_model(
        config.model.reference,
        models.VitConfig,
        "image_classification takes a ViT; lora_jax.training.classification takes encoders of "
        "text, and lora_jax.training.causal_lm decoders",
    )
    how = preprocessing.read(source.path, source.config)
    pipeline = functools.partial(batches_of, config.data, how)
    augmentation = Augmentation(config.data.flip, config.data.crop)
    data = pretrained.open_batches(config, pipeline, augmentation=augmentation)
    labels = data.train.labels or Labels(())
    model_config = config.model.apply_to(source.config)
    return pretrained.workload(
        config,
        Pretrained(source, model_config, models.Head(POOLING, labels.outputs)),
        lambda: data,
        {"labels": labels.names, "image_field": config.data.image_field},
        **judged(labels, config.select),
        apply=apply_of(models.VitClassifier(model_config, labels.outputs)),
        example=batch_shapes(model_config, config.data.batch_size, labels),
        unit="images",
    )


def batch_shapes(
    config: models.VitConfig, rows: int, labels: Labels
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes and dtypes of a batch of `lora_jax.data.image_classification`."""
    label = jnp.float32 if labels.regression else jnp.int32
    pixels = (rows, *config.image_size, config.channels)
    return {
        "pixels": jax.ShapeDtypeStruct(pixels, jnp.float32),
        "label": jax.ShapeDtypeStruct((rows,), label),
        "weight": jax.ShapeDtypeStruct((rows,), jnp.float32),
        "index": jax.ShapeDtypeStruct((rows,), jnp.int32),
    }


def apply_of(model: models.VitClassifier) -> Any:
    """Return the model as a `Workload.apply`, which returns logits [B, C]."""

    def apply(params: Tree, batch: Any, *, train: bool, key: Any) -> Any:
        dropping = pretrained.dropout(model.config, train, key)
        return model.apply({"params": params}, batch["pixels"], **dropping)

    return apply
