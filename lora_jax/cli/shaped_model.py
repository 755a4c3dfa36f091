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
    config: Any = dataclasses.replace(source.config, scan_layers=scan_layers)
    head, root, note = None, "", ""
    if isinstance(config, models.DecoderConfig):
        kind, apply = "decoder", causal_lm.apply_of(models.DecoderModel(config))
        batch = causal_lm.batch_shapes(1, min(_LENGTH, config.max_positions))
    elif isinstance(config, models.VitConfig):
        kind, head = "image encoder", models.Head(image_classification.POOLING, CLASSES)
        apply = image_classification.apply_of(models.VitClassifier(config, CLASSES))
        labels = Labels(tuple(map(str, range(CLASSES))))
        batch = image_classification.batch_shapes(config, 1, labels)
    else:
        kind, head = "text encoder", models.Head(POOLING, CLASSES)
        apply = classification.apply_of(models.classifier(config, head))
        batch = _texts(config)
    if head is not None:
        root = f"{config.root}/"
        note = f"classifier: a new head, not in the file; shown with {CLASSES} classes"
    leaves = paths.flatten(source.shapes(config)).items()
    stored = {f"{root}{path}": 8 * bytes_of(x) / x.size for path, x in leaves if is_base(x)}
    about = f"{kind} of {config.num_layers} layers"
    stacked = config.num_layers if scan_layers else None
    return ShapedModel(about, note, apply, models.shapes(config, head), batch, stored, stacked)


def _texts(config: models.BertConfig) -> dict[str, jax.ShapeDtypeStruct]:
    names = ("input_ids", "mask", *(["token_types"] if config.num_token_types else []))
    shape = (1, min(_LENGTH, config.max_positions))
    return dict.fromkeys(names, jax.ShapeDtypeStruct(shape, jnp.int32))
