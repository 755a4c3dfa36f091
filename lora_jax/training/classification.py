"""The workload of a text model with a new head for classes, or for one real number."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lora_jax import models, paths
from lora_jax.checkpoint.saved_adapter import EXTRA
from lora_jax.data.classification import classification as batches_of
from lora_jax.data.labels import Labels
from lora_jax.models.weights.stored import LAST
from lora_jax.paths import Tree
from lora_jax.training import pretrained, scores, text
from lora_jax.training.config import ConfigError, require
from lora_jax.training.guesses import Guesses
from lora_jax.training.method import LORA, Method
from lora_jax.training.pretrained import Pretrained
from lora_jax.training.text import TextConfig
from lora_jax.training.workload import Batch, Loss, Workload, check_select


def classification(config: TextConfig) -> Workload:
    """Make the workload of a text model with a new head, trained on labelled texts.

    The head of a decoder reads the last token, as in transformers.
    """
    kinds = (models.BertConfig, models.DecoderConfig)
    source, model_config, method = text.opened(
        config, kinds, "classification takes a model of text"
    )
    smoothing = config.label_smoothing
    require(smoothing == 0, "label_smoothing", smoothing, "0 for a classifier")
    vocabulary = source.config.vocab_size
    of_data = functools.partial(batches_of, config.data, source.tokenizer(), vocabulary=vocabulary)
    data = pretrained.open_batches(config, of_data)
    labels = data.train.labels or Labels(())
    pooling = str(config.model.pooling)
    if isinstance(model_config, models.DecoderConfig):
        require(pooling == "mean", "model.pooling", pooling, "left out for a decoder")
        model_config, pooling = model_config.without_logits(), LAST
    head = models.Head(pooling, labels.outputs)
    count, lora = config.samples.prompts, config.adaptation is config.lora
    alone = lora and jax.process_count() == 1 and not labels.regression
    expected = "0 with several processes, another method than LoRA, or real labels"
    require(not count or alone, "samples.prompts", count, expected)
    fields = {"text_fields": config.data.text_fields, "lengths": config.data.lengths}
    made = pretrained.workload(
        config,
        Pretrained(source, model_config, head, method),
        lambda: data,
        {"labels": labels.names, **fields},
        functools.partial(_joined, model_config, pooling, method),
        {} if labels.regression else {"classes": np.int32(labels.outputs)},
        **judged(labels, config.select),
        apply=apply_of(models.classifier(model_config, head), method),
        size=real_tokens,
        unit="tokens",
    )
    own = Guesses(count, labels.names, source.tokenizer(), made) if count else None
    return dataclasses.replace(made, samples=own)


def judged(labels: Labels, select: str | None) -> dict[str, Any]:
    """Return the fields of a `Workload` that compare outputs with labels.

    There are no classes if the labels are real numbers. With `select` None, the accuracy or
    Pearson's correlation picks the best adapter.
    """
    kinds = {0: scores.real_scores, 2: scores.class_scores}  # by the number of classes
    select = select or ("pearson" if labels.regression else "accuracy")
    scored = kinds.get(len(labels.names), scores.accuracy)
    check_select(select, scores.names(scored))
    return {
        "loss": real_loss if labels.regression else class_loss,
        "scores": scored,
        "select": select,
        "better": "lower" if select == "loss" else "higher",
    }


def _joined(config: Any, pooling: str, method: Method, workloads: Sequence[Workload]) -> Workload:
    """Return the first workload with a head that is wide enough for the classes of any of them."""
    first = workloads[0]
    require(
        len({workload.loss for workload in workloads}) == 1,
        "data.regression",
        [workload.loss is real_loss for workload in workloads],
        "the same for all members of a group",
    )
    own = [paths.flatten(w.params.get(EXTRA, {})) for w in workloads]
    sizes = [{path: x.shape for path, x in one.items()} for one in own]
    if any(one != sizes[0] for one in sizes):
        raise ConfigError(
            "method must be the same for all members of a group, down to its sizes; give each "
            "method a group of its own"
        )
    widest = max(w.params["classifier"]["out"]["kernel"].shape[1] for w in workloads)
    head = models.Head(pooling, widest)
    wide, params = models.classifier(config, head), models.shapes(config, head)
    whole = {**params, **method.shapes()}
    return dataclasses.replace(first, apply=apply_of(wide, method), params=whole)


def apply_of(model: Any, method: Method = LORA) -> Any:
    """Return the model as a `Workload.apply`, which returns logits [B, C]."""

    def apply(params: Tree, batch: Any, *, train: bool, key: Any) -> Any:
        inputs = (batch["input_ids"], batch["mask"], batch.get("token_types"))
        more = getattr(model.config, "head_dropout", None), model.config.neftune
        dropping = pretrained.dropout(model.config, train, key, *more)
        return method.apply(model, params, *inputs, **dropping)

    return apply


def class_loss(logits: jax.Array, batch: Any) -> Loss:
    """Return the cross entropy of each example.

    If the batch has "classes", [] int32, the logits after that many belong to other members of the
    group: they do not count and get no gradient.
    """
    weight = batch["weight"]
    if "classes" in batch:
        own = jnp.arange(logits.shape[-1]) < batch["classes"]
        logits = jnp.where(own, logits, -jnp.inf)
    each = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    sums = scores.class_sums(logits, batch["label"], weight)
    return Loss(jnp.sum(each * weight), jnp.sum(weight), sums)


def real_loss(outputs: jax.Array, batch: Any) -> Loss:
    """Return the squared error of each example."""
    weight = batch["weight"]
    each = jnp.square(outputs[:, 0] - batch["label"])
    sums = scores.real_sums(outputs[:, 0], batch["label"], weight)
    return Loss(jnp.sum(each * weight), jnp.sum(weight), sums)


def real_tokens(batch: Batch) -> int:
    """Count the tokens of a batch, without padding."""
    return int(batch["mask"].sum())
