"""Open a pretrained model by shape: no weight of it is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import models, paths
from lora_jax.base import is_base
from lora_jax.bases.quantise import bytes_of
from lora_jax.data.labels import Labels
from lora_jax.training import causal_lm, classification, image_classification

CLASSES, POOLING = 2, "mean"  # of the head that is shown
_LENGTH = 8  # tokens of a text


@dataclasses.dataclass(frozen=True)
class ShapedModel:
    """A model as train.py trains it, by shape.

    note: what a reader should know of the parameters; may be empty.
    apply, batch: `apply(params, batch, train=False, key=None)`.
    stored: path -> bits of a number, of the parameters that the file holds in quantised form.
    stacked: how many layers are one stack; None: each is apart.
    """

    about: str
    note: str
    apply: Callable[..., Any]
    params: Any
    batch: Mapping[str, jax.ShapeDtypeStruct]
    stored: Mapping[str, float]
    stacked: int | None


def open_shaped(reference: str, scan_layers: bool) -> ShapedModel:
    """Open a model, and find its parameters from config.json or the GGUF header."""
    source = models.open(reference)
    config = dataclasses.replace(source.config, scan_layers=scan_layers)
    found = source.shapes(config)
    stored = {
        path: 8 * bytes_of(leaf) / leaf.size
        for path, leaf in paths.flatten(found).items()
        if is_base(leaf)
    }
    stacked = config.num_layers if scan_layers else None
    if isinstance(config, models.DecoderConfig):
        about = f"decoder of {config.num_layers} layers"
        apply = causal_lm.apply_of(models.DecoderModel(config))
        batch = causal_lm.batch_shapes(1, min(_LENGTH, config.max_positions))
        return ShapedModel(about, "", apply, models.shapes(config), batch, stored, stacked)
    if isinstance(config, models.VitConfig):
        labels = Labels(tuple(map(str, range(CLASSES))))
        about = f"image encoder of {config.num_layers} layers"
        head = models.Head(image_classification.POOLING, CLASSES)
        apply = image_classification.apply_of(models.VitClassifier(config, CLASSES))
        batch = image_classification.batch_shapes(config, 1, labels)
    else:
        about = f"text encoder of {config.num_layers} layers"
        head = models.Head(POOLING, CLASSES)
        apply = classification.apply_of(models.BertClassifier(config, CLASSES, POOLING))
        batch = _texts(config)
    note = f"classifier: a new head, not in the file; shown with {CLASSES} classes"
    of_encoder = {f"{config.root}/{path}": bits for path, bits in stored.items()}
    params = models.shapes(config, head)
    return ShapedModel(about, note, apply, params, batch, of_encoder, stacked)


def _texts(config: models.BertConfig) -> dict[str, jax.ShapeDtypeStruct]:
    names = ("input_ids", "mask", *(["token_types"] if config.num_token_types else []))
    shape = (1, min(_LENGTH, config.max_positions))
    return dict.fromkeys(names, jax.ShapeDtypeStruct(shape, jnp.int32))
