"""The workload of a ViT with a new head for classes, or for one real number."""

from __future__ import annotations

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import models, paths
from lora_jax.bases.recipe import STORED
from lora_jax.data.image_classification import image_classification as batches_of
from lora_jax.data.images import Augmentation
from lora_jax.data.labels import Labels
from lora_jax.models import placement
from lora_jax.models.weights import preprocessing
from lora_jax.training import pretrained
from lora_jax.training.classification import judged
from lora_jax.training.images import ImageConfig
from lora_jax.training.method import HEAD
from lora_jax.training.workload import Common, Workload

Tree = Any  # a pytree

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
    model = models.VitClassifier(model_config, labels.outputs)
    head = models.Head(POOLING, labels.outputs)

    def fresh() -> Tree:
        return {"classifier": new_head(model, jax.random.fold_in(jax.random.key(config.seed), 1))}

    def load(shardings: Tree) -> Tree:
        stored = config.model.quantize == STORED
        vit = source.load(model_config, shardings=shardings["vit"], keep_quantised=stored)
        return {"vit": vit, **fresh()}

    about = pretrained.about(
        config, POOLING, labels=labels.names, image_field=config.data.image_field
    )
    workload = Workload(
        apply=apply_of(model),
        **judged(labels, config.select),
        params={
            **models.shapes(model_config, head),
            "vit": pretrained.base_shapes(config, source, model_config),
        },
        load=load,
        placement=placement.rules(model_config, head),
        trainable=(HEAD,),
        example=batch_shapes(model_config, config.data.batch_size, labels),
        train=data.train.iterator,
        evaluation=data.passes(),
        unit="images",
        facts=data.facts,
        about=about,
        common=Common(json.dumps(about["model"]), lambda: paths.flatten(fresh())),
    )
    return pretrained.quantised_as_said(config, workload)


def batch_shapes(
    config: models.VitConfig, rows: int, labels: Labels
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes and dtypes of a batch of `lora_jax.data.image_classification`."""
    one = {
        "label": jnp.float32 if labels.regression else jnp.int32,
        "weight": jnp.float32,
        "index": jnp.int32,
    }
    pixels = (rows, *config.image_size, config.channels)
    return {
        "pixels": jax.ShapeDtypeStruct(pixels, jnp.float32),
        **{name: jax.ShapeDtypeStruct((rows,), dtype) for name, dtype in one.items()},
    }


def apply_of(model: models.VitClassifier) -> Any:
    """Return the model as a `Workload.apply`, which returns logits [B, C]."""
    drops = model.config.dropout > 0 or model.config.attention_dropout > 0

    def apply(params: Tree, batch: Any, *, train: bool, key: Any) -> Any:
        dropping = train and drops
        rngs = {"dropout": key} if dropping else None
        return model.apply({"params": params}, batch["pixels"], not dropping, rngs=rngs)

    return apply


@functools.partial(jax.jit, static_argnums=0)
def new_head(model: models.VitClassifier, key: jax.Array) -> Tree:
    """Draw fresh parameters of the head. XLA leaves out the encoder's, which nothing uses."""
    config = model.config
    pixels = jnp.zeros((1, *config.image_size, config.channels))
    return model.init(key, pixels)["params"]["classifier"]
